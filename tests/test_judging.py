"""The benchmark: what it is judged on, that an interrupted run loses nothing, and what its tables say."""

import csv
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import pullback
from pullback import PullbackWarning, evaluation, metrics
from pullback._networks.messages import Problem
from pullback._networks.models import Preprocessing
from pullback.evaluation import Entry, Example, annotations, examples, methods, runner
from pullback.evaluation import __main__ as command
from pullback.evaluation.annotations import segment, voc_label

Image = pytest.importorskip("PIL.Image")

FULL = torch.ones(1, 4, 4, dtype=torch.bool)


def corner(name: str = "one", classes: int = 2, seed: int = 0) -> Example:
    """Two classes in two corners."""
    masks = torch.zeros(classes, 4, 4, dtype=torch.bool)
    for k in range(classes):
        masks[k, k, : 2 + k] = True
    generator = torch.Generator().manual_seed(seed)
    return Example(name, torch.randn(3, 4, 4, generator=generator), torch.arange(classes), masks)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


# -- examples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"masks": torch.zeros(1, 4, 4, dtype=torch.bool)}, "class 1 has an empty mask"),
        ({"masks": torch.ones(1, 4, 4)}, "a bool mask"),
        ({"masks": torch.ones(2, 4, 4, dtype=torch.bool)}, r"each of its 1 targets, got \[3, 4, 4\] and \[2, 4, 4\]"),
        ({"x": torch.zeros(1, 3, 4, 4)}, "must have `x`"),
        ({"targets": torch.tensor([1, 1]), "masks": FULL.expand(2, 4, 4)}, "each once"),
        ({"targets": torch.tensor([])}, "must be class indices"),
        ({"targets": torch.tensor([0.5])}, "must be class indices"),
        ({"groups": ("a", "b")}, "must name one for each"),
    ],
)
def test_examples_that_cannot_be_judged(changes, match):
    good = {"name": "cat", "x": torch.zeros(3, 4, 4), "targets": torch.tensor([1]), "masks": FULL}
    assert Example(**good).groups == ("cat",)
    with pytest.raises(ValueError, match=match):
        Example(**{**good, **changes})


def some_tiles(count: int, names: str = "abcdefg") -> dict[str, list[examples.Tile]]:
    return {
        n: [examples.Tile(n, torch.full((1, 2, 2), 10.0 * k + j), k) for j in range(count)] for k, n in enumerate(names)
    }


def test_mosaics_are_balanced_and_their_masks_are_right():
    found = evaluation.mosaics(some_tiles(3), count=14)
    assert [e.name for e in found] == [f"mosaic {i}" for i in range(14)]
    for example in found:
        assert len(set(example.groups)) == 4
        assert (example.masks.sum(0) == 1).all()  # every pixel belongs to one tile
        for mask, target in zip(example.masks, example.targets):
            inside = example.x[0][mask]
            assert (inside == inside[0]).all()
            assert int(inside[0]) // 10 == int(target)
    for part in (found[:7], found[7:]):  # a round shows each photograph once at each place
        shown = [[e.groups[place] for e in part] for place in range(4)]
        assert all(sorted(column) == sorted("abcdefg") for column in shown)
    again = evaluation.mosaics(some_tiles(3), count=14)
    assert all(torch.equal(a.x, b.x) for a, b in zip(found, again))
    assert any(a.groups != b.groups for a, b in zip(found, evaluation.mosaics(some_tiles(3), count=14, seed=1)))
    with pytest.raises(ValueError, match="four photographs of four classes"):
        evaluation.mosaics(some_tiles(3, "abc"))


def test_tiles_are_crops_that_the_network_gets_right():
    grey = np.random.default_rng(0).integers(0, 50, (40, 60, 3)).astype(np.uint8)
    sources = [
        evaluation.Photograph("dark", grey, (0,)),
        evaluation.Photograph("light", grey + 200, (1, 2)),
        evaluation.Photograph("wrong", grey + 200, (0,)),
    ]

    def model(x):
        light = 30 * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-light, light, light - 50], 1)

    plain = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3)
    cut = evaluation.tiles(model, sources, plain, side=8, count=3, tries=10)
    assert {name: [t.target for t in own] for name, own in cut.items()} == {"dark": [0] * 3, "light": [1] * 3}
    assert cut["dark"][0].x.shape == (3, 8, 8)
    assert all(float(t.x.min()) >= 0 and float(t.x.max()) <= 1 for own in cut.values() for t in own)
    assert not torch.equal(cut["dark"][0].x, cut["dark"][1].x)
    assert evaluation.tiles(model, sources, plain, side=8, least=1.01, tries=3) == {}
    alone = evaluation.single(cut)
    assert [e.name for e in alone] == ["dark", "light"]
    assert torch.equal(alone[1].x, cut["light"][0].x)


