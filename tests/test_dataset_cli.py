"""The command line over a folder of photographs: run, show, metrics; bad input ends in one line and exit code 2."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import pullback
from pullback import cli, maps

zarr = pytest.importorskip("zarr")

from pullback.dataset import open_store, read  # noqa: E402

TOYS = """
import torch
from torch import nn

def net(seed=1):
    torch.manual_seed(seed)
    features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))

def other():
    return net(2)
"""
TOY = ("--model", "toys:net", "--size", "16", "--batch-size", "2")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "toys.py").write_text(TOYS)
    draw = np.random.default_rng(0)
    for kind, name in (("0", "a.png"), ("0", "b.jpg"), ("2", "c.png"), ("2", "d.png"), ("3", "e.PNG")):
        path = tmp_path / "photos" / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 20, 3)).astype(np.uint8)).save(path)
        path = (tmp_path / "masks" / kind / name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = np.zeros((20, 20), np.uint8)
        mask[5:15, 5:15] = 255
        Image.fromarray(mask).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("no photograph")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "toys", raising=False)
    return tmp_path


def run(capsys, *arguments):
    code = cli.main(arguments)
    output = capsys.readouterr()
    return code, output.out.splitlines(), output.err.splitlines()


def values():
    return list(csv.DictReader(Path("values.csv").read_text().splitlines()))


def test_a_folder_is_explained_shown_and_judged(capsys, folder):
    explain = ("run", "photos", *TOY, "--method", "gradient,grad_cam", "--targets", "label", "--out", "s.zarr")
    assert run(capsys, *explain) == (0, ["s.zarr: 5 of 5 explained, 0 failed"], [])
    store = open_store("s.zarr")
    assert store["ids"][:].tolist() == ["0/a.png", "0/b.jpg", "2/c.png", "2/d.png", "3/e.PNG"]
    assert store["labels"][:].tolist() == [0, 0, 2, 2, 3]
    import toys  # type: ignore[import-not-found]

    from pullback._networks.models import Preprocessing
    from pullback._networks.photographs import prepare
    from pullback._networks.photographs import read as photograph

    preprocessing = Preprocessing(size=(16, 16))
    x = prepare(photograph(folder / "photos/2/d.png", preprocessing), preprocessing, torch.device("cpu"))
    model = toys.net().eval()
    expected = maps.channel_peak(pullback.gradient({}, model, x, 2))[0]
    assert np.allclose(read(store, "gradient", 3)[0], expected, atol=expected.max() * 2**-11)

    assert run(capsys, *explain)[:2] == (0, ["s.zarr: 5 of 5 explained, 0 failed"])
    assert run(capsys, "show", "s.zarr", "--id", "2/c.png") == (0, ["  wrote out/2-c-explained.png"], [])
    with Image.open("out/2-c-explained.png") as figure:
        assert figure.width > 400

    code, out, err = run(capsys, "metrics", "s.zarr", "--out", "values.csv")
    assert (code, err) == (0, [])
    assert [line.split()[0] for line in out] == ["gradient", "sparseness", "complexity", "means"]
    rows = values()
    assert len(rows) == 5 * 2 * 2
    row = next(r for r in rows if (r["id"], r["method"], r["metric"]) == ("2/d.png", "gradient", "sparseness"))
    assert row["target"] == "2"
    assert float(row["value"]) == pytest.approx(pullback.metrics.sparseness(expected[None]).item(), abs=1e-3)

    wanted = ("--metric", "pointing_game,relevance_mass,insertion", "--masks", "masks", "--option", "steps=3")
    code, out, err = run(capsys, "metrics", "s.zarr", *wanted, "--option", "tolerance=1", "--out", "values.csv")
    assert (code, err) == (0, [])
    assert [line.split()[0] for line in out[1:-1]] == ["pointing_game", "relevance_mass", "insertion"]
    rows = {(r["id"], r["method"], r["metric"]): float(r["value"]) for r in values()}
    object = torch.zeros(1, 16, 16, dtype=torch.bool)
    object[:, 4:12, 4:12] = True
    mass = pullback.metrics.relevance_mass(expected[None], object).item()
    assert rows["2/d.png", "gradient", "relevance_mass"] == pytest.approx(mass, abs=1e-3)
    insertion = pullback.metrics.insertion({}, model, x, torch.tensor([2]), expected[None], steps=3).item()
    assert rows["2/d.png", "gradient", "insertion"] == pytest.approx(insertion, abs=1e-2)


def test_a_bad_photograph_does_not_stop_the_others(capsys, folder):
    (folder / "photos/0/b.jpg").write_text("hello")
    explain = ("run", "photos", *TOY, "--method", "gradient", "--out", "s.zarr")
    code, out, err = run(capsys, *explain)
    assert (code, out) == (2, ["s.zarr: 4 of 5 explained, 1 failed"])
    assert len(err) == 1
    assert err[0].startswith("pullback: error: 0/b.jpg: is no photograph that can be read")
    code, _, err = run(capsys, "show", "s.zarr", "--id", "0/b.jpg")
    assert (code, len(err)) == (2, 1)
    assert "0/b.jpg" in err[0]
    assert run(capsys, "metrics", "s.zarr")[0] == 0
    (folder / "photos/0/b.jpg").write_bytes((folder / "photos/0/a.png").read_bytes())
    assert run(capsys, *explain, "--retry") == (0, ["s.zarr: 5 of 5 explained, 0 failed"], [])


def test_stopped_by_ctrl_c(capsys, monkeypatch):
    explain = ("run", "photos", *TOY, "--method", "gradient", "--out", "s.zarr")
    photograph = cli._dataset.Photographs.__getitem__

    def pressed(self, position):
        if position == 3:
            raise KeyboardInterrupt
        return photograph(self, position)

    with monkeypatch.context() as patch:
        patch.setattr(cli._dataset.Photographs, "__getitem__", pressed)
        assert run(capsys, *explain) == (130, [], ["pullback: stopped; the same command goes on from here"])
    assert open_store("s.zarr")["status"][:].tolist() == [1, 1, 0, 0, 0]
    assert run(capsys, *explain) == (0, ["s.zarr: 5 of 5 explained, 0 failed"], [])


def test_metrics_draw_a_bar_on_a_terminal(capsys, store, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bars = []

    class Bar(tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options | {"delay": 0})
            bars.append(self)

    monkeypatch.setattr("tqdm.tqdm", Bar)
    assert run(capsys, "metrics", "s.zarr")[0] == 0
    assert [(bar.n, bar.total) for bar in bars] == [(5 * 2 * 2, 5 * 2 * 2)]  # examples, targets, metrics


@pytest.fixture
def store(capsys):
    assert run(capsys, "run", "photos", *TOY, "--method", "gradient", "--targets", "0,3", "--out", "s.zarr")[0] == 0
    return open_store("s.zarr")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere", *TOY, "--out", "t.zarr"], "no folder 'nowhere'"),
        (["run", "masks/9", *TOY, "--out", "t.zarr"], "no folder"),
        (["run", "photos/0", *TOY, "--out", "t.zarr", "--targets", "label"], "in one folder for each class"),
        (["run", "photos", *TOY, "--out", "t.zarr", "--targets", "9"], "no class 9: the model has 4"),
        (["run", "photos", *TOY, "--out", "toys.py"], "is there and is no store of results"),
        (["run", "photos", *TOY, "--out", "toys.py/s.zarr"], "cannot be written to: File exists"),
        (["run", "photos", *TOY, "--out", "s.zarr", "--targets", "0,3"], "holds the results of another run"),
        (["run", "photos", *TOY, "--out", "t.zarr", "--workers", "many"], "must be a whole number"),
        (["run", "photos", *TOY], "required: --out"),
        (["show", "s.zarr", "--id", "0/c.png"], "unknown id '0/c.png'; close to it: "),
        (["show", "s.zarr", "--id", "0/a.png", "--method", "lime"], "unknown method 'lime'; the store has gradient"),
        (["show", "s.zarr", "--id", "0/a.png", "--images", "masks/0"], "--images FOLDER says where"),
        (["show", "t.zarr", "--id", "0/a.png"], "No store of results at 't.zarr'"),
        (["metrics", "s.zarr", "--metric", "inserton"], "unknown metric 'inserton'; close to it: insertion"),
        (["metrics", "s.zarr", "--metric", "max_sensitivity"], "unknown metric 'max_sensitivity'"),
        (["metrics", "s.zarr", "--metric", "pointing_game"], "pointing_game needs --masks FOLDER"),
        (["metrics", "s.zarr", "--masks", "photos/0"], "mask 'photos/0/0/a.png': no such file"),
        (["metrics", "s.zarr", "--option", "steps=3"], "no metric that is run takes the option 'steps'"),
        (["metrics", "s.zarr", "--metric", "completeness"], "run gradient with --reduce none"),
    ],
)  # fmt: skip
def test_bad_arguments_end_in_one_line(capsys, store, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, [])
    assert len(err) == 1
    assert err[0].startswith("pullback: error: ")
    assert message in err[0]


def test_another_network_is_refused(capsys, store, folder):
    (folder / "toys.py").write_text(TOYS.replace("seed=1", "seed=3"))
    sys.modules.pop("toys")
    code, _, err = run(capsys, "metrics", "s.zarr", "--metric", "insertion")
    assert code == 2
    assert err == ["pullback: error: the network has other params now than when the store was made"]


def test_a_store_made_from_python(capsys, folder):
    model = torch.nn.Linear(3, 2)
    pullback.dataset.explain_dataset(
        pullback.gradient, {}, model, torch.randn(4, 3), targets=[0], out=folder / "p.zarr", batch_size=2
    )
    code, _, err = run(capsys, "metrics", "p.zarr")
    assert code == 2
    assert "was made from Python" in err[0]
