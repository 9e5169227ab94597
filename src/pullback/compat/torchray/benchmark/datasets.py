"""Labelled images in local files, and the masks that their labels mean.

The layouts are the usual ones: ``ROOT/CLASS/IMAGE`` for `ImageFolder`, ``ROOT/VOCdevkit/VOC2007/...`` for
`VOCDetection`, a folder of images and a JSON file of instances for `CocoDetection`. Neither torchvision nor pycocotools
is needed.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.compat.torchray._arguments import ArgumentError
from pullback.compat.torchray.utils import get_config, imread

__all__ = [
    "COCO_CLASSES",
    "IMAGENET_CLASSES",
    "VOC_CLASSES",
    "CocoDetection",
    "ImageFolder",
    "VOCDetection",
    "coco_as_class_ids",
    "coco_as_image_name",
    "coco_as_image_size",
    "coco_as_mask",
    "get_dataset",
    "voc_as_class_ids",
    "voc_as_image_name",
    "voc_as_image_size",
    "voc_as_mask",
]

# each line keeps its end, as in TorchRay
IMAGENET_CLASSES = (
    (importlib.resources.files("pullback") / "data" / "imagenet_classes.txt")
    .read_text(encoding="utf-8")
    .splitlines(keepends=True)
)

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()

COCO_CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")

_COCO_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
_COCO_IDS = [i for i in range(1, 91) if i not in _COCO_UNUSED]
_COCO_INDEX = {category: index for index, category in enumerate(_COCO_IDS)}

Label = Any


# -- VOC labels: {"annotation": {"filename": ..., "size": {...}, "object": [{"name": ..., "bndbox": {...}}, ...]}}


def _voc_objects(label: Label) -> list[dict[str, Any]]:
    objects = label["annotation"].get("object", [])
    return objects if isinstance(objects, list) else [objects]


def voc_as_class_ids(label: Label) -> list[int]:
    """List the classes in a VOC label, each once, in order."""
    return sorted({VOC_CLASSES.index(o["name"]) for o in _voc_objects(label)})


def voc_as_image_size(label: Label) -> tuple[int, int]:
    """Give (width, height)."""
    size = label["annotation"]["size"]
    return int(size["width"]), int(size["height"])


def voc_as_image_name(label: Label) -> str:
    """Give the name of the image file, without its ending."""
    return Path(label["annotation"]["filename"]).stem


def voc_as_mask(label: Label, class_id: int) -> Tensor:
    """Give the union of the boxes of a class, ``[height width]``, bool. Boxes are from 1, both ends included."""
    width, height = voc_as_image_size(label)
    mask = torch.zeros(height, width, dtype=torch.bool)
    for found in _voc_objects(label):
        if VOC_CLASSES.index(found["name"]) == class_id:
            left, top, right, bottom = (round(float(found["bndbox"][k])) for k in ("xmin", "ymin", "xmax", "ymax"))
            mask[max(top - 1, 0) : bottom, max(left - 1, 0) : right] = True
    return mask


# -- COCO labels: [{"category_id": ..., "image_id": ..., "segmentation": ..., "bbox": ...}, ...]


def coco_as_class_ids(label: Label) -> list[int]:
    """List the classes in a COCO label, each once, in order, numbered from 0 to 79."""
    return sorted({_COCO_INDEX[o["category_id"]] for o in label})


def _coco_image(dataset: Any, label: Label) -> dict[str, Any]:
    if not label:
        raise ArgumentError("`label` is empty: no object says which image it is.")
    image_id = label[0]["image_id"]
    if hasattr(dataset, "images"):
        return dataset.images[image_id]
    return dataset.coco.loadImgs(image_id)[0]


def coco_as_image_size(dataset: Any, label: Label) -> tuple[int, int]:
    """Give (width, height)."""
    image = _coco_image(dataset, label)
    return int(image["width"]), int(image["height"])


def coco_as_image_name(dataset: Any, label: Label) -> str:
    """Give the name of the image file."""
    return _coco_image(dataset, label)["file_name"]


def coco_as_mask(dataset: Any, label: Label, class_id: int) -> Tensor | None:
    """Give the union of the segments of a class, ``[height width]``, bool; `None` for an empty label.

    A class that the label does not have gives an empty mask. Polygons are filled here, by Pillow, or by pycocotools
    where `dataset` is one of torchvision's: the two may disagree on pixels of the outline.
    """
    if not label:
        return None
    width, height = coco_as_image_size(dataset, label)
    mask = torch.zeros(height, width, dtype=torch.bool)
    for found in label:
        if _COCO_INDEX[found["category_id"]] == class_id:
            if hasattr(dataset, "coco"):
                segment = np.asarray(dataset.coco.annToMask(found), dtype=bool)
            else:
                segment = _segment(found["segmentation"], width, height)
            mask |= torch.from_numpy(segment)
    return mask


def _segment(segmentation: Any, width: int, height: int) -> np.ndarray:
    """Fill polygons ``[[x, y, x, y, ...], ...]``, or decode runs ``{"counts": ..., "size": [height, width]}``."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        runs = counts if isinstance(counts, list) else _runs(counts)
        values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return values.reshape(segmentation["size"][::-1]).T.copy()  # runs go down the columns
    pil, draw = importlib.import_module("PIL.Image"), importlib.import_module("PIL.ImageDraw")
    image = pil.new("1", (width, height))
    for polygon in segmentation:
        draw.Draw(image).polygon([float(v) for v in polygon], fill=1)
    return np.array(image, dtype=bool)


