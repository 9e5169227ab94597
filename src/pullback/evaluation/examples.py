"""What methods are judged on: inputs, the classes to explain, and where each class is.

- `mosaics`: four photographs in one image. The class of each tile is to be explained, and belongs in its tile.
- `digits`: a handwritten digit on a noisy canvas, with a small network trained on the spot. The ink is the exact truth.
- `masked_folder`: photographs in a folder for each class, and their masks in a parallel folder.

`pullback.evaluation.voc` and `coco` read the data sets of the pointing game. Nothing is ever downloaded.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pullback._networks.messages import needed
from pullback._networks.models import Preprocessing, class_names
from pullback._networks.photographs import FORMATS


@dataclass(frozen=True)
class Example:
    """An input, the classes to explain in it, and where each of them is.

    Args:
        name: Tells it from the others of its data set.
        x: The input, without a batch axis: ``[channel height width]``.
        targets: Classes, ``[target]``, each once.
        masks: Where they are, ``[target height width]``, bool. Maps are resized to this size, which may be that of the
            photograph before it was fitted to the model.
        groups: What each target is of, such as the photograph. Targets of one group are drawn together by the
            bootstrap. `name` if omitted.

    Raises:
        ValueError: If shapes do not fit, a class is named twice, or a mask is empty.
    """

    name: str
    x: Tensor
    targets: Tensor
    masks: Tensor
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.targets) if self.targets.ndim == 1 else 0
        if not count or self.targets.is_floating_point() or len(self.targets.unique()) < count:
            raise ValueError(
                f"`targets` of example {self.name!r} must be class indices [target], each once, "
                f"got {self.targets.tolist()}."
            )
        if self.x.ndim != 3 or self.masks.ndim != 3 or len(self.masks) != count or self.masks.dtype != torch.bool:
            raise ValueError(
                f"Example {self.name!r} must have `x` [channel height width] and a bool mask [height width] for each "
                f"of its {count} targets, got {list(self.x.shape)} and {list(self.masks.shape)} of {self.masks.dtype}."
            )
        empty = [int(t) for t, mask in zip(self.targets, self.masks, strict=True) if not mask.any()]
        if empty:
            raise ValueError(f"`masks` of example {self.name!r}: class {empty[0]} has an empty mask; leave it out.")
        if not self.groups:
            object.__setattr__(self, "groups", (self.name,) * count)
        if len(self.groups) != count:
            raise ValueError(f"`groups` of example {self.name!r} must name one for each of {count} targets.")


class Lazy(Sequence[Example]):
    """Examples that are made when they are looked at."""

    def __init__(self, makers: Sequence[Callable[[], Example]]) -> None:
        self.makers = makers

    def __len__(self) -> int:
        return len(self.makers)

    def __getitem__(self, index: Any) -> Any:
        return Lazy(self.makers[index]) if isinstance(index, slice) else self.makers[index]()


# -- mosaics -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Photograph:
    """A photograph ``[height width 3]``, uint8, and the classes that are right for it."""

    name: str
    pixels: np.ndarray
    classes: tuple[int, ...]


def photographs(folder: str | Path | None = None) -> list[Photograph]:
    """Read the photographs that come with scikit-image, scikit-learn and matplotlib, or those of a folder.

    The packages hold seven that show one of ImageNet's 1000 classes.

    Args:
        folder: With a folder for each class, named by its index or by its ImageNet name. The packages' if omitted.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the name of a folder is no class.
    """
    if folder is not None:
        return [Photograph(str(file), pixels_of(file), (label,)) for file, label in labelled(folder, imagenet_index)]
    skimage, sklearn, matplotlib = needed("judge", "skimage", "sklearn", "matplotlib")
    images, flowers = Path(skimage.data_dir), Path(sklearn.__file__).parent / "datasets" / "images"
    found = {
        "chelsea": (images / "chelsea.png", (282, 285)),  # a cat, tabby or Egyptian
        "coffee": (images / "coffee.png", (967,)),
        "motorcycle": (images / "motorcycle_left.png", (665,)),
        "camera": (images / "camera.png", (872,)),  # on its tripod
        "rocket": (images / "rocket.jpg", (657,)),
        "china": (flowers / "china.jpg", (698,)),  # a palace
        "hopper": (Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg", (652,)),  # her uniform
    }
    return [Photograph(name, pixels_of(file), classes) for name, (file, classes) in found.items()]


def pixels_of(file: Path) -> np.ndarray:
    """Read an image as ``[height width 3]``, uint8."""
    (image,) = needed("cli", "PIL.Image")
    with image.open(file) as opened:
        return np.array(opened.convert("RGB"))


def labelled(folder: str | Path, index: Callable[[str], int]) -> list[tuple[Path, int]]:
    """List the images of a folder with a folder for each class."""
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"No folder `{root}`. Nothing is downloaded here: put the images there.")
    endings = {"." + name.lower() for name in FORMATS} | {".jpg", ".tif"}
    found = [
        (file, index(kind.name))
        for kind in sorted(root.iterdir())
        if kind.is_dir()
        for file in sorted(kind.rglob("*"))
        if file.suffix.lower() in endings
    ]
    if not found:
        raise ValueError(f"`{root}` must hold a folder of images for each class, got none.")
    return found


def imagenet_index(word: str) -> int:
    """Find a class of ImageNet by its index or one of its names."""
    names = class_names(None, 1000) or []
    wanted = word.replace("_", " ").lower()
    found = [i for i, own in enumerate(names) if wanted in (str(i), *(name.lower() for name in own))]
    if not found:
        raise ValueError(f"The name of a folder must be a class of ImageNet or its index, got {word!r}.")
    return found[0]


@dataclass(frozen=True)
class Tile:
    """A crop ``[channel side side]`` that the network classifies right and with confidence."""

    photograph: str
    x: Tensor
    target: int


def tiles(
    model: Callable[[Tensor], Tensor],
    sources: Sequence[Photograph],
    preprocessing: Preprocessing,
    *,
    side: int = 128,
    count: int = 6,
    least: float = 0.5,
    seed: int = 0,
    tries: int = 400,
) -> dict[str, list[Tile]]:
    """Cut crops out of photographs, and keep those that the network classifies right and with confidence.

    Crops are squares at random places, 0.45 to 1 of the shorter side, every other one mirrored. A photograph of which
    no crop passes is left out.

    Args:
        model: Gives scores ``[batch class]``.
        sources: See `photographs`.
        preprocessing: What the model expects of pixels; its size is not used.
        side: Of a tile, in pixels.
        count: Tiles to keep of a photograph.
        least: Probability of the right class.
        seed: Of the crops.
        tries: Crops of a photograph to look at, at most.

    Returns:
        Tiles by the name of their photograph.
    """
    (image,) = needed("cli", "PIL.Image")
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    kept: dict[str, list[Tile]] = {}
    for number, source in enumerate(sources):
        draw, opened = np.random.default_rng([seed, number]), image.fromarray(source.pixels)
        for trial in range(tries):
            length = min(opened.size) * draw.uniform(0.45, 1)
            left, top = (draw.uniform(0, extent - length) for extent in opened.size)
            cut = opened.resize((side, side), image.Resampling.BILINEAR, box=(left, top, left + length, top + length))
            pixels = np.array(cut)[:, ::-1] if trial % 2 else np.array(cut)
            x = (torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255 - mean) / std
            with torch.no_grad():
                probability, best = model(x[None]).softmax(1)[0].max(0)
            if int(best) in source.classes and probability >= least:
                kept.setdefault(source.name, []).append(Tile(source.name, x, int(best)))
                if len(kept[source.name]) == count:
                    break
    return kept


def mosaics(cut: dict[str, list[Tile]], *, count: int = 14, seed: int = 0) -> list[Example]:
    """Lay tiles of four photographs, of four classes, out as one image: the grid pointing game.

    Every class of a mosaic is a target, and its mask is its tile. Each round of as many mosaics as there are
    photographs shows every photograph four times, once at each place of the grid.

    Args:
        cut: See `tiles`.
        count: Number of mosaics.
        seed: Of which photographs meet.

    Returns:
        Examples of twice the tiles' side. Groups are photographs.

    Raises:
        ValueError: If there are not four photographs of four classes.

    Example:
        >>> cut = {name: [Tile(name, torch.full((1, 2, 2), float(k)), k)] for k, name in enumerate("abcde")}
        >>> example = mosaics(cut, count=1)[0]
        >>> means = [example.x[0][mask].mean() for mask in example.masks]
        >>> [int(mean) for mean in means] == example.targets.tolist()
        True

    Reference:
        Böhle, Fritz & Schiele, Convolutional Dynamic Alignment Networks for Interpretable Classifications, 2021.
    """
    names = list(cut)
    kinds = [{tile.target for tile in cut[name]} for name in names]
    if len(names) < 4 or len(set().union(*kinds)) < 4:
        raise ValueError(f"A mosaic needs four photographs of four classes, got {names}.")
    draw, used, found = np.random.default_rng(seed), dict.fromkeys(names, 0), []
    while len(found) < count:
        order, steps = draw.permutation(len(names)), draw.permutation(len(names))[:4]
        for start in range(len(names)):
            chosen = [names[order[(start + step) % len(names)]] for step in steps]
            four = [cut[name][used[name] % len(cut[name])] for name in chosen]
            if len({tile.target for tile in four}) < 4:
                continue
            for name in chosen:
                used[name] += 1
            found.append(_mosaic(f"mosaic {len(found)}", four))
    return found[:count]


def _mosaic(name: str, four: Sequence[Tile]) -> Example:
    rows = [torch.cat([tile.x for tile in pair], 2) for pair in (four[:2], four[2:])]
    x, side = torch.cat(rows, 1), four[0].x.shape[-1]
    masks = torch.zeros(4, 2 * side, 2 * side, dtype=torch.bool)
    for place, mask in enumerate(masks):
        row, column = divmod(place, 2)
        mask[row * side : (row + 1) * side, column * side : (column + 1) * side] = True
    targets = torch.tensor([tile.target for tile in four])
    return Example(name, x, targets, masks, tuple(tile.photograph for tile in four))


def single(cut: dict[str, list[Tile]]) -> list[Example]:
    """Take the first tile of each photograph alone, with a mask that is everywhere: for metrics that need no mask."""
    return [
        Example(name, own[0].x, torch.tensor([own[0].target]), torch.ones(1, *own[0].x.shape[1:], dtype=torch.bool))
        for name, own in cut.items()
    ]


# -- digits ------------------------------------------------------------------------------------------------------------

CANVAS, NOISE = 32, 0.5


def digits(*, count: int = 100, epochs: int = 14, seed: int = 0) -> tuple[nn.Module, list[Example]]:
    """Train a small network on handwritten digits on noisy canvases, and give digits that it has not seen.

    scikit-learn's 8 x 8 digits, twice as large, lie at random places of a 32 x 32 canvas of uniform noise. The mask of
    an example is the ink: every pixel that the digit has touched. The network has three convolutions, ``relu3`` the
    last layer with positions, and a linear ``head`` over the mean of it. A quarter of the digits is kept for judging;
    examples are those of them that the network gets right. Neither the global random state nor the number of threads
    stays moved.

    Args:
        count: Number of examples, at most.
        epochs: Passes over the digits in training, less than a second each.
        seed: Of weights, places, noise and order.

    Returns:
        The network in eval mode, with ``accuracy`` on the digits kept for judging, and the examples.
    """
    (datasets,) = needed("judge", "sklearn.datasets")
    found = datasets.load_digits()
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(found.images))
    images, labels = found.images[order] / 16, torch.from_numpy(found.target[order])
    kept = len(order) // 4
    test, ink = _canvases(images[:kept], draw)
    model = _trained(images[kept:], labels[kept:], draw, epochs, seed)
    with torch.no_grad():
        right = model(test).argmax(1) == labels[:kept]
    model.accuracy = float(right.float().mean())  # pyright: ignore[reportArgumentType]
    chosen = right.nonzero()[:, 0].tolist()[:count]
    return model, [
        Example(f"digit {order[i]}", test[i], labels[i, None], ink[i, None], (f"digit {order[i]}",)) for i in chosen
    ]


def _canvases(images: np.ndarray, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Lay digits ``[batch 8 8]`` on noise: canvases ``[batch 1 side side]``, and where ink is."""
    large = images.repeat(2, 1).repeat(2, 2)
    side = large.shape[1]
    mask_axes, ink = draw.uniform(0, NOISE, (len(large), CANVAS, CANVAS)), np.zeros((len(large), CANVAS, CANVAS), bool)
    for digit, below, touched in zip(large, mask_axes, ink, strict=True):
        top, left = draw.integers(0, CANVAS - side + 1, 2)
        place = slice(top, top + side), slice(left, left + side)
        below[place] = digit + (1 - digit) * below[place]
        touched[place] = digit > 0
    return torch.from_numpy(mask_axes).float()[:, None], torch.from_numpy(ink)