def test_photographs_of_packages_and_folders(tmp_path):
    pytest.importorskip("skimage")
    found = evaluation.photographs()
    assert [p.name for p in found] == ["chelsea", "coffee", "motorcycle", "camera", "rocket", "china", "hopper"]
    assert all(p.pixels.dtype == np.uint8 and p.pixels.shape[2] == 3 for p in found)
    for kind in ("tabby", "967"):
        (tmp_path / kind).mkdir()
        Image.new("L", (6, 5), 128).save(tmp_path / kind / "a.png")
    assert [(p.classes, p.pixels.shape) for p in evaluation.photographs(tmp_path)] == [
        ((967,), (5, 6, 3)),
        ((281,), (5, 6, 3)),
    ]
    (tmp_path / "no such class").mkdir()
    Image.new("L", (6, 5)).save(tmp_path / "no such class" / "a.png")
    with pytest.raises(ValueError, match="class of ImageNet or its index, got 'no such class'"):
        evaluation.photographs(tmp_path)
    with pytest.raises(FileNotFoundError, match="Nothing is downloaded"):
        evaluation.photographs(tmp_path / "nowhere")


def test_digits_tell_exactly_where_the_ink_is():
    datasets = pytest.importorskip("sklearn.datasets")
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    model, found = evaluation.digits(count=5, epochs=1)
    again, _ = evaluation.digits(count=5, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert 0 < model.accuracy <= 1  # hardly trained
    assert 0 < len(found) <= 5
    raw = datasets.load_digits()
    for example in found:
        index = int(example.name.split()[1])
        assert int(example.targets) == raw.target[index] == int(model(example.x[None]).argmax())
        rows, columns = example.masks[0].nonzero().T
        ink = example.masks[0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].numpy()
        drawn = np.kron(raw.images[index] > 0, np.ones((2, 2), bool))
        drawn = drawn[np.ix_(drawn.any(1), drawn.any(0))]
        assert (ink == drawn).all()
        assert float(example.x[0][~example.masks[0]].max()) < examples.NOISE


def test_folders_with_masks(tmp_path):
    for kind in ("b", "a"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        (tmp_path / "masks" / kind).mkdir(parents=True)
        Image.new("RGB", (6, 4), "red").save(tmp_path / "images" / kind / "one.jpg")
        mask = Image.new("L", (6, 4))
        mask.putpixel((5, 2), 255)
        mask.save(tmp_path / "masks" / kind / "one.png")
    prepare = evaluation.fitted(Preprocessing(), side=8)
    found = evaluation.masked_folder(tmp_path / "images", tmp_path / "masks", prepare, index=["x", "a", "b"])
    assert [e.name for e in found] == ["a/one.jpg", "b/one.jpg"]
    assert [e.targets.tolist() for e in found[:2]] == [[1], [2]]
    assert found[0].masks.nonzero().tolist() == [[0, 2, 5]]
    assert found[0].x.shape == (3, 8, 12)
    with pytest.raises(ValueError, match="`index` has no class 'b'"):
        evaluation.masked_folder(tmp_path / "images", tmp_path / "masks", prepare, index=["a"])
    Image.new("L", (6, 5), 1).save(tmp_path / "masks" / "a" / "one.png")
    with pytest.raises(ValueError, match=r"size of its photograph, \(4, 6\), got \(5, 6\)"):
        found[0]
    Image.new("L", (6, 4)).save(tmp_path / "masks" / "a" / "one.png")
    with pytest.raises(ValueError, match="class 1 has an empty mask"):
        found[0]
    (tmp_path / "masks" / "a" / "one.png").unlink()
    with pytest.raises(FileNotFoundError, match="No mask"):
        evaluation.masked_folder(tmp_path / "images", tmp_path / "masks", prepare, index=["a", "b"])


# -- VOC ---------------------------------------------------------------------------------------------------------------

OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
    "<xmax>1</xmax><ymax>1</ymax></bndbox></part><bndbox><xmax>{}</xmax><xmin>{}</xmin><ymin>{}</ymin><ymax>{}</ymax>"
    "</bndbox></object>"
)


def annotation(*objects: tuple, size: tuple[int, int] = (10, 8)) -> str:
    """A VOC annotation of objects ``(name, difficult, left, top, right, bottom)``."""
    found = "".join(OBJECT.format(n, d, right, left, top, bottom) for n, d, left, top, right, bottom in objects)
    return (
        f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>{found}"
        "</annotation>"
    )


@pytest.fixture
def voc_root(tmp_path):
    root = tmp_path / "VOC2007"
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / name).mkdir(parents=True)
    labels = {
        "000001": annotation(("dog", 0, 2, 1, 4, 3), ("dog", 1, 9, 7, 10, 8), ("cat", 1, 1, 1, 9, 8)),
        "000002": annotation(("dog", 0, 1, 1, 9, 8), ("person", 0, 1, 1, 2, 2), ("bird", 0, "1.4", 1, "2.6", 2)),
        "000003": annotation(("dog", 0, 1, 1, 2, 2)),
        "000004": annotation(("sofa", 1, 1, 1, 2, 2)),
    }
    for name, text in labels.items():
        (root / "Annotations" / f"{name}.xml").write_text(text)
        Image.new("RGB", (10, 8), "blue").save(root / "JPEGImages" / f"{name}.jpg")
    (root / "ImageSets/Main/test.txt").write_text("".join(f"{name}\n" for name in labels))
    return root


