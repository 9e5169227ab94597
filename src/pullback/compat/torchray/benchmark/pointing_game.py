"""The pointing game: does the peak of a map lie on an object of its class, or close to it?

    point = saliency.flatten().argmax().item()
    hit = game.evaluate(mask, (point % width, point // width))
    game.aggregate(hit, class_id)

The pure function is `pullback.metrics.pointing_game`, for a batch of maps at once.

Reference:
    Zhang, Bargal, Lin, Brandt, Shen & Sclaroff, Top-down Neural Attention by Excitation Backprop, 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pullback import metrics
from pullback.compat.torchray._arguments import ArgumentError
from pullback.compat.torchray.benchmark.datasets import COCO_CLASSES, VOC_CLASSES, CocoDetection, VOCDetection

__all__ = ["PointingGame", "PointingGameBenchmark"]


class PointingGame:
    """Count hits and misses of each class.

    Args:
        num_classes: Number of classes.
        tolerance: A point closer than this many pixels to the object hits.
    """

    def __init__(self, num_classes: int, tolerance: float = 15) -> None:
        self.num_classes, self.tolerance = num_classes, tolerance
        self.reset()

    def reset(self) -> None:
        """Forget all hits and misses."""
        self.hits = torch.zeros(self.num_classes, dtype=torch.float64)
        self.misses = torch.zeros(self.num_classes, dtype=torch.float64)

    def evaluate(self, mask: Tensor, point: Sequence[float]) -> int:
        """Tell whether a point hits: 1, or -1.

        Args:
            mask: The object, ``[height width]``, bool.
            point: (column, row).
        """
        place = torch.as_tensor(point, dtype=torch.float64).reshape(1, 2)
        return 1 if bool(metrics.pointing_hits(place, mask[None], tolerance=self.tolerance)) else -1

    def aggregate(self, hit: int, class_id: int) -> None:
        """Count the result of `evaluate`, 0 not at all."""
        if hit not in (-1, 0, 1):
            raise ArgumentError(f"`hit` must be 1, 0 or -1, got {hit}.")
        self.hits[class_id] += hit == 1
        self.misses[class_id] += hit == -1

    @property
    def class_accuracies(self) -> Tensor:
        """The share of hits of each class; 0 for a class that was never seen."""
        return self.hits / (self.hits + self.misses).clamp(min=1)

    @property
    def accuracy(self) -> Tensor:
        """The mean over all classes, also those never seen."""
        return self.class_accuracies.mean()

    def __str__(self) -> str:
        counts = int(self.hits.sum()), int((self.hits + self.misses).sum())
        return f"{100 * float(self.accuracy):.1f} % mean accuracy over classes, {counts[0]} hits of {counts[1]}"


class PointingGameBenchmark(PointingGame):
    """The pointing game on VOC or COCO.

    Args:
        dataset: A `VOCDetection` or `CocoDetection`.
        tolerance: See `PointingGame`.
        difficult: Only the images and classes that the reference calls difficult. Their list is read from
            ``pointing_difficult.txt`` in the data set's folder: on each line the name of an image, then class indices.
    """

    def __init__(self, dataset: Any, tolerance: float = 15, difficult: bool = False) -> None:
        if not isinstance(dataset, VOCDetection | CocoDetection):
            raise ArgumentError(f"`dataset` must be a VOCDetection or a CocoDetection, got {type(dataset).__name__}.")
        super().__init__(len(VOC_CLASSES if isinstance(dataset, VOCDetection) else COCO_CLASSES), tolerance)
        self.dataset, self.difficult = dataset, difficult
        self._listed: dict[str, set[int]] = {}
        if difficult:
            file = Path(dataset.root) / "pointing_difficult.txt"
            if not file.is_file():
                raise FileNotFoundError(
                    f"`difficult=True` needs `{file}`: on each line the name of an image, then its difficult classes."
                )
            for line in file.read_text(encoding="utf-8").splitlines():
                name, *classes = line.split() or [""]
                self._listed.setdefault(Path(name).stem, set()).update(map(int, classes))

    def evaluate(self, label: Any, class_id: int, point: Sequence[float]) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Tell whether a point hits an object of a class: 1, -1, or 0 where the class does not count.

        It does not count where only difficult ones do and it is not listed, and where all of its boxes in a VOC label
        are marked difficult.
        """
        if self.difficult:
            name = Path(self.dataset.as_image_name(label)).stem
            if class_id not in self._listed.get(name, ()):
                return 0
        if isinstance(self.dataset, VOCDetection):
            objects = [o for o in label["annotation"]["object"] if o["name"] == VOC_CLASSES[class_id]]
            if all(int(o.get("difficult", 0)) for o in objects):
                return 0
        mask = self.dataset.as_mask(label, class_id)
        return 0 if mask is None else super().evaluate(mask, point)
