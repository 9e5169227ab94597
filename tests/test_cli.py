"""The command line, end to end and by its parts; every kind of bad input ends in one line and exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import pullback
from pullback import cli
from pullback._networks.messages import Problem
from pullback._networks.models import load
from pullback.cli import _asked

skimage = pytest.importorskip("skimage")
CAT = str(Path(skimage.data_dir) / "chelsea.png")
COFFEE = str(Path(skimage.data_dir) / "coffee.png")

TOYS = """
import torch
from torch import nn

forwards = 0

class Net(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        global forwards
        forwards += 1
        return self.head(self.features(x).mean((2, 3)))

def net():
    torch.manual_seed(1)
    return Net()

def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 4))

def grey():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def tupled():
    class Tupled(Net):
        def forward(self, x):
            return super().forward(x), 0
    return Tupled()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty current folder, but for a module of toy networks and two photographs."""
    (tmp_path / "toys.py").write_text(TOYS)
    noise = np.random.default_rng(0).integers(0, 256, (2, 30, 30, 3)).astype(np.uint8)
    for name, pixels in zip(("a.png", "b.png"), noise, strict=True):
        Image.fromarray(pixels).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "toys", raising=False)
    return tmp_path


TOY = ("--model", "toys:net", "--size", "16")


def run(capsys, *arguments: str) -> tuple[int, list[str], list[str]]:
    """Exit code and the lines on standard output and standard error."""
    code = cli.main(arguments)
    output = capsys.readouterr()
    return code, output.out.splitlines(), output.err.splitlines()


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


# -- what it is for ----------------------------------------------------------------------------------------------------


def test_the_bar_says_how_far_a_long_method_is(capsys, monkeypatch):
    told = []
    tqdm = pytest.importorskip("tqdm")
    monkeypatch.setattr(tqdm.tqdm, "set_description_str", lambda self, text, refresh: told.append(text))
    options = ("--option", "samples=5", "--option", "chunk_size=2", "--option", "grid=3")
    assert run(capsys, "explain", "a.png", *TOY, "--method", "gradient,rise,smooth_grad", *options)[0] == 0
    far = [f"{name}{far}" for name in ("rise", "smooth_grad") for far in ("", " 2 of 5", " 4 of 5", " 5 of 5")]
    assert told == ["gradient", *far]
    assert "progress" not in _asked.method_options(pullback.rise)  # it is no option of the command line


def test_a_photograph_is_explained(capsys, folder):
    methods = "gradient,guided_backprop,integrated_gradients,grad_cam"
    code, out, err = run(capsys, "explain", CAT, "--method", methods, "--option", "steps=3", "--targets", "top5")
    assert (code, err) == (0, [])
    assert out[0] == CAT
    assert [line.split(maxsplit=2)[2] for line in out[1:4]] == ["Egyptian cat", "tiger cat", "tabby"]
    assert out[-2:] == ["  wrote out/chelsea-explained.png", "  wrote out/chelsea-maps.npz"]
    assert written(folder / "out") == {"chelsea-explained.png", "chelsea-maps.npz"}

    with Image.open("out/chelsea-explained.png") as figure:
        assert figure.width > 1000
    with np.load("out/chelsea-maps.npz") as file:
        metadata = json.loads(str(file["metadata"]))
        arrays = {name: file[name] for name in file.files if name != "metadata"}
    for name in ("gradient", "guided_backprop", "integrated_gradients"):
        assert arrays[name].shape == (5, 3, 224, 224)
    assert arrays["grad_cam"].shape == (5, 1, 7, 7)
    assert arrays["image"].shape == (224, 224, 3)
    assert arrays["targets"].tolist() == metadata["targets"]
    assert metadata["targets"][:3] == [285, 282, 281]
    assert metadata["classes"][:3] == ["Egyptian cat", "tiger cat", "tabby"]
    assert metadata["probabilities"] == sorted(metadata["probabilities"], reverse=True)
    assert metadata["image"] == CAT
    assert metadata["model"] == "efficientnet-lite0"
    assert "efficientnet-lite0" in metadata["weights"]
    assert metadata["methods"]["integrated_gradients"]["steps"] == 3
    assert metadata["methods"]["grad_cam"]["layer"]
    assert metadata["preprocessing"]["size"] == [224, 224]
    assert metadata["versions"]["torch"] == torch.__version__


def test_the_maps_are_those_of_the_library(capsys):
    assert run(capsys, "explain", "a.png", *TOY, "--method", "gradient,grad_cam", "--targets", "3,1")[0] == 0
    import toys  # type: ignore[import-not-found]

    model = toys.net().eval()
    params = pullback.params_of(model)
    with np.load("out/a-maps.npz") as file:
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x = ((torch.from_numpy(file["image"]).permute(2, 0, 1) / 255 - mean) / std)[None]
        for i, target in enumerate((3, 1)):
            want = pullback.gradient(params, model, x, target)[0]
            assert torch.allclose(torch.from_numpy(file["gradient"][i]), want, atol=1e-6)
            cam = pullback.grad_cam(params, model, x, target, layer="features")[0]
            assert torch.allclose(torch.from_numpy(file["grad_cam"][i]), cam, atol=1e-6)


@pytest.mark.parametrize("method", ["gradient", "guided_backprop", "grad_cam"])
def test_all_targets_take_one_forward(capsys, method):
    counts = []
    for targets in ("0", "all"):
        sys.modules.pop("toys", None)
        assert run(capsys, "explain", "a.png", *TOY, "--method", method, "--targets", targets)[0] == 0
        counts.append(sys.modules["toys"].forwards)
    assert counts[0] == counts[1]


def test_several_photographs(capsys, folder):
    (folder / "other").mkdir()
    Image.open("b.png").save("other/a.jpg")
    code, out, err = run(capsys, "explain", "a.png", "b.png", "other/a.jpg", *TOY, "--out", "x/y")
    assert (code, err) == (0, [])
    assert written(folder / "x/y") == {
        f"{stem}-{kind}" for stem in ("a", "b", "a-2") for kind in ("explained.png", "maps.npz")
    }
    assert [line for line in out if not line.startswith(" ")] == ["a.png", "b.png", "other/a.jpg"]


def test_the_photograph_itself_is_never_overwritten(capsys, folder):
    before = Path("a.png").read_bytes()
    assert run(capsys, "explain", "a.png", *TOY, "--out", ".")[0] == 0
    assert Path("a.png").read_bytes() == before
    assert {"a-explained.png", "a-maps.npz"} <= written(folder)


def test_more_targets_than_the_figure_shows(capsys):
    code, out, _ = run(capsys, "explain", "a.png", *TOY, "--targets", "all", "--show", "2")
    assert code == 0
    assert "  the figure shows the 2 most probable of 4 targets (--show)" in out
    with np.load("out/a-maps.npz") as file:
        assert len(file["gradient"]) == 4


def test_a_grey_network(capsys):
    grey = ("--model", "toys:grey", "--size", "8", "--mean", "0.5", "--std", "0.5")
    assert run(capsys, "explain", "a.png", *grey)[0] == 0
    with np.load("out/a-maps.npz") as file:
        assert file["gradient"].shape == (4, 1, 8, 8)


def test_a_vision_transformer(capsys):
    code, _, err = run(capsys, "explain", "a.png", "--model", "timm:test_vit.r160_in1k", "--targets", "7,8")
    assert code == 0
    assert err == [
        "pullback: warning: timm:test_vit.r160_in1k has random weights; give trained ones with --weights FILE"
    ]
    with np.load("out/a-maps.npz") as file:
        assert file["gradient"].shape == (2, 3, 160, 160)
        assert file["grad_cam"].any()


def required(function):
    return {option.name for option in cli.method_options(function).values() if cli.is_required(option)}


FEW = ("steps", "samples", "iterations")  # one pass through the code of a method is enough here
REFUSED = {
    "attention_relevance": "no self-attention",
    "integrated_hessians": "which is no map to draw",
    "shapley_values": "at most 20, got 768",
}


@pytest.mark.parametrize("method", [name for name, f in cli.public_methods().items() if required(f) <= {"layer"}])
def test_every_public_method_can_be_named(capsys, method):
    few = [f"--option={name}=4" for name in cli.method_options(cli.public_methods()[method]) if name in FEW]
    code, _, err = run(capsys, "explain", "a.png", *TOY, "--method", method, "--targets", "0,1", *few)
    assert (code, len(err)) == ((2, 1) if method in REFUSED else (0, 0)), err
    assert REFUSED.get(method, "") in "".join(err)


def test_methods_are_listed(capsys):
    code, out, err = run(capsys, "methods")
    assert (code, err) == (0, [])
    assert [line for line in out if not line.startswith(" ")] == list(cli.public_methods())
    assert {"gradient", "saliency", "integrated_gradients", "grad_cam"} <= set(cli.public_methods())
    assert any("layer (required)" in line for line in out)
    assert any("steps=50" in line for line in out)


def test_layers_are_listed(capsys):
    code, out, err = run(capsys, "layers", *TOY)
    assert (code, err) == (0, [])
    assert [line.split() for line in out if line.startswith("features.0")] == [["features.0", "Conv2d", "1x6x14x14"]]
    assert any(line.split() == ["head", "Linear", "1x4"] for line in out)


def test_version_and_help(capsys):
    for arguments in (["--version"], ["--help"], ["explain", "--help"]):
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        assert exit.value.code == 0
        assert "pullback" in capsys.readouterr().out


# -- layers, targets, options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "mobilenet_v3_small", "swin_t", "vit_b_32"])
@pytest.mark.slow
def test_the_last_spatial_layer_of_known_networks(name):
    network = load(f"torchvision:{name}", None, torch.device("cpu"))
    if name == "vit_b_32":  # untrained, its head is zero and so is every gradient
        assert _asked.last_spatial_layer({}, network.model, torch.randn(1, 3, 224, 224)) == "encoder"
        nn.init.normal_(network.model.heads.head.weight)
    probe = torch.randn(1, 3, 224, 224)
    params = pullback.params_of(network.model)
    layer = _asked.last_spatial_layer(params, network.model, probe)
    cam = pullback.linear_approx(params, network.model, probe, 0, layer=layer)
    assert (cam != 0).sum() > 1
    assert {
        "resnet18": "layer4",
        "vgg11": "avgpool",
        "vit_b_32": "encoder.layers.encoder_layer_11.ln_1",
    }.get(name, layer) == layer


@pytest.mark.parametrize("layer", ["features.3", "features"])
def test_layers_by_name(capsys, layer):
    assert run(capsys, "explain", "a.png", *TOY, "--method", "grad_cam,saliency", "--layer", layer)[0] == 0
    with np.load("out/a-maps.npz") as file:
        methods = json.loads(str(file["metadata"]))["methods"]
    assert {options["layer"] for options in methods.values()} == {layer}


NAMES = [["tabby", "tabby cat"], ["crane"], ["lynx", "catamount"], ["crane"], ["projectile", "missile"], ["missile"]]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("top3", [5, 4, 3]), ("top99", [5, 4, 3, 2, 1, 0]), ("all", [0, 1, 2, 3, 4, 5]), ("2,0", [2, 0]),
        (" 2 , 2,0", [2, 0]),
        ("tabby", [0]), ("Tabby Cat", [0]), ('"tabby cat", lynx', [0, 2]), ("catamount,5", [2, 5]), ("missile", [5]),
    ],
)  # fmt: skip
def test_targets(text, want):
    assert _asked.chosen_classes(text, NAMES, 6)(torch.arange(6) / 15) == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("6", "no class 6: the model has 6, 0 to 5"), ("-1", "no class -1"),
        ("tabi", "unknown class 'tabi'; close to it: tabby"),
        ("crane", "ambiguous: give one of the indices 1, 3"), ("", "no targets"), ("top0", "unknown class 'top0'"),
        (",", "no targets"), ("1.5", "unknown class '1.5'"), ("99999999999999999999", "no class 9999"),
    ],
)  # fmt: skip
def test_bad_targets(text, message):
    with pytest.raises(Problem, match=message):
        _asked.chosen_classes(text, NAMES, 6)


def test_classes_without_names():
    with pytest.raises(Problem, match=r"have no names; give an index, or --classes FILE"):
        _asked.chosen_classes("tabby", None, 6)


def test_options_go_to_the_methods_that_take_them():
    chosen = _asked.chosen_methods(
        "integrated-gradients, smooth_grad,gradient", ["steps=7", "smooth_grad.seed=3", "statistic=squared"], "auto"
    )
    assert list(chosen) == ["integrated_gradients", "smooth_grad", "gradient"]
    assert chosen["integrated_gradients"] == {"steps": 7}
    assert chosen["smooth_grad"] == {"seed": 3, "statistic": "squared"}
    assert _asked.chosen_methods("smooth_grad", ["chunk_size=9"], "auto") == {"smooth_grad": {"chunk_size": 9}}
    inner = _asked.chosen_methods("smooth_grad", ["method=integrated_gradients", "steps=3"], "auto")["smooth_grad"]
    assert inner == {"method": pullback.integrated_gradients, "steps": 3}
    assert _asked.chosen_methods("grad_cam,gradient", [], "auto") == {"grad_cam": {"layer": "auto"}, "gradient": {}}
    assert _asked.chosen_methods("grad_cam", ["grad_cam.layer=a.b"], "auto") == {"grad_cam": {"layer": "a.b"}}


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("gradcam", [], r"unknown method 'gradcam'; close to it: .*grad_cam.*; `pullback methods` lists them all"),
        ("params_of", [], "unknown method 'params_of'"),
        ("", [], "no method"),
        ("gradient", ["steps"], "must be KEY=VALUE"),
        ("integrated_gradients", ["step=3"], "unknown option 'step'; close to it: steps; there are: .*steps"),
        ("gradient", ["steps=3"], "unknown option 'steps'"),
        ("gradient", ["grad_cam.layer=x"], "unknown chosen method 'grad_cam'"),
        ("gradient", ["return_info=True"], "unknown option 'return_info'"),
    ],
)
def test_bad_methods_and_options(method, options, message):
    with pytest.raises(Problem, match=message):
        _asked.chosen_methods(method, options, "auto")


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_bad_photograph_does_not_stop_the_others(capsys, folder):
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("hello")
    (folder / "cut.png").write_bytes(Path("a.png").read_bytes()[:400])
    bad = ["missing.png", "empty.png", "text.jpg", "cut.png", "."]
    code, out, err = run(capsys, "explain", *bad[:3], "a.png", *bad[3:], "b.png", *TOY)
    assert code == 2
    assert [line.split(": ")[:3] for line in err] == [["pullback", "error", name] for name in bad]
    assert written(folder / "out") == {"a-explained.png", "a-maps.npz", "b-explained.png", "b-maps.npz"}
    assert {"a.png", "b.png"} <= set(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "a.png", *TOY, "--method", "gradcam"], "unknown method 'gradcam'"),
        (["explain", "a.png", *TOY, "--targets", "tabby"], "have no names"),
        (["explain", "a.png", *TOY, "--targets", "4"], "no class 4: the model has 4, 0 to 3"),
        (["explain", "a.png", *TOY, "--layer", "features.9"], "unknown layer 'features.9'; close to it: features"),
        (["explain", "a.png", *TOY, "--device", "gpu"], "device 'gpu' cannot be used here"),
        (["explain", "a.png", "--model", "resnet"], "unknown model 'resnet'"),
        (["explain", "a.png", *TOY, "--weights", "no.pt"], "no weights file 'no.pt'"),
        (["explain", "a.png", *TOY, "--classes", "no.txt"], "cannot read class names"),
        (["explain", "a.png", *TOY, "--out", "toys.py"], "cannot write to 'toys.py'"),
        (["explain", "a.png", *TOY, "--size", "0"], "must be a whole number from 1, got '0'"),
        (["explain", "a.png", *TOY, "--size", "99999"], "must be at most 8192"),
        (["explain", "a.png", *TOY, "--size", "3"], "the model cannot be run on an input of shape [1, 3, 3, 3]"),
        (["explain", "a.png", *TOY, "--show", "x"], "must be a whole number"),
        (["explain", "a.png", *TOY, "--smooth", "2"], "must be a number from 0 to 1"),
        (["explain", "a.png", *TOY, "--mean", "a"], "must be numbers such as 0.5,0.5,0.5"),
        (["explain", "a.png", *TOY, "--mean", "0,0"], "must both have 3 numbers"),
        (["explain", "a.png", *TOY, "--std", "1"], "must both have 3 numbers"),
        (["explain", "a.png", *TOY, "--std", "1,1,0"], "--std must be above 0"),
        (["explain", "a.png", "--model", "toys:tupled", "--size", "16"], "the model must return scores"),
        (["explain", "a.png", "--model", "toys:flat", "--size", "4"], "no layer of the model has positions"),
        (["explain"], "required: IMAGE"),
        (["explain", "a.png", "--nonsense"], "unrecognized arguments: --nonsense"),
        ([], "required: COMMAND"),
        (["explode"], "invalid choice: 'explode'"),
        (["layers", "--model", "resnet"], "unknown model 'resnet'"),
    ],
)
def test_bad_arguments_end_in_one_line(capsys, folder, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == []
    assert len(err) == 1
    assert err[0].startswith("pullback: error: ")
    assert message in err[0]
    assert written(folder / "out") == set()


def test_options_that_a_method_refuses(capsys, folder):
    for option in ("steps=0", "steps=many"):
        code, _, err = run(capsys, "explain", "a.png", *TOY, "--method", "integrated_gradients", "--option", option)
        assert code == 2
        assert len(err) == 1
        assert err[0].startswith("pullback: error: a.png: integrated_gradients failed: ")
    assert written(folder / "out") == set()


def test_nothing_half_written(capsys, folder, monkeypatch):
    def full(file, **arrays):
        file.write(b"some of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    code, _, err = run(capsys, "explain", "a.png", *TOY)
    assert code == 2
    assert err == ["pullback: error: a.png: could not be written to 'out': No space left on device"]
    assert written(folder / "out") == set()


@pytest.mark.filterwarnings("default")
def test_warnings_take_one_line(capsys, monkeypatch):
    import warnings

    original = _asked.predict

    def warning(*arguments):
        warnings.warn("something\nto know", stacklevel=1)
        return original(*arguments)

    monkeypatch.setattr(_asked, "predict", warning)
    code, _, err = run(capsys, "explain", "a.png", *TOY)
    assert code == 0
    assert set(err) == {"pullback: warning: something to know"}


def test_the_installed_command():
    script = Path(sys.executable).with_name("pullback")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "pullback.cli"]
    got = subprocess.run([*command, "explain", "no.png", *TOY], capture_output=True, text=True, env=os.environ)
    assert (got.returncode, got.stdout) == (2, "")
    assert got.stderr == "pullback: error: no.png: no such file\n"