def test_voc_annotations(voc_root):
    label = voc_label(voc_root / "Annotations" / "000001.xml")
    assert label.classes == (11,)  # the cat does not count: all of its boxes are marked difficult
    assert label.hidden == (7,)
    expected = np.zeros((8, 10), bool)
    expected[0:3, 1:4] = expected[6:8, 8:10] = (
        True  # from 1, both ends included; difficult boxes of a class that counts too
    )
    assert (label.masks[0] == expected).all()
    assert label.areas == (9 + 4,)
    label = voc_label(voc_root / "Annotations" / "000002.xml")
    assert label.classes == (2, 11, 14)
    assert label.masks[0].sum() == 3 * 2  # corners are rounded


def test_voc_as_examples(voc_root):
    prepare = evaluation.fitted(Preprocessing(), side=16)
    found = evaluation.voc(voc_root, prepare)
    assert [(e.name, e.targets.tolist()) for e in found] == [
        ("000001", [11]),
        ("000002", [2, 11, 14]),
        ("000003", [11]),
    ]
    assert found[0].x.shape == (3, 16, 20)
    assert found[0].masks.shape == (1, 8, 10)
    # below a quarter of the image, and another class in it: also one that does not count itself
    difficult = evaluation.voc(voc_root, prepare, difficult=True)
    assert [(e.name, e.targets.tolist()) for e in difficult] == [("000001", [11]), ("000002", [2, 14])]
    (voc_root / "list.txt").write_text("000002 11 7\n000003.jpg 11\n")
    listed = evaluation.voc(voc_root, prepare, difficult=True, listed=voc_root / "list.txt")
    assert [(e.name, e.targets.tolist()) for e in listed] == [("000002", [11]), ("000003", [11])]


def test_voc_that_cannot_be_read(voc_root):
    prepare = evaluation.fitted(Preprocessing())
    for text, match in (
        (annotation(("unicorn", 0, 1, 1, 2, 2)), "the class 'unicorn' is none of the 20"),
        ("<annotation><object>", "is no VOC annotation"),
        (annotation(("dog", 0, "", 1, 2, 2)), "is no VOC annotation"),
        ("<annotation></annotation>", "is no VOC annotation"),
    ):
        (voc_root / "Annotations" / "000003.xml").write_text(text)
        with pytest.raises(ValueError, match=match):
            evaluation.voc(voc_root, prepare)
    (voc_root / "Annotations" / "000003.xml").unlink()
    with pytest.raises(FileNotFoundError, match="No VOC annotation"):
        evaluation.voc(voc_root, prepare)
    with pytest.raises(FileNotFoundError, match="No list of VOC images"):
        evaluation.voc(voc_root, prepare, image_set="val")
    (voc_root / "ImageSets/Main/val.txt").write_text("000004\n")
    with pytest.raises(ValueError, match="no image with a class that counts"):
        evaluation.voc(voc_root, prepare, image_set="val")


# -- COCO --------------------------------------------------------------------------------------------------------------


def characters(runs: list[int]) -> str:
    """Write lengths of runs as the format says: an independent inverse of the reader."""
    text = ""
    for i, run in enumerate(runs):
        number = run - runs[i - 2] if i > 2 else run
        while True:
            low, number = number & 31, number >> 5
            done = number == (-1 if low & 16 else 0)
            text += chr(48 + low + (0 if done else 32))
            if done:
                break
    return text


def test_runs():
    assert segment({"counts": [0, 4], "size": [2, 2]}, 2, 2).all()
    assert segment({"counts": "04", "size": [2, 2]}, 2, 2).all()
    assert segment({"counts": b"d05", "size": [5, 5]}, 5, 5).nonzero()[1].tolist() == [4] * 5  # 20, then 5
    draw = np.random.default_rng(0)
    for _ in range(30):
        runs = draw.integers(1, 70, draw.integers(1, 12)).tolist()
        runs[0] = int(draw.integers(0, 2)) * runs[0]
        total = sum(runs)
        height = next(h for h in (7, 5, 3, 2, 1) if total % h == 0)
        mask = segment({"counts": characters(runs), "size": [height, total // height]}, height, total // height)
        flat, place = mask.T.ravel(), 0
        for i, run in enumerate(runs):  # zeros first, down the columns
            assert (flat[place : place + run] == bool(i % 2)).all()
            place += run
    with pytest.raises(ValueError, match="runs that fill 2 x 2 pixels, got 3"):
        segment({"counts": [1, 2], "size": [2, 2]}, 2, 2)


def test_polygons():
    draw = np.random.default_rng(1)
    centres = np.stack(np.meshgrid(np.arange(12) + 0.5, np.arange(9) + 0.5), -1)
    for _ in range(20):  # a convex polygon is where all its sides have it to their left
        angles = np.sort(draw.uniform(0, 2 * np.pi, 6))
        corners = np.stack([6 + 5 * np.cos(angles), 4 + 4 * np.sin(angles)], 1)
        sides = np.roll(corners, -1, 0) - corners
        left = [
            side[0] * (centres[..., 1] - c[1]) - side[1] * (centres[..., 0] - c[0]) for side, c in zip(sides, corners)
        ]
        assert (segment([corners.ravel().tolist()], 9, 12) == (np.min(left, 0) > 0)).all()
    two = [[0, 0, 2, 0, 2, 2, 0, 2], [1, 1, 4, 1, 4, 3, 1, 3]]
    expected = np.zeros((4, 5), bool)
    expected[0:2, 0:2] = expected[1:3, 1:4] = True
    assert (segment(two, 4, 5) == expected).all()
    notch = [[0, 0, 4, 0, 4, 4, 2, 3, 0, 4]]  # the corner at (2, 3) cuts in
    assert segment(notch, 4, 4)[3].tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match="pairs x, y in each polygon, got 5"):
        segment([[0, 0, 1, 1, 2]], 4, 4)


@pytest.fixture
def coco_files(tmp_path):
    given = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 8, "height": 6} for i in (7, 3, 9)],
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 44, "name": "bottle"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 18, "segmentation": [[0, 0, 6, 0, 6, 6, 0, 6]], "area": 36},
            {"id": 2, "image_id": 7, "category_id": 1, "segmentation": {"counts": [46, 2], "size": [6, 8]}, "area": 2},
            {"id": 3, "image_id": 7, "category_id": 18, "segmentation": [[6, 0, 8, 0, 8, 2, 6, 2]], "area": 4},
            {"id": 4, "image_id": 3, "category_id": 44, "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]], "area": 1},
        ],
    }
    for image in given["images"]:
        Image.new("RGB", (8, 6)).save(tmp_path / image["file_name"])
    return tmp_path, given