def _trained(images: np.ndarray, labels: Tensor, draw: np.random.Generator, epochs: int, seed: int) -> nn.Module:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # how sums are split over threads changes weights in their last bits
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            model = _small_network()
            optimizer = torch.optim.Adam(model.parameters(), 3e-3)
            batches = 1 + len(images) // 64
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * batches)
            for _ in range(epochs):
                x, _ = _canvases(images, draw)
                for rows in torch.from_numpy(draw.permutation(len(images))).tensor_split(batches):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(x[rows]), labels[rows]).backward()
                    optimizer.step()
                    schedule.step()
    finally:
        torch.set_num_threads(threads)
    return model.eval().requires_grad_(False)


def _small_network() -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    widths = (1, 16, 32, 64)
    for n, (before, after) in enumerate(itertools.pairwise(widths), start=1):
        layers[f"conv{n}"] = nn.Conv2d(before, after, 3, stride=1 if n == 1 else 2, padding=1, bias=False)
        layers[f"norm{n}"] = nn.BatchNorm2d(after)
        layers[f"relu{n}"] = nn.ReLU()
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(widths[-1], 10)}
    return nn.Sequential(layers)


# -- folders -----------------------------------------------------------------------------------------------------------


def masked_folder(
    images: str | Path,
    masks: str | Path,
    prepare: Callable[[np.ndarray], Tensor],
    *,
    index: Callable[[str], int] | Sequence[str] = imagenet_index,
) -> Lazy:
    """Read photographs in a folder for each class, ``IMAGES/CLASS/NAME.jpg``, with masks in ``MASKS/CLASS/NAME.png``.

    A mask is any image of the photograph's size; what is not 0 is the object. Its file may have another ending.

    Args:
        images, masks: The two folders.
        prepare: From pixels ``[height width 3]``, uint8, to the model's input ``[channel height width]``.
        index: From the name of a folder to its class: a function, or the names of all classes in order. If omitted,
            folders are named as classes of ImageNet, or by index.

    Raises:
        FileNotFoundError: If a folder, or the mask of a photograph, is not there.
        ValueError: If the name of a folder is no class, or, once it is read, a mask is empty or of another size.
    """
    names = None if callable(index) else list(index)

    def of(word: str) -> int:
        if names is None:
            return index(word)  # pyright: ignore[reportCallIssue]
        if word not in names:
            raise ValueError(f"`index` has no class {word!r}, which is a folder in `{images}`.")
        return names.index(word)

    makers = []
    for file, label in labelled(images, of):
        beside = Path(masks) / file.relative_to(images)
        found = sorted(beside.parent.glob(beside.stem + ".*"))
        if not found:
            raise FileNotFoundError(f"No mask `{beside.with_suffix('.png')}` for `{file}`.")
        makers.append(_masked(file, found[0], label, str(file.relative_to(images)), prepare))
    return Lazy(makers)


def _masked(
    file: Path, mask: Path, label: int, name: str, prepare: Callable[[np.ndarray], Tensor]
) -> Callable[[], Example]:
    def make() -> Example:
        pixels, covered = pixels_of(file), pixels_of(mask).any(2)
        if pixels.shape[:2] != covered.shape:
            raise ValueError(
                f"The mask `{mask}` must have the size of its photograph, {pixels.shape[:2]}, got {covered.shape}."
            )
        return Example(name, prepare(pixels), torch.tensor([label]), torch.from_numpy(covered)[None])

    return make


def first(examples: Sequence[Example], count: int | None) -> Iterable[Example]:
    """The first so many examples, one at a time."""
    for i in range(len(examples) if count is None else min(count, len(examples))):
        yield examples[i]
