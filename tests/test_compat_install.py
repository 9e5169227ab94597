"""`import torchray` resolves to the dialect: after `install()`, and in scripts run by ``python -m``."""

import subprocess
import sys
import textwrap

from pullback.compat.torchray.__main__ import main

OLD_SCRIPT = """
    import sys
    import torch
    import torchray.attribution.common
    from torchray.attribution.grad_cam import grad_cam
    from torchray.attribution.guided_backprop import GuidedBackpropContext, guided_backprop
    from torchray.attribution.common import Probe, get_module, saliency
    from torchray.benchmark.pointing_game import PointingGame
    from torchray.utils import imsmooth

    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(inplace=True), torch.nn.Flatten(), torch.nn.Linear(64, 2)
    ).eval()
    x = torch.randn(1, 3, 6, 6)
    assert grad_cam(model, x, 1, saliency_layer="0").shape == (1, 1, 4, 4)
    probe = Probe(get_module(model, "0"), target="output")
    with GuidedBackpropContext():
        y = model(x)
    y[0, 1].backward()
    assert probe.data[0].grad is not None
    assert torchray.attribution.common.saliency is saliency
    assert torchray.__name__ == "pullback.compat.torchray"
    print("ran", __name__, sys.argv)
"""


def run(*arguments, **options):
    return subprocess.run([sys.executable, "-W", "error", *arguments], capture_output=True, text=True, **options)


def program(text):
    return textwrap.dedent(text)


def test_install():
    text = "from pullback.compat import torchray as shim\nshim.install()\nshim.install()\n" + program(OLD_SCRIPT)
    text += program("""
        import pickle, sys
        import pullback.compat.torchray.attribution.common as own
        assert torchray.attribution.common is own
        assert own.__name__ == own.__spec__.name == "pullback.compat.torchray.attribution.common"
        assert pickle.loads(pickle.dumps(PointingGame(3))).num_classes == 3
        assert sum(type(finder).__module__.startswith("pullback") for finder in sys.meta_path) == 1
        try:
            import torchray.attribution.nothing
        except ModuleNotFoundError as error:
            print(error)
    """)
    done = run("-c", text)
    assert done.returncode == 0, done.stderr
    assert "ran __main__" in done.stdout
    assert "No module named 'torchray.attribution.nothing'" in done.stdout


def test_install_refuses_beside_the_real_one(tmp_path):
    for folder in ("torchray", "torchray/attribution"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "torchray" / "attribution" / "common.py").write_text("")
    text = """
        import sys
        from pullback.compat import torchray as shim
        import torchray.attribution.common
        for _ in range(2):
            try:
                shim.install()
            except ImportError as error:
                print(error)
            assert sys.modules["torchray.attribution.common"].__name__ == "torchray.attribution.common"  # untouched
            sys.modules.pop("torchray", None)  # what is below it is enough to refuse
        for name in [name for name in sys.modules if name.startswith("torchray")]:
            del sys.modules[name]
        shim.install()  # one that is there, but not imported, stays unused
        import torchray.attribution.common
        print(torchray.__name__, torchray.attribution.common.__name__)
    """
    done = run("-c", program(text), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *refused, last = done.stdout.splitlines()
    assert len(refused) == 2
    assert all(line.startswith("The real TorchRay is imported already (`torchray") for line in refused)
    assert last == "pullback.compat.torchray pullback.compat.torchray.attribution.common"


def test_a_script_without_a_new_line(tmp_path):
    (tmp_path / "helper.py").write_text("name = 'beside the script'\n")
    script = tmp_path / "old.py"
    script.write_text(program(OLD_SCRIPT) + "import helper\nprint(helper.name)\n")
    done = run("-m", "pullback.compat.torchray", str(script), "--size", "3")
    assert done.returncode == 0, done.stderr
    assert f"ran __main__ ['{script}', '--size', '3']" in done.stdout
    assert "beside the script" in done.stdout
    done = run("-m", "pullback.compat.torchray", "-m", "old", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "'4']" in done.stdout


def test_command_line_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, expected in (
        ([], "usage: python -m pullback.compat.torchray"),
        (["-m"], "usage: "),
        (["none.py"], "error: no script 'none.py'"),
    ):
        assert main(arguments) == 2
        assert expected in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_importing_the_dialect_changes_nothing():
    text = """
        import sys, torch, torch.nn.functional as F
        before = torch.relu, F.relu, F.conv2d, list(sys.meta_path), torch.get_rng_state()
        import pullback.compat.torchray.attribution.excitation_backprop
        import pullback.compat.torchray.attribution.guided_backprop
        import pullback.compat.torchray.benchmark
        assert before[:4] == (torch.relu, F.relu, F.conv2d, list(sys.meta_path))
        assert torch.equal(before[4], torch.get_rng_state())
        assert "torchray" not in sys.modules
        assert not {"torchvision", "matplotlib", "PIL"} & set(sys.modules)
    """
    done = run("-c", program(text))
    assert done.returncode == 0, done.stderr