def test_coco(coco_files):
    folder, given = coco_files
    file, prepare = folder / "instances.json", evaluation.fitted(Preprocessing(), side=6)
    file.write_text(json.dumps(given))
    found = evaluation.coco(folder, file, prepare)
    assert [(e.name, e.targets.tolist()) for e in found] == [("3.jpg", [2]), ("7.jpg", [0, 1])]
    assert found[1].masks.flatten(1).sum(1).tolist() == [2, 36 + 4]
    assert found[1].masks[0].nonzero().tolist() == [[4, 7], [5, 7]]
    difficult = evaluation.coco(folder, file, prepare, difficult=True)
    assert [(e.name, e.targets.tolist()) for e in difficult] == [("7.jpg", [0])]
    for change, match in (({"category_id": 2}, "unknown category_id 2"), ({"image_id": 8}, "unknown image_id 8")):
        file.write_text(json.dumps({**given, "annotations": [{**given["annotations"][0], **change}]}))
        with pytest.raises(ValueError, match=match):
            evaluation.coco(folder, file, prepare)
    file.write_text(json.dumps({**given, "annotations": []}))
    with pytest.raises(ValueError, match="no image with a class"):
        evaluation.coco(folder, file, prepare)
    with pytest.raises(FileNotFoundError, match="No file of COCO instances"):
        evaluation.coco(folder, folder / "none.json", prepare)


# -- the runner --------------------------------------------------------------------------------------------------------


def counted(calls: list, stop_at: int | None = None):
    """The gradient, which notes its calls and is interrupted at one of them."""

    def method(params, model, x, target, **options):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return pullback.gradient(params, model, x, target)

    return method


def values(rows):
    keys = ("method", "options", "example", "target", "metric", "metric_options", "value")
    return sorted(tuple(str(row[k]) for k in keys) for row in rows)


def test_a_run_gives_what_the_metrics_give(tmp_path):
    model, example = network(), corner()
    rows = evaluation.run(
        model,
        [example],
        {"ixg": Entry(pullback.input_x_gradient), "grad": Entry(pullback.gradient, reduce="peak")},
        {"energy_pointing_game": {}, "pointing_game": {"tolerance": 2}},
        out=tmp_path,
        dataset="corners",
    )
    assert len(rows) == 2 * 2 * 2
    params = pullback.params_of(model)
    for row in rows:
        method = pullback.gradient if row["method"] == "grad" else pullback.input_x_gradient
        k = row["target"]
        attribution = method(params, model, example.x[None], k)
        map = attribution.abs().amax(1, keepdim=True) if row["method"] == "grad" else attribution.sum(1, keepdim=True)
        mask = example.masks[k, None]
        if row["metric"] == "pointing_game":
            assert row["value"] == float(metrics.pointing_game(map, mask, tolerance=2))
            assert row["metric_options"] == "tolerance=2"
        else:
            assert row["value"] == pytest.approx(float(metrics.energy_pointing_game(map, mask)), rel=1e-6)
        assert row["chance"] == (2 + k) / 16
        assert (row["dataset"], row["group"]) == ("corners", "one")
    assert runner.read_table(evaluation.write_table(rows, tmp_path / "results.csv")) == rows


