"""Explain by covering: run the model on many perturbed inputs, and account for the change of its score.

Costs are quoted in forwards. The perturbations do not depend on the target, so that under `vmap` over targets one
forward of each perturbed input serves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback import masks as drawn
from pullback._core.batching import Progress, Together, report, wide
from pullback._core.masked import Scene

Keep = Callable[[range], "list[Tensor]"]


# -- features and coalitions of them


class _Features:
    """Features of the input: groups of numbers that are shown or covered together.

    `ids`: for each covered tensor the group of each number, ``[1 *example]`` or ``[batch *example]``.
    """

    def __init__(self, scene: Scene, features: Any, baseline: Any) -> None:
        self.scene = scene
        self.keys = [None] if scene.site.name else scene.leaves.floating
        given = [self._of(features, key) for key in self.keys]
        if features is None:
            sizes = [math.prod(shape[1:]) for shape in scene.shapes]
            starts = [sum(sizes[:k]) for k in range(len(sizes))]
            self.count = sum(sizes)
            self.ids = [
                torch.arange(start, start + size, device=scene.device).reshape(1, *shape[1:])
                for start, size, shape in zip(starts, sizes, scene.shapes, strict=True)
            ]
        else:
            self.ids = [self._laid(ids, shape) for ids, shape in zip(given, scene.shapes, strict=True)]
            if min(int(ids.min()) for ids in self.ids) < 0:
                raise ValueError("`features` must number groups from 0, got a negative number.")
            self.count = 1 + max(int(ids.max()) for ids in self.ids)
        self.baselines = [self._of(baseline, key) for key in self.keys]

    @staticmethod
    def _of(tree: Any, key: Any) -> Any:
        if key is None or not isinstance(tree, dict | tuple | list):
            return tree
        return tree.get(key) if isinstance(tree, dict) else tree[key]

    def _laid(self, ids: Any, shape: Sequence[int]) -> Tensor:
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
            what = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"`features` must be an integer tensor for each tensor that is covered, got {what}.")
        ids = ids.long().to(self.scene.device)
        for whole in (tuple(shape[1:]), tuple(shape)):
            if ids.ndim <= len(whole):
                try:
                    ids = ids.expand(whole)
                except RuntimeError:
                    continue
                return ids if whole == tuple(shape) else ids.unsqueeze(0)
        raise ValueError(f"`features` must broadcast to {list(shape[1:])} or {list(shape)}, got {list(ids.shape)}.")

    def kept(self, coalitions: Tensor) -> list[Tensor]:
        """Lay coalitions ``[copy group]`` out over the tensors, ``[copy (1 or batch) *example]``."""
        return [coalitions[:, ids] for ids in self.ids]

    def scores(self, count: int, keep: Keep, chunk_size: Together, progress: Progress) -> Tensor:
        """Score the input with all covered that `keep` does not keep: ``[copy batch]``."""
        found = []
        for part in self.scene.parts(count, chunk_size):
            kept = keep(part)

            def cover(place: int, values: Tensor) -> Tensor:
                under = drawn.covering(values[0], self.baselines[place])
                return torch.where(kept[place], values, under)  # noqa: B023

            found.append(self.scene.scores(len(part), cover))
            report(progress, part.stop, count)
        return torch.cat(found).to(wide(self.scene.dtype))

    def laid_out(self, values: Tensor) -> Any:
        """Give each number the value of its group: ``[batch group]`` -> the structure of what is covered."""
        spread = []
        for ids, shape in zip(self.ids, self.scene.shapes, strict=True):
            flat = torch.gather(values, 1, ids.flatten(1).expand(len(values), -1))
            spread.append(flat.reshape(len(values), *shape[1:]).to(self.scene.dtype))
        return spread[0] if self.scene.site.name else self.scene.leaves.rebuild(spread, lambda v: None)
