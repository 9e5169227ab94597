"""A run over a dataset in several processes, and in processes that are killed."""

import os
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from pullback import gradient, params_of

zarr = pytest.importorskip("zarr")

from pullback.dataset import Explainer, open_store  # noqa: E402

SETTING = """
import os, sys, time
import torch
from torch import nn
import pullback
from pullback.dataset import explain_dataset

def example(i):
    return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)), i % 5

class Slow(torch.utils.data.Dataset):
    def __init__(self, length=45, pause=0.0, dies_at=None):
        self.length, self.pause, self.dies_at = length, pause, dies_at
    def __len__(self):
        return self.length
    def __getitem__(self, i):
        time.sleep(self.pause)
        if i == self.dies_at:
            os.kill(os.getpid(), 9)
        return example(i)

def explain(out, **data):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    model = nn.Sequential(*layers).eval()
    methods = {"gradient": pullback.gradient, "cam": lambda *a: pullback.grad_cam(*a, layer="0")}
    options = {"targets": "top2", "batch_size": 4, "dtype": "float16"}
    return explain_dataset(methods, pullback.params_of(model), model, Slow(**data), out=out, **options)
"""


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """The run that all processes here share, and its results undisturbed in this one."""
    folder = tmp_path_factory.mktemp("setting")
    (folder / "setting.py").write_text(SETTING)
    sys.path.insert(0, str(folder))
    import setting  # type: ignore[import-not-found]

    sys.path.remove(str(folder))
    return folder, setting.explain(folder / "undisturbed.zarr")


def assert_same(path, undisturbed):
    store = open_store(path)
    assert sorted(store) == sorted(undisturbed)
    for name in undisturbed:
        np.testing.assert_array_equal(store[name][:], undisturbed[name][:], err_msg=name, strict=True)
    assert (undisturbed["status"][:] == 1).all()


def run_script(folder, text, *command, **environment):
    """Run a script of the setting; what it wrote to standard output, line by line."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)} | environment
    got = subprocess.run(
        [sys.executable, *command, str(path)], cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )
    assert got.returncode == 0, got.stderr[-3000:]
    return got.stdout.splitlines()


@pytest.mark.parametrize("moment", ["time", pytest.param("file", marks=pytest.mark.slow)])
def test_killed_at_five_random_moments(setting, moment):
    """Some time after the start, or where one of the run's files is about to be moved to its place.

    One process imports everything, and forks the runs that are killed.
    """
    folder, undisturbed = setting
    seed = random.SystemRandom().randrange(2**32)
    lines = run_script(
        folder,
        f"""
        import os, pathlib, random, signal, time
        from setting import explain

        draw, move = random.Random({seed}), pathlib.Path.replace

        def moved(self, target, left=[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return move(self, target)

        for _ in range(5):
            seconds, files = draw.uniform(0.1, 0.5), draw.randrange(1, 25)
            child = os.fork()
            if child == 0:
                if {moment == "file"}:
                    moved.__defaults__[0][0] = files
                    pathlib.Path.replace = moved
                explain("{moment}.zarr", pause=0.0 if {moment == "file"} else 0.07)
                os._exit(0)
            if {moment == "time"}:
                time.sleep(seconds)
                os.kill(child, signal.SIGKILL)
            print(os.WTERMSIG(os.waitpid(child, 0)[1]))
        """,
    )
    assert lines == ["9"] * 5, f"seed {seed}"
    sys.modules["setting"].explain(folder / f"{moment}.zarr")
    assert_same(folder / f"{moment}.zarr", undisturbed)


def test_two_processes_of_torchrun(setting):
    """12 batches, the last one shorter, in a process group."""
    folder, undisturbed = setting
    launched = """
        import torch
        from setting import explain

        torch.distributed.init_process_group("gloo")
        explain("launched.zarr")
        torch.distributed.destroy_process_group()
    """
    run_script(folder, launched, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert_same(folder / "launched.zarr", undisturbed)


@pytest.mark.slow
def test_a_process_that_dies_and_is_restarted(setting):
    """The second process is killed in its third batch. Ranks come from the environment: no process group is needed."""
    folder, undisturbed = setting
    dying = """
        import os
        from setting import explain

        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        explain("dying.zarr", dies_at=21 if first else None)
        print(os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"])
    """
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    lines = run_script(folder, dying, *command)
    assert {"0 1", "1 1"} <= set(lines) <= {"0 0", "0 1", "1 1"}
    assert_same(folder / "dying.zarr", undisturbed)


def test_a_callable_over_batches():
    """What Ray calls, without Ray."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6)  # no class 5
    explain = Explainer(gradient, params_of(model), model, targets="label")
    found = explain({"image": images.numpy(), "label": labels.numpy(), "name": np.array(list("abcdef"))})
    assert sorted(found) == ["errors", "gradient", "image", "label", "name", "scores", "targets"]
    assert np.allclose(found["gradient"][:5, 0], gradient({}, model, images[:5], labels[:5]), atol=1e-6)
    assert np.isnan(found["gradient"][5]).all()
    assert ["`target` must lie in 0 ... 4, got 5" in error for error in found["errors"]] == [False] * 5 + [True]
    with pytest.raises(ValueError, match="`column` must be one of 'x', got 'image'"):
        explain({"x": images.numpy()})


@pytest.mark.slow
def test_ray(setting):
    """Two actors on a local Ray give what one process gives."""
    pytest.importorskip("ray")
    folder, _ = setting
    run_script(
        folder,
        """
        import numpy as np, ray, torch
        from torch import nn
        from pullback import gradient, params_of
        from pullback.dataset import Explainer

        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        model = nn.Sequential(*layers).eval()
        images = torch.randn(30, 3, 8, 8).numpy()
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        data = ray.data.from_items([{"image": image, "label": i % 5, "n": i} for i, image in enumerate(images)])
        maps = data.map_batches(
            Explainer,
            fn_constructor_args=({"gradient": gradient}, params_of(model), model),
            fn_constructor_kwargs={"targets": "label"},
            batch_size=4,
            concurrency=2,
        )
        rows = sorted(maps.take_all(), key=lambda row: row["n"])
        assert [row["n"] for row in rows] == list(range(30))
        expected = gradient({}, model, torch.from_numpy(images), torch.arange(30) % 5)
        found = np.stack([row["gradient"][0] for row in rows])
        assert np.allclose(found, expected, atol=1e-6) and not any(row["errors"] for row in rows)
        ray.shutdown()
        """,
    )