@pytest.mark.parametrize("stop_at", range(1, 7))
def test_an_interrupted_run_loses_and_doubles_nothing(tmp_path, stop_at):
    model, found = network(), [corner(str(k), seed=k) for k in range(3)]

    def table(method):
        return {"a": Entry(method, together=False), "b": Entry(pullback.input_x_gradient)}

    whole = evaluation.run(model, found, table(counted([])), out=tmp_path / "whole")
    first, second = [], []
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(model, found, table(counted(first, stop_at)), out=tmp_path / "cut")
    rows = evaluation.run(model, found, table(counted(second)), out=tmp_path / "cut")
    assert values(rows) == values(whole)
    done = (stop_at - 1) // 2  # whole examples of two targets before the interruption
    assert len(second) == 6 - 2 * done
    third = []
    assert values(evaluation.run(model, found, table(counted(third)), out=tmp_path / "cut")) == values(whole)
    assert third == []


def test_a_line_that_was_cut_short_is_done_again(tmp_path):
    model, found = network(), [corner(str(k), seed=k) for k in range(2)]
    table = {"a": Entry(pullback.gradient), "b": Entry(pullback.input_x_gradient)}
    whole = evaluation.run(model, found, table, out=tmp_path)
    text = (tmp_path / "journal.jsonl").read_text()
    ends = [i for i, c in enumerate(text) if c == "\n"]
    for length in (len(text) - 1, len(text) - 20, ends[2] + 1, ends[2] + 30, ends[0] + 5, ends[0], 10, 0):
        (tmp_path / "journal.jsonl").write_text(text[:length])
        rows = evaluation.run(model, found, table, out=tmp_path)
        assert values(rows) == values(whole)


def test_two_runs_at_once_double_nothing(tmp_path):
    model, table = network(), {"a": Entry(pullback.gradient)}
    rows = evaluation.run(model, [corner()], table, out=tmp_path)
    text = (tmp_path / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "journal.jsonl").write_text("".join([*text, text[-1]]))  # the other one did the same
    assert evaluation.run(model, [corner()], table, out=tmp_path) == rows


def test_results_of_others_are_refused_or_stand_beside(tmp_path):
    model, table = network(), {"a": Entry(pullback.gradient)}
    evaluation.run(model, [corner()], table, out=tmp_path, dataset="d")
    other = {**pullback.params_of(model)}
    other["3.bias"] = other["3.bias"] + 1e-6
    with pytest.raises(ValueError, match="a folder of its own for each data set and model"):
        evaluation.run(model, [corner()], table, out=tmp_path, dataset="d", params=other)
    with pytest.raises(ValueError, match="a folder of its own"):
        evaluation.run(model, [corner()], table, out=tmp_path, dataset="e")
    with pytest.raises(ValueError, match="`examples` has another 'one'"):
        evaluation.run(model, [corner(seed=1)], table, out=tmp_path, dataset="d")
    with pytest.raises(ValueError, match=r"named in `pullback\.metrics\.METRICS`, got 'energy'"):
        evaluation.run(model, [corner()], table, {"energy": {}}, out=tmp_path, dataset="d")
    calls = []
    for options in ({"steps": 2}, {"steps": 3}, {"steps": 2}):
        entry = Entry(lambda *a, steps: calls.append(steps) or pullback.gradient(*a), options)
        rows = evaluation.run(model, [corner()], {"a": entry}, out=tmp_path, dataset="d")
        assert {row["options"] for row in rows} == {f"steps={options['steps']}"}
    assert calls == [2, 3]
    rows = evaluation.run(model, [corner()], table, {"pointing_game": {"tolerance": 4}}, out=tmp_path, dataset="d")
    assert [row["metric_options"] for row in rows] == ["tolerance=4"] * 2


def test_options_are_told_apart():
    base = Entry(pullback.gradient, {"baseline": torch.zeros(3), "method": pullback.gradient})
    same = Entry(pullback.gradient, {"method": pullback.gradient, "baseline": torch.zeros(3)})
    assert base.description == same.description
    for change in ({"baseline": torch.ones(3)}, {"baseline": torch.zeros(1, 3)}, {"method": pullback.saliency}):
        assert replace(base, options={**base.options, **change}).description != base.description
    assert Entry(pullback.gradient, reduce="peak").description != Entry(pullback.gradient).description


def test_what_fails_is_told_left_out_and_tried_again(tmp_path):
    model, found = network(), [corner(str(k), seed=k) for k in range(2)]
    healthy = []

    def sick(params, model, x, target):
        result = pullback.gradient(params, model, x, target)
        return result if healthy or not torch.equal(x[0], found[1].x) else result / 0 * 0

    def broken(params, model, x, target):
        raise RuntimeError("out of luck\nand more")

    table = {"sick": Entry(sick), "broken": Entry(broken), "good": Entry(pullback.gradient)}
    with pytest.warns(PullbackWarning) as told:
        rows = evaluation.run(model, found, table, out=tmp_path)
    assert {w.filename for w in told} == {__file__}
    said = {str(w.message) for w in told}
    assert "`sick` on example '1' is left out: the map holds NaN or infinite values" in said
    assert "`broken` on example '0' is left out: out of luck" in said
    assert {(r["method"], r["example"]) for r in rows} == {("sick", "0"), ("good", "0"), ("good", "1")}
    healthy.append(True)
    rows = evaluation.run(model, found, {"sick": table["sick"]}, out=tmp_path)
    assert {(r["method"], r["example"]) for r in rows} == {("sick", "0"), ("sick", "1")}
    absent = Example("absent", found[0].x, torch.tensor([3]), FULL)
    with pytest.warns(PullbackWarning, match=r"`target` must lie in 0 ... 2, got 3"):  # a class the model has not
        assert evaluation.run(model, [absent], {"good": table["good"]}, out=tmp_path) == []
    flat = Entry(lambda params, model, x, target: pullback.gradient(params, model, x, target).flatten(1))
    with pytest.warns(PullbackWarning, match="which is no map"):
        evaluation.run(model, found[:1], {"flat": flat}, out=tmp_path)


