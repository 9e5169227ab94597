"""The pointing game's own data, where you have it: PASCAL VOC with its boxes, COCO with its segments.

TorchRay's protocol: each class in an image is a target; the mask is the union of its objects, at the size of the
photograph, and the peak may lie 15 pixels off. On VOC a class does not count where all its objects are marked
difficult. The *difficult* subset keeps classes that cover less than a quarter of an image with another class in it.
Accuracies are averaged over the images of each class, then over classes: ``summarise(rows, per="class")``.

    data = voc("VOCdevkit/VOC2007", fitted(preprocessing))
    rows = run(model, data, methods, {"pointing_game": {"tolerance": 15}}, out="out/voc", dataset="voc")

The readers need neither torchvision nor pycocotools.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback._networks.messages import needed
from pullback._networks.models import Preprocessing
from pullback.evaluation.examples import Example, Lazy, pixels_of

VOC_CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor".split()
)
SHARE = 0.25  # of the image, below which a class is difficult

Prepare = Callable[[np.ndarray], Tensor]


def fitted(preprocessing: Preprocessing, side: int = 224) -> Prepare:
    """Give the function that scales a photograph to a shorter side of `side` and normalises it. Nothing is cut."""

    def prepare(pixels: np.ndarray) -> Tensor:
        (image,) = needed("cli", "PIL.Image")
        height, width = pixels.shape[:2]
        scale = side / min(height, width)
        size = (round(width * scale), round(height * scale))
        resized = np.array(image.fromarray(pixels).resize(size, image.Resampling.BILINEAR))
        mean, std = (torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
        return (torch.from_numpy(resized).permute(2, 0, 1).float() / 255 - mean) / std

    return prepare


@dataclass(frozen=True)
class Label:
    """What is in an image: classes, each with the mask of its objects, and the sum of the objects' areas in pixels."""

    classes: tuple[int, ...]
    masks: tuple[np.ndarray, ...]
    areas: tuple[float, ...]
    hidden: tuple[int, ...] = ()  # classes in the image that do not count

    def chosen(self, difficult: bool, listed: Iterable[int] | None = None) -> list[int]:
        """Name the classes that count: all of them, or the difficult ones; those `listed`, where a list is given."""
        if not difficult:
            return list(self.classes)
        if listed is not None:
            return [c for c in self.classes if c in set(listed)]
        alone = len({*self.classes, *self.hidden}) < 2
        pairs = zip(self.classes, self.masks, self.areas, strict=True)
        return [] if alone else [c for c, mask, area in pairs if area < SHARE * mask.size]

    def example(self, name: str, x: Tensor, counting: Sequence[int]) -> Example:
        masks = torch.from_numpy(np.stack([self.masks[self.classes.index(c)] for c in counting]))
        return Example(name, x, torch.tensor(list(counting)), masks)


def _there(path: Path, what: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"No {what} at `{path}`. Nothing is downloaded here: put it there.")
    return path


# -- VOC ---------------------------------------------------------------------------------------------------------------


