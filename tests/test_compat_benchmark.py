"""Utilities and benchmark of the TorchRay dialect: images, data sets on disk, networks, the pointing game."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pullback import PullbackWarning
from pullback.compat.torchray import benchmark, utils
from pullback.compat.torchray.attribution.grad_cam import grad_cam
from pullback.compat.torchray.benchmark import datasets, models
from pullback.compat.torchray.benchmark import logging as results
from pullback.compat.torchray.benchmark.pointing_game import PointingGame, PointingGameBenchmark
from pullback.compat.torchray.benchmark.server import run_server

Image = pytest.importorskip("PIL.Image")

# -- images


def test_smoothing():
    x = torch.arange(25.0).reshape(1, 1, 5, 5)
    assert utils.imsmooth(x, 1.0)[0, 0, 0, :3].tolist() == pytest.approx([1.526742, 2.455419, 3.188483], abs=1e-5)
    replicated = utils.imsmooth(x, 1.0, padding_mode="replicate")
    assert replicated[0, 0, 0, :3].tolist() == pytest.approx([2.182708, 2.882046, 3.818923], abs=1e-5)
    assert float(utils.imsmooth(x, 0.5, padding_mode="replicate")[0, 0, 0, 0]) == pytest.approx(0.641871, abs=1e-5)
    assert torch.equal(utils.imsmooth(x, 0), x)
    assert utils.imsmooth(x, 1.0, padding=1).shape[2:] == (9, 9)
    assert utils.imsmooth(x, 1.0, padding=1, padding_mode="replicate").shape[2:] == (7, 7)
    assert torch.allclose(utils.imsmooth(x, 1.0, padding=1)[:, :, 2:-2, 2:-2], utils.imsmooth(x, 1.0), atol=1e-5)
    assert utils.imsmooth(x, 1.0, stride=2).shape[2:] == (3, 3)
    assert torch.allclose(utils.imsmooth(x * 0 + 2, 1.0, padding_value=2), x * 0 + 2)
    for dtype in (torch.float64, torch.float16):  # TorchRay takes float32 alone
        found = utils.imsmooth(x.to(dtype), 1.0, padding_mode="replicate")
        assert found.dtype == dtype
        assert torch.allclose(found.float(), replicated, rtol=1e-2 if dtype == torch.float16 else 1e-5)
    with pytest.raises(ValueError, match="`sigma` must be at least 0"):
        utils.imsmooth(x, -1)


def test_resampling():
    x = torch.rand(2, 3, 5, 7)
    assert torch.equal(utils.resample(x, (5, 7), [[1, 0], [1, 0]]), x)
    moved = utils.resample(x, (5, 7), torch.tensor([[1.0, 2.0], [1.0, -1.0]]))  # 2 to the right, 1 up
    assert torch.allclose(moved[:, :, :-1, 2:], x[:, :, 1:, :-2], atol=1e-6)
    assert moved[:, :, -1].abs().max() == 0
    doubled = utils.resample(x, (10, 14), [[2, 0], [2, 0]])
    expected = F.interpolate(x, (10, 14), mode="bilinear", align_corners=False)
    assert torch.allclose(doubled[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], atol=1e-6)
    each = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 2.0], [1.0, -1.0]]])
    assert torch.allclose(utils.resample(x, (5, 7), each)[1], moved[1], atol=1e-6)


def test_images_and_tensors(tmp_path, monkeypatch):
    pixels = (np.arange(4 * 6 * 3).reshape(4, 6, 3) * 3).astype(np.uint8)
    image = Image.fromarray(pixels)
    tensor = utils.pil_to_tensor(image)
    assert torch.equal(tensor, torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    assert utils.pil_to_tensor(image.convert("L")).shape == (1, 4, 6)
    assert np.allclose(utils.im_to_numpy(tensor), pixels / 255)
    assert utils.im_to_numpy(torch.rand(1, 1, 4, 6)).shape == (4, 6, 3)
    with pytest.raises(ValueError, match="one image of 1 or 3 channels"):
        utils.im_to_numpy(torch.rand(2, 3, 4, 6))
    batch = torch.rand(2, 3, 4, 5)
    assert torch.equal(utils.tensor_to_im(batch)[4, 0], batch[1, 1])

    file = tmp_path / "image.png"
    image.save(file)
    assert torch.equal(utils.imread(file), tensor)
    assert utils.imread(str(file), as_pil=True).size == (6, 4)
    assert utils.imread(file, resize=8).shape == (3, 8, 12)  # the shorter side, on today's Pillow
    assert utils.imread(file, resize=(3, 2)).shape == (3, 2, 3)
    image.convert("L").save(file)
    assert utils.imread(file, to_rgb=True).shape == (3, 4, 6)
    monkeypatch.setattr(utils.urllib.request, "urlopen", lambda url: file.open("rb"))
    assert torch.equal(utils.imread("https://example.org/image.png"), utils.imread(file))


def test_pictures():
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    x = torch.linspace(-3, 5, 48).reshape(1, 3, 4, 4)
    scaled, handle = utils.imsc(x, quiet=True)
    assert handle is None
    assert torch.allclose(scaled, (x + 3) / 8)
    assert torch.equal(utils.imsc(x * 0 + 2, quiet=True)[0], x * 0)  # constant: no 0 / 0
    assert torch.allclose(utils.imsc(x, quiet=True, lim=[0, 1])[0], x.clamp(0, 1))
    scaled, handle = utils.imsc(x[:, :1], cmap="gray")
    assert handle.get_array().shape == (4, 4, 3)
    mosaic, handle = utils.imarraysc(torch.rand(5, 3, 4, 6), spacing=1)
    assert mosaic.shape == (1, 3, 2 * 5 - 1, 3 * 7 - 1)
    assert handle is not None
    assert utils.imarraysc(torch.rand(1, 3, 4, 6), quiet=True)[0].shape == (1, 3, 4, 6)
    plt.close("all")


def test_settings_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    utils.get_config.cache_clear()
    assert set(utils.get_config()) == {"mongo", "benchmark"}
    utils.get_config.cache_clear()
    Path(".torchrayrc").write_text(json.dumps({"benchmark": {"voc_dir": "/somewhere"}}))
    assert utils.get_config()["benchmark"]["voc_dir"] == "/somewhere"
    for wrong, match in (({"bench": {}}, "no section `bench`"), ({"mongo": {"host": 1}}, "no `host` in `mongo`")):
        utils.get_config.cache_clear()
        Path(".torchrayrc").write_text(json.dumps(wrong))
        with pytest.raises(AssertionError, match=match):
            utils.get_config()
    utils.get_config.cache_clear()
    utils.xmkdir(tmp_path / "a" / "b")
    utils.xmkdir(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert utils.get_device(None) == torch.device("cpu")
    assert utils.is_url("https://example.org/cat.png")
    assert not any(map(utils.is_url, ("cat.png", "/a/cat.png", tmp_path, None, 3)))
    assert utils.SQRT_TWO_DOUBLE.dtype == torch.float32
    assert float(utils.EPSILON_DOUBLE) == np.finfo(np.float64).eps
    assert float(utils.EPSILON_SINGLE) == np.finfo(np.float32).eps
    assert float(utils.SQRT_TWO_SINGLE) == pytest.approx(2**0.5)


# -- labels and data sets

VOC_LABEL = """<annotation><filename>000012.jpg</filename><size><width>12</width><height>9</height></size>
<object><name>dog</name><difficult>0</difficult><bndbox><xmin>2</xmin><ymin>1</ymin><xmax>4</xmax><ymax>3</ymax></bndbox></object>
<object><name>dog</name><difficult>1</difficult><bndbox><xmin>10</xmin><ymin>8</ymin><xmax>12</xmax><ymax>9</ymax></bndbox></object>
<object><name>cat</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>1</xmax><ymax>1</ymax></bndbox></object>
</annotation>"""


@pytest.fixture
def voc(tmp_path):
    folder = tmp_path / "VOCdevkit" / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for name in ("000012", "000013"):
        Image.new("RGB", (12, 9), "red").save(folder / "JPEGImages" / f"{name}.jpg")
        (folder / "Annotations" / f"{name}.xml").write_text(VOC_LABEL)
    (folder / "ImageSets/Main/test.txt").write_text("000012\n000013\n")
    return tmp_path


def test_voc(voc):
    data = datasets.get_dataset("voc_2007", "test", voc, transform=models.get_transform("voc", size=9))
    assert isinstance(data, datasets.VOCDetection)
    assert len(data) == 2
    assert len(datasets.VOCDetection(voc, "2007", "test", limiter=1)) == 1
    image, label = data[0]
    assert image.shape == (3, 9, 12)
    dog, cat = datasets.VOC_CLASSES.index("dog"), datasets.VOC_CLASSES.index("cat")
    assert data.as_class_ids(label) == sorted([dog, cat])
    assert data.as_image_size(label) == (12, 9)
    assert data.as_image_name(label) == "000012"
    mask = data.as_mask(label, dog)
    expected = torch.zeros(9, 12, dtype=torch.bool)
    expected[0:3, 1:4] = expected[7:9, 9:12] = True  # boxes from 1, ends included
    assert torch.equal(mask, expected)
    assert not data.as_mask(label, 0).any()
    images, labels = data.collate([data[0], data[1]])
    assert images.shape == (2, 3, 9, 12)
    assert labels[1] == label
    assert data.get_image_url(1).endswith("000013.jpg")
    with pytest.raises(FileNotFoundError, match=r"train\.txt"):
        datasets.VOCDetection(voc, "2007", "train")
    with pytest.raises(AssertionError, match="`download` must be False"):
        datasets.get_dataset("voc_2012", "test", voc, download=True)


def test_coco(tmp_path):
    (tmp_path / "val2014").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "val2014" / "one.jpg")
    runs = [6 * 7, 3, 3]  # down the columns: the top half of the last one
    objects = [
        {"image_id": 5, "category_id": 18, "segmentation": [[1, 1, 3, 1, 3, 4, 1, 4]], "bbox": [1, 1, 2, 3]},
        {"image_id": 5, "category_id": 18, "segmentation": {"counts": runs, "size": [6, 8]}, "iscrowd": 1},
        {"image_id": 5, "category_id": 90, "segmentation": [[5, 5, 6, 5, 6, 5]]},
    ]
    images = [{"id": 5, "file_name": "one.jpg", "width": 8, "height": 6}]
    file = tmp_path / "instances_val2014.json"
    file.write_text(json.dumps({"images": images, "annotations": objects}))
    data = datasets.get_dataset("coco", "val2014", tmp_path, tmp_path)
    assert isinstance(data, datasets.CocoDetection)
    _, label = data[0]
    dog = datasets.COCO_CLASSES.index("dog")
    assert data.as_class_ids(label) == [dog, 79]
    assert datasets.COCO_CLASSES[79] == "toothbrush"
    assert data.as_image_size(label) == (8, 6)
    assert data.as_image_name(label) == "one.jpg"
    mask = data.as_mask(label, dog)
    assert mask.dtype == torch.bool
    assert mask[1:5, 1:4].all()
    assert mask[:3, 7].all()
    assert int(mask.sum()) == 12 + 3
    assert not data.as_mask(label, 0).any()  # TorchRay fails here
    assert data.as_mask([], dog) is None
    with pytest.raises(AssertionError, match="`label` is empty"):
        data.as_image_size([])


def test_runs_in_characters():
    """COCO's own encoding: lengths of 5 bits a character, differences from the third on."""

    def encoded(runs):
        text = ""
        for i, n in enumerate(runs):
            x = n - runs[i - 2] if i > 2 else n
            while True:
                bits, x = x & 0x1F, x >> 5
                more = x != (-1 if bits & 0x10 else 0)
                text += chr(48 + (bits | 0x20 if more else bits))
                if not more:
                    break
        return text

    for runs in ([5, 3, 40], [0, 1000, 2, 70, 31, 33, 1, 90], [16, 32, 15, 31]):
        assert datasets._runs(encoded(runs)) == runs
        assert datasets._runs(encoded(runs).encode()) == runs