def test_nothing_to_measure_counts_as_a_result(tmp_path):
    dark = Entry(lambda params, model, x, target: -x.abs().sum(1, keepdim=True))  # nowhere positive
    for _ in range(2):
        rows = evaluation.run(network(), [corner()], {"dark": dark}, out=tmp_path)
        assert all(math.isnan(r["value"]) == (r["metric"] == "energy_pointing_game") for r in rows)
    energy = next(s for s in evaluation.summarise(rows) if s.metric == "energy_pointing_game")
    assert (energy.count, energy.undefined) == (0, 2)
    assert math.isnan(energy.mean)


def test_every_kind_of_metric(tmp_path):
    model, example = network().double(), corner()
    example = replace(example, x=example.x.double())
    chosen = {"deletion": {"steps": 4}, "completeness": {"baseline": torch.zeros(())}, "sparseness": {},
              "max_sensitivity": {"samples": 3}, "random_logit": {}}  # fmt: skip
    rows = evaluation.run(model, [example], {"ixg": Entry(pullback.input_x_gradient)}, chosen, out=tmp_path)
    found = {(row["metric"], row["target"]): row["value"] for row in rows}
    params, x = pullback.params_of(model), example.x[None]
    for k in (0, 1):
        attribution = pullback.input_x_gradient(params, model, x, k)
        map = attribution.sum(1, keepdim=True)
        reduced = Entry(pullback.input_x_gradient).map
        expected = {
            "deletion": metrics.deletion(params, model, x, k, map, steps=4),
            "completeness": metrics.completeness(params, model, x, k, attribution, baseline=torch.zeros(())),
            "sparseness": metrics.sparseness(map),
            "random_logit": metrics.random_logit(params, model, x, k, reduced),
        }
        for name, value in expected.items():
            assert found[name, k] == pytest.approx(float(value), rel=1e-5), name
        assert found["max_sensitivity", k] > 0


def test_channels_come_together():
    attribution = torch.randn(2, 3, 4, 4)
    assert torch.equal(Entry(pullback.gradient).reduced(attribution)[:, 0], attribution.sum(1))
    peak = Entry(pullback.gradient, reduce="peak")
    assert torch.equal(peak.reduced(attribution)[:, 0], attribution.abs().amax(1))
    assert torch.equal(peak.reduced(attribution[:, :1]), attribution[:, :1].abs())  # one channel has a sign as well


def test_maps_are_resized_to_the_masks(tmp_path):
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, :4, :4] = True
    example = Example("large", torch.randn(3, 4, 4), torch.tensor([0]), masks)
    map = torch.zeros(1, 1, 2, 2)
    map[..., 0, 0] = 1
    entry = Entry(lambda params, model, x, target: map)
    (row,) = evaluation.run(network(), [example], {"m": entry}, {"pointing_game": {"tolerance": 1}}, out=tmp_path)
    assert row["value"] == 1


def test_one_after_the_other_or_together(tmp_path):
    for together in (True, False):
        entry = Entry(pullback.gradient, together=together)
        found = runner.attributions(pullback.params_of(network()), network(), entry, corner())
        loop = [pullback.gradient(pullback.params_of(network()), network(), corner().x[None], k)[0] for k in (0, 1)]
        assert torch.allclose(found, torch.stack(loop), atol=1e-6)


def test_tables(tmp_path):
    rows = evaluation.run(network(), [corner()], {"a": Entry(pullback.gradient)}, out=tmp_path)
    file = evaluation.write_table(rows, tmp_path / "results.csv")
    with file.open() as handle:
        read = list(csv.DictReader(handle))
    assert [{k: str(v) for k, v in row.items()} for row in rows] == read
    assert sorted(p.name for p in tmp_path.iterdir()) == ["journal.jsonl", "results.csv"]
    with pytest.raises(ValueError, match=r"`file` must end in .csv or .parquet"):
        evaluation.write_table(rows, tmp_path / "results.xls")
    with pytest.raises(ValueError, match="nothing was judged"):
        evaluation.write_table([], file)
    try:
        import pandas
        import pyarrow  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install pandas pyarrow"):
            evaluation.write_table(rows, tmp_path / "results.parquet")
    else:
        frame = pandas.read_parquet(evaluation.write_table(rows, tmp_path / "results.parquet"))
        assert frame.to_dict("records") == rows


# -- summaries ---------------------------------------------------------------------------------------------------------


def row(value, group="g", target=0, method="m", metric="energy_pointing_game"):
    return {"method": method, "options": "", "metric": metric, "value": value, "group": group, "target": target,
            "chance": 0.25}  # fmt: skip