def _runs(text: str | bytes) -> list[int]:
    """Decode run lengths written in characters of 6 bits: 5 of the number and one for "more"; from the third run on,
    differences to the run before the last."""
    runs: list[int] = []
    number = shift = 0
    for character in text.encode() if isinstance(text, str) else text:
        bits = character - 48
        number |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            number |= -1 << shift
        runs.append(number + runs[-2] if len(runs) > 2 else number)
        number = shift = 0
    return runs


# -- data sets


def _wanted(path: str | os.PathLike[str], what: str) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No {what} at `{path}`. Nothing is downloaded here: put it there.")
    return path


class _Images(torch.utils.data.Dataset):
    """Images with labels, of which a limiter may keep some."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.root = os.fspath(root)
        self.transform, self.target_transform = transform, target_transform
        self.selection: list[int] = []

    def _select(self, order: Iterable[int], limiter: int | None) -> None:
        self.selection = list(order)[:limiter]

    def _entry(self, index: int) -> tuple[Path, Any]:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.selection)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        path, label = self._entry(self.selection[index])
        image = imread(path, as_pil=True, to_rgb=True)
        return (
            image if self.transform is None else self.transform(image),
            label if self.target_transform is None else self.target_transform(label),
        )

    @staticmethod
    def collate(batch: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, list[Any]]:
        """Stack images; give labels as a list. For `torch.utils.data.DataLoader(collate_fn=...)`."""
        return torch.stack([image for image, _ in batch]), [label for _, label in batch]

    def get_image_url(self, i: int) -> str:
        """Give the path of an image."""
        return str(self._entry(self.selection[i])[0])


_ENDINGS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}


class ImageFolder(_Images):
    """Images in a folder for each class, labelled by its index.

    Args:
        root: Folder of the folders.
        transform, target_transform: Of the image and of the label.
        limiter: Number of images to keep: one of each class in turn.
        full_classes: Names of all classes, where the folders are only some of them.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        *,
        limiter: int | None = None,
        full_classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__(_wanted(root, "folder of images"), transform, target_transform)
        found = sorted(p.name for p in Path(root).iterdir() if p.is_dir())
        self.classes = list(full_classes or found)
        unknown = sorted(set(found) - set(self.classes))
        if unknown:
            raise ArgumentError(f"`full_classes` misses {unknown[0]!r}, a folder in `{root}`.")
        self.class_to_idx = {name: i for i, name in enumerate(self.classes)}
        self.samples = [
            (str(file), self.class_to_idx[name])
            for name in found
            for file in sorted((Path(root) / name).rglob("*"))
            if file.suffix.lower() in _ENDINGS
        ]
        turn: dict[int, int] = {}
        rounds = [turn.setdefault(c, 0) for _, c in self.samples]
        for i, (_, c) in enumerate(self.samples):
            rounds[i], turn[c] = turn[c], turn[c] + 1
        order = range(len(self.samples))
        self._select(order if limiter is None else sorted(order, key=lambda i: (rounds[i], i)), limiter)

    def _entry(self, index: int) -> tuple[Path, int]:
        file, label = self.samples[index]
        return Path(file), label