def voc_label(file: str | Path, classes: Sequence[str] = VOC_CLASSES) -> Label:
    """Read a VOC annotation. Boxes count pixels from 1, both ends included; parts of objects are no objects.

    Raises:
        ValueError: If the file is no annotation, or names a class that is not in `classes`.
    """
    try:
        root = ElementTree.parse(file).getroot()
        width, height = (int(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
        found: dict[int, list[tuple[bool, tuple[int, ...]]]] = {}
        for entry in root.findall("object"):
            name = entry.findtext("name", "")
            if name not in classes:
                raise ValueError(f"the class {name!r} is none of the {len(classes)}")
            corners = (round(float(entry.findtext(f"bndbox/{key}", ""))) for key in ("xmin", "ymin", "xmax", "ymax"))
            hard = entry.findtext("difficult", "0").strip() == "1"
            found.setdefault(classes.index(name), []).append((hard, tuple(corners)))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"`{file}` is no VOC annotation: {error}.") from error
    kept, masks, areas = [], [], []
    for kind, objects in sorted(found.items()):
        if all(hard for hard, _ in objects):
            continue
        mask, area = np.zeros((height, width), bool), 0.0
        for _, (left, top, right, bottom) in objects:
            mask[max(top - 1, 0) : bottom, max(left - 1, 0) : right] = True
            area += (right - left + 1) * (bottom - top + 1)
        if mask.any():
            kept, masks, areas = [*kept, kind], [*masks, mask], [*areas, area]
    return Label(tuple(kept), tuple(masks), tuple(areas), tuple(sorted(set(found) - set(kept))))


def voc(
    root: str | Path,
    prepare: Prepare,
    *,
    image_set: str = "test",
    difficult: bool = False,
    listed: str | Path | None = None,
    classes: Sequence[str] = VOC_CLASSES,
) -> Lazy:
    """Read a VOC data set: ``Annotations``, ``ImageSets/Main`` and ``JPEGImages`` in one folder, such as ``VOC2007``.

    Images without a class that counts are left out.

    Args:
        root: The folder.
        prepare: See `fitted`.
        image_set: File of ``ImageSets/Main``, such as ``"test"``.
        difficult: Only the difficult subset.
        listed: A file that lists the difficult subset, on each line the name of an image, then indices of classes. If
            omitted it is worked out from the definition, the sum of the boxes' areas below a quarter of the image and
            another class in it.
        classes: Names in the order of the model's outputs.

    Raises:
        FileNotFoundError: If a part of the data set is not there.
        ValueError: If an annotation cannot be read, or no image is left.
    """
    root = Path(root)
    names = _there(root / "ImageSets" / "Main" / f"{image_set}.txt", "list of VOC images").read_text("utf-8")
    known = _listed(listed)
    makers = []
    for name in (line.split()[0] for line in names.splitlines() if line.strip()):
        annotation = _there(root / "Annotations" / f"{name}.xml", "VOC annotation")
        label = voc_label(annotation, classes)
        counting = label.chosen(difficult, None if known is None else known.get(name, set()))
        if counting:
            file = _there(root / "JPEGImages" / f"{name}.jpg", "VOC image")
            makers.append(partial(_read_voc, file, annotation, classes, tuple(counting), prepare))
    return _some(makers, root)


def _read_voc(file: Path, annotation: Path, classes: Sequence[str], counting: Sequence[int], prepare: Prepare) -> Any:
    return voc_label(annotation, classes).example(file.stem, prepare(pixels_of(file)), counting)


def _listed(file: str | Path | None) -> dict[str, set[int]] | None:
    if file is None:
        return None
    found: dict[str, set[int]] = {}
    for line in _there(Path(file), "list of difficult classes").read_text("utf-8").splitlines():
        name, *indices = line.split() or [""]
        found.setdefault(Path(name).stem, set()).update(map(int, indices))
    return found


def _some(makers: list[Callable[[], Example]], where: Path) -> Lazy:
    if not makers:
        raise ValueError(f"`{where}` holds no image with a class that counts.")
    return Lazy(makers)


# -- COCO --------------------------------------------------------------------------------------------------------------


def coco(
    images: str | Path,
    instances: str | Path,
    prepare: Prepare,
    *,
    difficult: bool = False,
    listed: str | Path | None = None,
) -> Lazy:
    """Read COCO instances: a folder of images, and the JSON file that says what is in them.

    Classes are numbered from 0 by the order of their category ids, as is usual for COCO's 80. Images without objects
    are left out.

    Args:
        images: Folder of the images.
        instances: Such as ``instances_val2014.json``.
        prepare: See `fitted`.
        difficult, listed: See `voc`; areas are those of the segments.

    Raises:
        FileNotFoundError: If a part of the data set is not there.
        ValueError: If an annotation has an unknown image or category, or no image is left.
    """
    given = json.loads(_there(Path(instances), "file of COCO instances").read_text("utf-8"))
    shown = {entry["id"]: entry for entry in given["images"]}
    places = {category: place for place, category in enumerate(sorted(entry["id"] for entry in given["categories"]))}
    objects: dict[int, list[dict[str, Any]]] = {}
    for entry in given["annotations"]:
        for key, ids in (("image_id", shown), ("category_id", places)):
            if entry[key] not in ids:
                raise ValueError(f"`{instances}`: the object {entry.get('id')} has the unknown {key} {entry[key]}.")
        objects.setdefault(entry["image_id"], []).append(entry)
    known = _listed(listed)
    makers = []
    for image_id, entries in sorted(objects.items()):
        image = shown[image_id]
        if difficult:
            label = coco_label(entries, image, places)
            counting = label.chosen(True, None if known is None else known.get(Path(image["file_name"]).stem, set()))
        else:  # masks can wait
            counting = sorted({places[entry["category_id"]] for entry in entries if entry["segmentation"]})
        if counting:
            file = _there(Path(images) / image["file_name"], "COCO image")
            makers.append(partial(_read_coco, file, entries, image, places, tuple(counting), prepare))
    return _some(makers, Path(instances))


def coco_label(entries: Sequence[dict[str, Any]], image: dict[str, Any], places: dict[int, int]) -> Label:
    """Bring the objects of an image together by class."""
    masks: dict[int, np.ndarray] = {}
    areas: dict[int, float] = {}
    for entry in entries:
        mask = segment(entry["segmentation"], image["height"], image["width"])
        kind = places[entry["category_id"]]
        masks[kind] = masks.get(kind, False) | mask
        areas[kind] = areas.get(kind, 0.0) + float(entry.get("area", mask.sum()))
    kept = [kind for kind in sorted(masks) if masks[kind].any()]
    return Label(tuple(kept), tuple(masks[k] for k in kept), tuple(areas[k] for k in kept))


def _read_coco(
    file: Path,
    entries: Sequence[dict[str, Any]],
    image: dict[str, Any],
    places: dict[int, int],
    counting: Sequence[int],
    prepare: Prepare,
) -> Example:
    return coco_label(entries, image, places).example(file.name, prepare(pixels_of(file)), counting)


def segment(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Give the mask of polygons ``[[x, y, x, y, ...], ...]``, or of runs ``{"counts": ..., "size": [height, width]}``.

    A pixel belongs to a polygon if its centre is inside, by the even-odd rule, and to several if it belongs to one.
    Other programs may disagree on pixels of the outline.

    Raises:
        ValueError: If runs do not fill the image, or a polygon has no even number of coordinates.

    Example:
        >>> square = [[1, 1, 3, 1, 3, 3, 1, 3]]
        >>> runs = {"counts": [5, 2, 2, 2, 5], "size": [4, 4]}  # 0 first, down the columns
        >>> bool((segment(square, 4, 4) == segment(runs, 4, 4)).all())
        True
    """
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        runs = counts if isinstance(counts, list) else _runs(counts)
        if list(segmentation["size"]) != [height, width] or min(runs, default=0) < 0 or sum(runs) != height * width:
            raise ValueError(f"`segmentation` must have runs that fill {height} x {width} pixels, got {sum(runs)}.")
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T.copy()
    mask = np.zeros((height, width), bool)
    for polygon in segmentation:
        corners = np.asarray(polygon, float)
        if corners.size % 2 or corners.ndim != 1:
            raise ValueError(f"`segmentation` must have pairs x, y in each polygon, got {corners.size} numbers.")
        mask |= _inside(corners.reshape(-1, 2), height, width)
    return mask


def _inside(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Tell for each pixel whether a ray to its right, from its centre, crosses the outline an odd number of times."""
    across, down = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    inside = np.zeros((height, width), bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0), strict=True):
        if y0 == y1:
            continue
        crossed = (y0 <= down) != (y1 <= down)
        inside ^= crossed & (across < x0 + (down - y0) * (x1 - x0) / (y1 - y0))
    return inside


def _runs(text: str | bytes) -> list[int]:
    """Decode lengths of runs from characters, each 6 bits above the digit 0: five of a number, the lowest first, and
    whether there are more; numbers have a sign, and from the fourth on are the change since the run before the last."""
    runs: list[int] = []
    number = shift = 0
    for character in text.encode() if isinstance(text, str) else text:
        bits = character - 48
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # the sign
            number -= 1 << shift
        runs.append(number + runs[-2] if len(runs) > 2 else number)
        number = shift = 0
    return runs