def test_means_over_targets_and_over_classes():
    rows = [row(1.0, "a", 3), row(0.0, "b", 3), row(0.5, "c", 4), row(float("nan"), "d", 4)]
    (found,) = evaluation.summarise(rows)
    assert found.mean == pytest.approx(0.5)
    assert (found.count, found.groups, found.undefined, found.chance) == (3, 3, 1, 0.25)
    (found,) = evaluation.summarise([row(1.0, "a", 3), row(1.0, "b", 3), row(0.0, "c", 4)], per="class")
    assert found.mean == pytest.approx(0.5)
    with pytest.raises(ValueError, match="`per` must be 'target' or 'class'"):
        evaluation.summarise(rows, per="image")


def test_intervals_are_of_groups():
    draw = np.random.default_rng(0)
    levels = draw.normal(size=40)
    clustered = [row(level, f"g{i}") for i, level in enumerate(levels) for _ in range(25)]
    (found,) = evaluation.summarise(clustered, samples=4000)
    spread = levels.std() / math.sqrt(len(levels))  # of a mean of 40, not of 1000
    assert (found.high - found.low) == pytest.approx(2 * 1.96 * spread, rel=0.1)
    alone = [{**r, "group": str(i)} for i, r in enumerate(clustered)]
    (narrow,) = evaluation.summarise(alone, samples=4000)
    assert (narrow.high - narrow.low) == pytest.approx(2 * 1.96 * spread / 5, rel=0.1)
    (one,) = evaluation.summarise([row(0.2), row(0.4)])
    assert one.low == one.mean == one.high
    assert evaluation.summarise(clustered) == evaluation.summarise(clustered)


def test_markdown_and_figure():
    pytest.importorskip("matplotlib")
    rows = [row(v, str(i), method=name) for name, v in (("low", 0.2), ("high", 0.9)) for i in range(3)]
    rows.append(row(float("nan"), method="none"))
    columns = {"energy": evaluation.summarise(rows), "other": evaluation.summarise(rows[:3])}
    lines = evaluation.markdown(columns).splitlines()
    assert lines[0] == "| method | energy | other |"
    assert lines[2:] == ["| high | 0.90 (0.90 to 0.90) | – |", "| low | 0.20 (0.20 to 0.20) | 0.20 (0.20 to 0.20) |",
                         "| none | – | – |"]  # fmt: skip
    drawn = evaluation.figure(columns)
    left, right = drawn.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["high", "low", "none"]
    assert left.lines[0].get_xdata().tolist() == pytest.approx([0.9, 0.2])
    assert left.get_ylim()[0] > left.get_ylim()[1]  # the best one on top
    alone = evaluation.markdown({"energy": evaluation.summarise([row(0.5)])}, notes={"why": {"m": "so"}})
    assert alone.splitlines()[2] == "| m | 0.50 | so |"  # one group has no interval
    lower = evaluation.summarise([row(v, method=n, metric="deletion") for n, v in (("a", 0.5), ("b", 0.1))])
    assert evaluation.markdown({"deletion": lower}).splitlines()[2].startswith("| b |")  # less is better


# -- methods and the command -------------------------------------------------------------------------------------------


def test_every_public_method_is_judged_or_said_to_be_left_out():
    table = evaluation.entries([corner()], methods.SMALL, steps=2, samples=8, side=2)
    judged = {name for name in table if "control" not in name}
    public = set(command.public_methods()) | {"attention_rollout", "attention_weights"}
    assert judged | set(methods.LEFT_OUT) == public
    assert not judged & set(methods.LEFT_OUT)
    assert set(methods.BUDGETS) <= judged


def test_controls_do_not_look():
    model, x = network(), corner().x[None]
    for control in (methods.centre, methods.random_map, methods.edges):
        one = control(pullback.params_of(model), model, x, 0)
        assert one.shape == (1, 1, 4, 4)
        assert torch.equal(one, control({}, None, x, 1))
    assert methods.centre({}, None, torch.zeros(1, 3, 5, 7), 0)[0, 0].argmax() == 2 * 7 + 3


SOME = "gradient,lrp,grad_cam,cam,rise,edges (control)"
ALL = ",".join(evaluation.entries([corner()], methods.SMALL, steps=2, samples=8, side=2))


@pytest.mark.parametrize("chosen", [SOME, pytest.param(ALL, marks=pytest.mark.slow)])
def test_the_command_judges_and_goes_on(tmp_path, capsys, monkeypatch, chosen):
    pytest.importorskip("sklearn")
    line = ["digits", "--quick", "--out", str(tmp_path)]
    assert command.main([*line, "--method", chosen]) == 0
    out = tmp_path / "digits-quick"
    first = (out / "journal.jsonl").read_text()
    with (out / "results.csv").open() as handle:
        judged = {r["method"] for r in csv.DictReader(handle)}
    assert judged == set(chosen.split(","))
    assert (out / "summary.png").stat().st_size > 10_000
    assert "| method | energy | pointing | rank |" in capsys.readouterr().out
    monkeypatch.setattr(runner, "_unit", None)  # nothing is left to do
    assert command.main([*line, "--method", "gradient,lrp"]) == 0
    assert (out / "journal.jsonl").read_text() == first
    assert command.main([*line, "--method", "gradeint"]) == 2
    assert "unknown method 'gradeint'; close to it: gradient" in capsys.readouterr().err