class VOCDetection(_Images):
    """PASCAL VOC: images with boxes.

    Args:
        root: Folder that holds ``VOCdevkit/VOC<year>``.
        year, image_set: Such as ``"2007"``, ``"test"``.
        download: Refused.
        transform, target_transform: Of the image and of the label.
        limiter: Number of images to keep, the first ones.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        year: str = "2012",
        image_set: str = "train",
        download: bool = False,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        *,
        limiter: int | None = None,
    ) -> None:
        super().__init__(root, transform, target_transform)
        self.year = str(year).removesuffix("-test")
        folder = Path(root) / "VOCdevkit" / f"VOC{self.year}"
        _no_download(download, folder)
        names = _wanted(folder / "ImageSets" / "Main" / f"{image_set}.txt", "list of VOC images").read_text()
        self.folder, self.names = folder, [line.split()[0] for line in names.splitlines() if line.strip()]
        self._select(range(len(self.names)), limiter)

    def _entry(self, index: int) -> tuple[Path, Label]:
        name = self.names[index]
        tree = ElementTree.parse(self.folder / "Annotations" / f"{name}.xml")
        return self.folder / "JPEGImages" / f"{name}.jpg", {"annotation": _parsed(tree.getroot())}

    def as_class_ids(self, label: Label) -> list[int]:
        return voc_as_class_ids(label)

    def as_mask(self, label: Label, class_id: int) -> Tensor:
        return voc_as_mask(label, class_id)

    def as_image_size(self, label: Label) -> tuple[int, int]:
        return voc_as_image_size(label)

    def as_image_name(self, label: Label) -> str:
        return voc_as_image_name(label)


def _parsed(node: ElementTree.Element) -> Any:
    """Give an XML element as nested dicts of strings; ``object`` is always a list."""
    if len(node) == 0:
        return (node.text or "").strip()
    found: dict[str, Any] = {}
    for child in node:
        value = _parsed(child)
        if child.tag == "object" and node.tag == "annotation":
            found.setdefault("object", []).append(value)
        elif child.tag in found:
            known = found[child.tag]
            found[child.tag] = [*known, value] if isinstance(known, list) else [known, value]
        else:
            found[child.tag] = value
    return found


class CocoDetection(_Images):
    """COCO: images with segments.

    Args:
        root: Folder of the images.
        annFile: JSON file of the instances.
        transform, target_transform: Of the image and of the label.
        limiter: Number of images to keep, the first ones.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        annFile: str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        *,
        limiter: int | None = None,
    ) -> None:
        super().__init__(_wanted(root, "folder of COCO images"), transform, target_transform)
        given = json.loads(_wanted(annFile, "file of COCO instances").read_text(encoding="utf-8"))
        self.images = {image["id"]: image for image in given["images"]}
        self.labels: dict[int, list[dict[str, Any]]] = {i: [] for i in self.images}
        for found in given["annotations"]:
            self.labels[found["image_id"]].append(found)
        self.ids = sorted(self.images)
        self._select(range(len(self.ids)), limiter)

    def _entry(self, index: int) -> tuple[Path, Label]:
        image_id = self.ids[index]
        return Path(self.root) / self.images[image_id]["file_name"], self.labels[image_id]

    def as_class_ids(self, label: Label) -> list[int]:
        return coco_as_class_ids(label)

    def as_mask(self, label: Label, class_id: int) -> Tensor | None:
        return coco_as_mask(self, label, class_id)

    def as_image_size(self, label: Label) -> tuple[int, int]:
        return coco_as_image_size(self, label)

    def as_image_name(self, label: Label) -> str:
        return coco_as_image_name(self, label)


def _no_download(download: bool, path: Path) -> None:
    if download and not path.exists():
        raise ArgumentError(f"`download` must be False: nothing is downloaded here. Put the data set at `{path}`.")


def get_dataset(
    name: str,
    subset: str,
    dataset_dir: str | os.PathLike[str] | None = None,
    annotation_dir: str | os.PathLike[str] | None = None,
    transform: Callable[[Any], Any] | None = None,
    limiter: int | None = None,
    download: bool = False,
) -> ImageFolder | VOCDetection | CocoDetection:
    """Open a data set.

    Args:
        name: ``"imagenet"``, ``"voc_2007"`` and other years, or ``"coco"``.
        subset: Such as ``"val"``, ``"test"``, ``"val2014"``.
        dataset_dir, annotation_dir: Where it is; what `get_config` says if omitted.
        transform: Of the images.
        limiter: Number of images to keep.
        download: Refused where the files are not there.
    """
    config = get_config()["benchmark"]
    if name.startswith("voc"):
        year = name.partition("_")[2] or "2007"
        return VOCDetection(
            dataset_dir or config["voc_dir"], year, subset, download, transform=transform, limiter=limiter
        )
    if name.startswith("coco"):
        folder = Path(dataset_dir or config["coco_dir"])
        instances = Path(annotation_dir or config["coco_anno_dir"]) / f"instances_{subset}.json"
        _no_download(download, instances)
        images = folder / subset if (folder / subset).is_dir() else folder / "images" / subset
        return CocoDetection(images, instances, transform=transform, limiter=limiter)
    if name.startswith("imagenet"):
        folder = Path(dataset_dir or config["imagenet_dir"]) / subset
        _no_download(download, folder)
        return ImageFolder(folder, transform=transform, limiter=limiter)
    raise ArgumentError(f"`name` must be 'imagenet', 'voc_YEAR' or 'coco', got {name!r}.")