def test_image_folder(tmp_path):
    for name, count in (("cat", 3), ("dog", 1)):
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4)).save(tmp_path / "val" / name / f"{i}.png")
    data = datasets.get_dataset("imagenet", "val", tmp_path, transform=models.get_transform(size=None))
    assert [label for _, label in data] == [0, 0, 0, 1]
    few = datasets.ImageFolder(tmp_path / "val", limiter=3, full_classes=["ant", "cat", "dog"])
    assert [label for _, label in few] == [1, 2, 1]  # in turn
    assert few.selection == [0, 3, 1]
    with pytest.raises(ValueError, match="`full_classes` misses 'cat'"):
        datasets.ImageFolder(tmp_path / "val", full_classes=["dog"])
    with pytest.raises(FileNotFoundError, match="Nothing is downloaded"):
        datasets.ImageFolder(tmp_path / "train")
    with pytest.raises(ValueError, match="`name` must be"):
        datasets.get_dataset("cifar", "val")


def test_class_names():
    assert (len(datasets.IMAGENET_CLASSES), len(datasets.VOC_CLASSES), len(datasets.COCO_CLASSES)) == (1000, 20, 80)
    assert all(name.endswith("\n") for name in datasets.IMAGENET_CLASSES)


# -- networks


def test_example_data(tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("efficientnet_lite_pytorch")
    model, x, first, second = benchmark.get_example_data()
    assert x.shape == (1, 3, 224, 224)
    best = model(x)[0].topk(2).indices.tolist()
    assert set(best) == {first, second}
    map = grad_cam(model, x, first, saliency_layer="_conv_head", resize=True)
    file = tmp_path / "figure.png"
    benchmark.plot_example(x, map, "Grad-CAM", first, save_path=file)
    assert file.stat().st_size > 10_000
    with Image.open(file) as picture:
        assert picture.size[0] > picture.size[1]  # input and map side by side


def test_example_data_of_a_named_network(monkeypatch, tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.warns(PullbackWarning, match=r"checkpoints/squeezenet1_1-\w+\.pth"):
        model, x, _, _ = benchmark.get_example_data(arch="squeezenet1_1", shape=64)
    assert x.shape == (1, 3, 64, 64)
    assert not model.training
    (tmp_path / "checkpoints").mkdir()
    state = {k: v + 1 for k, v in model.state_dict().items()}
    torch.save(state, tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, *_ = benchmark.get_example_data("squeezenet1_1", (64, 96))
    assert torch.equal(loaded.features[0].weight, state["features.0.weight"])


@pytest.mark.filterwarnings("ignore:The network has random weights")
@pytest.mark.parametrize(
    ("arch", "layer"), [pytest.param("vgg11", "classifier.6", marks=pytest.mark.slow), ("resnet18", "fc")]
)
def test_networks(arch, layer):
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    plain = models.get_model(arch, "voc")
    torch.manual_seed(0)
    grid = models.get_model(arch, "voc", convert_to_fully_convolutional=True)
    assert not grid.training
    assert plain.get_submodule(layer).out_features == 20
    assert isinstance(grid.get_submodule(layer), nn.Conv2d)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(grid(x)[:, :, 0, 0], plain(x), atol=1e-4)
        assert grid(torch.randn(1, 3, 224, 256)).shape == (1, 20, 1, 2)


def test_a_classifier_of_linear_layers_as_convolutions():
    model = nn.Module()
    model.features, model.avgpool = nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(7)
    model.classifier = nn.Sequential(nn.Linear(98, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 3))
    grid = models._convolutional(model, "tiny").eval()
    x = torch.randn(2, 3, 7, 7)
    assert torch.allclose(grid(x).flatten(1), model.classifier.eval()(model.features(x).flatten(1)), atol=1e-5)
    assert [name for name, _ in grid.named_modules() if "." in name] == [f"classifier.{i}" for i in range(4)]
    assert grid(torch.randn(1, 3, 9, 8)).shape == (1, 3, 3, 2)


def test_what_cannot_be_had_says_so():
    pytest.importorskip("torchvision")
    with pytest.warns(PullbackWarning, match=r"resnet18_coco\.pth"):
        models.get_model("resnet18", "coco")
    with (
        pytest.warns(PullbackWarning, match="random weights"),
        pytest.raises(ValueError, match="`convert_to_fully_convolutional` must be False"),
    ):
        models.get_model("squeezenet1_0", "imagenet", True)
    with pytest.raises(ValueError, match="`dataset` must be one of"):
        models.get_model("vgg11", "cifar")
    with pytest.raises(ValueError, match="`arch` must end in a linear layer"):
        models.get_model("squeezenet1_0", "voc")


def test_transforms():
    image = Image.new("RGB", (20, 10), (255, 128, 0))
    x = models.get_transform("voc", 5)(image)
    assert x.shape == (3, 5, 10)
    assert torch.allclose(x[:, 0, 0], torch.tensor([255 - 123.68, 128 - 116.779, -103.939]), atol=1e-3)
    x = models.get_transform("imagenet", (8, 4))(image)
    assert x.shape == (3, 8, 4)
    assert torch.allclose(
        x[:, 0, 0],
        (torch.tensor([1, 128 / 255, 0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]),
    )


def test_replacing_a_module():
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(2, 3)))
    new = nn.Linear(2, 4)
    models.replace_module(model, "0.1", new)
    assert model(torch.ones(1, 2)).shape == (1, 4)
    with pytest.raises(ValueError, match=r"no module `1\.0`"):
        models.replace_module(model, "1.0", new)


# -- the pointing game


def test_pointing_game():
    game = PointingGame(3, tolerance=2)
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[4, 6] = True
    assert game.evaluate(mask, (6, 4)) == 1
    assert game.evaluate(mask, (4, 4)) == -1  # at a distance of the tolerance
    assert game.evaluate(mask, (5, 5)) == 1
    assert game.evaluate(mask & False, (5, 5)) == -1
    for hit, class_id in ((1, 0), (1, 0), (-1, 0), (-1, 1), (0, 1)):
        game.aggregate(hit, class_id)
    assert game.hits.dtype == torch.float64
    assert game.hits.tolist() == [2, 0, 0]
    assert game.misses.tolist() == [1, 1, 0]
    assert torch.allclose(game.class_accuracies, torch.tensor([2 / 3, 0, 0], dtype=torch.float64))
    assert float(game.accuracy) == pytest.approx(2 / 9)  # over all classes, also the one that was never seen
    assert "2 hits of 4" in str(game)
    game.reset()
    assert float(game.hits.sum()) == 0
    with pytest.raises(AssertionError, match="`hit` must be"):
        game.aggregate(2, 0)


def test_pointing_game_benchmark(voc):
    data = datasets.VOCDetection(voc, "2007", "test")
    dog, cat = datasets.VOC_CLASSES.index("dog"), datasets.VOC_CLASSES.index("cat")
    _, label = data[0]
    game = PointingGameBenchmark(data, tolerance=1)
    assert game.num_classes == 20
    assert game.evaluate(label, dog, (1, 0)) == 1
    assert game.evaluate(label, dog, (5, 5)) == -1
    assert game.evaluate(label, cat, (0, 0)) == 0  # all of its boxes are difficult
    with pytest.raises(FileNotFoundError, match=r"pointing_difficult\.txt"):
        PointingGameBenchmark(data, difficult=True)
    (voc / "pointing_difficult.txt").write_text(f"000012 {dog}\n")
    hard = PointingGameBenchmark(data, tolerance=1, difficult=True)
    assert hard.evaluate(label, dog, (1, 0)) == 1
    assert hard.evaluate(data[1][1], dog, (1, 0)) == 1  # its label names the same file
    assert hard.evaluate({"annotation": {**label["annotation"], "filename": "7.jpg"}}, dog, (1, 0)) == 0
    with pytest.raises(AssertionError, match="`dataset` must be"):
        PointingGameBenchmark([])


# -- results


def test_results_as_bytes_and_back():
    data = {"a": torch.rand(2, 3), "b": [np.arange(3), {"c": 1.5, "d": "text"}], "e": None}
    stored = results.data_to_mongo(data)
    assert isinstance(stored["a"]["__array__"], bytes)
    back = results.data_from_mongo(stored)
    assert torch.equal(back["a"], data["a"])
    assert np.array_equal(back["b"][0], data["b"][0])
    assert back["b"][1] == data["b"][1]

    class Collection(dict):
        def replace_one(self, key, value, upsert):
            self[key["_id"]] = value

        def find_one(self, key):
            return self.get(key["_id"])

    database = {"maps": Collection()}
    results.mongo_save(database, "maps", "one", data)
    assert torch.equal(results.mongo_load(database, "maps", "one")["a"], data["a"])
    assert results.mongo_load(database, "maps", "two") is None
    assert results.last_lines("a\nb\nc\n", 2) == "b\nc"
    assert results.last_lines("a", 0) == ""


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="No program `mongod`"):
        run_server()
    monkeypatch.setitem(__import__("sys").modules, "pymongo", None)
    with pytest.raises(ImportError, match="needs pymongo"):
        results.mongo_connect("maps")