def test_the_command_on_local_data(voc_root, capsys):
    out = voc_root / "out"
    line = ["voc", str(voc_root), "--model", "judged:make", "--side", "16", "--layer", "0", "--out", str(out)]
    (voc_root / "judged.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    pool = nn.AdaptiveAvgPool2d(1)\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(4, 20))\n"
    )
    sys.path.insert(0, str(voc_root))
    try:
        assert command.main(line) == 0
        assert command.main([*line, "--difficult", "--listed", str(voc_root / "none.txt")]) == 2
    finally:
        sys.path.remove(str(voc_root))
        sys.modules.pop("judged", None)
    said = capsys.readouterr()
    assert "No list of difficult classes" in said.err
    rows = runner.read_table(out / "voc" / "results.csv")
    assert {(r["example"], r["target"]) for r in rows} >= {("000001", 11), ("000002", 2), ("000003", 11)}
    assert {r["method"] for r in rows} == {"gradient", "grad_cam"}
    assert {r["metric_options"] for r in rows} == {"tolerance=15.0", ""}


def test_the_tables_of_the_pages(tmp_path):
    model, found = network(), [corner(str(k), seed=k) for k in range(3)]
    table = {"gradient": Entry(pullback.gradient), "edges (control)": Entry(methods.edges)}
    for name, chosen in (("mosaics", command.INSIDE), ("digits", command.ON_INK), ("tiles", command.REDRAWN)):
        rows = evaluation.run(model, found, table, chosen, out=tmp_path / name, dataset=name)
        evaluation.write_table(rows, tmp_path / name / "results.csv")
    file = tmp_path / "results.md"
    file.write_text("before\n<!-- measured -->\nold\n<!-- /measured -->\nafter\n")
    assert command.main(["tables", str(file), "--out", str(tmp_path)]) == 0
    text = file.read_text()
    assert text.startswith("before\n<!-- measured -->\n| method |")
    assert text.endswith("<!-- /measured -->\nafter\n")
    assert "old" not in text
    assert "\n| `gradient` |" in text
    assert "1.00 (1.00 to 1.00) | 6 / 6 / 6 |" in text.split("edges (control)")[1].splitlines()[0]  # blind to weights
    (tmp_path / "none.md").write_text("")
    with pytest.raises(Problem, match="no lines <!-- measured -->"):
        command.tables(command.parser().parse_args(["tables", str(tmp_path / "none.md")]))
    file.write_text("<!-- agreement -->\n\n<!-- /agreement -->\n")
    assert command.main(["tables", str(file), "--out", str(tmp_path)]) == 0
    assert "| gradient | 76.3 | 72.3 |" in file.read_text()
    assert command._likeness([1.0, 2.0, 2.0, 5.0], [0.1, 0.3, 0.3, 0.4]) == pytest.approx(1)
    assert command._likeness([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    with pytest.raises(Problem, match="holds no results"):
        command.measured(tmp_path / "nowhere")


def test_the_library_does_not_import_the_benchmark():
    code = "import sys, pullback; sys.exit(any(n.startswith('pullback.evaluation') for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    code = (
        "import sys, pullback.evaluation; "
        "sys.exit(any(n in sys.modules for n in ('matplotlib', 'PIL', 'sklearn', 'skimage', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- Quantus' calls, without Quantus -----------------------------------------------------------------------------------


def test_explaining_for_quantus():
    model, x = network(), np.random.default_rng(0).standard_normal((4, 3, 4, 4))
    targets = np.array([0, 1, 2, 0])
    params = pullback.params_of(model)
    explain = evaluation.quantus_explain(pullback.gradient)
    found = explain(model=model, inputs=x, targets=targets, device="cpu", xai_lib="ignored")
    expected = pullback.gradient(params, model, torch.from_numpy(x).float(), torch.from_numpy(targets))
    assert isinstance(found, np.ndarray)
    assert found.dtype == x.dtype
    assert np.allclose(found, expected, atol=1e-6)
    assert np.allclose(explain(model, torch.from_numpy(x).float(), torch.from_numpy(targets)), expected, atol=1e-6)
    summed = evaluation.quantus_explain(pullback.gradient, reduce=pullback.maps.channel_sum)(model, x, targets)
    assert summed.shape == (4, 1, 4, 4)
    convolution = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    grown = evaluation.quantus_explain(pullback.grad_cam, layer="1")(convolution, x, targets)
    assert grown.shape == (4, 1, 4, 4)  # of the input's size
    with pytest.raises(TypeError, match="`method` must be a function"):
        evaluation.quantus_explain("gradient")
    with pytest.raises(TypeError, match="one tensor for Quantus, got tuple"):
        evaluation.quantus_explain(lambda *a: a)(model, x, targets)


def test_annotations_name_twenty_classes():
    assert len(annotations.VOC_CLASSES) == 20
