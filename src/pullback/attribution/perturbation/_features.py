"""Features of the input: groups of numbers that are kept or covered together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback._core.batching import report, wide
from pullback._core.masked import MaskedModel
from pullback._core.types import ChunkSize, Progress
from pullback.masks import fill

Keep = Callable[[range], "list[Tensor]"]


# -- features and coalitions of them


class FeatureGroups:
    """Features of the input: groups of numbers that are shown or covered together.

    `ids`: for each covered tensor the group of each number, ``[1 *example]`` or ``[batch *example]``.
    """

    def __init__(self, masked: MaskedModel, feature_mask: Any, baseline: Any) -> None:
        self.masked = masked
        self.keys = [None] if masked.call.layer is not None else masked.call.x.floating
        given = [self._of(feature_mask, key) for key in self.keys]
        if feature_mask is None:
            sizes = [math.prod(shape[1:]) for shape in masked.shapes]
            starts = [sum(sizes[:k]) for k in range(len(sizes))]
            self.count = sum(sizes)
            self.ids = [
                torch.arange(start, start + size, device=masked.device).reshape(1, *shape[1:])
                for start, size, shape in zip(starts, sizes, masked.shapes, strict=True)
            ]
        else:
            self.ids = [self._laid(ids, shape) for ids, shape in zip(given, masked.shapes, strict=True)]
            if min(int(ids.min()) for ids in self.ids) < 0:
                raise ValueError("`feature_mask` must number groups from 0, got a negative number.")
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
            raise TypeError(f"`feature_mask` must be an integer tensor for each tensor that is covered, got {what}.")
        ids = ids.long().to(self.masked.device)
        for whole in (tuple(shape[1:]), tuple(shape)):
            if ids.ndim <= len(whole):
                try:
                    ids = ids.expand(whole)
                except RuntimeError:
                    continue
                return ids if whole == tuple(shape) else ids.unsqueeze(0)
        raise ValueError(f"`feature_mask` must broadcast to {list(shape[1:])} or {list(shape)}, got {list(ids.shape)}.")

    def kept(self, coalitions: Tensor) -> list[Tensor]:
        """Lay coalitions ``[copy group]`` out over the tensors, ``[copy (1 or batch) *example]``."""
        return [coalitions[:, ids] for ids in self.ids]

    def scores(self, count: int, keep: Keep, chunk_size: ChunkSize, progress: Progress) -> Tensor:
        """Score the input with all covered that `keep` does not keep: ``[copy batch]``."""
        found = []
        for part in self.masked.parts(count, chunk_size):
            kept = keep(part)

            def cover(place: int, values: Tensor) -> Tensor:
                under = fill(values[0], self.baselines[place])
                return torch.where(kept[place], values, under)  # noqa: B023

            found.append(self.masked.scores(len(part), cover))
            report(progress, part.stop, count)
        return torch.cat(found).to(wide(self.masked.dtype))

    def laid_out(self, values: Tensor) -> Any:
        """Give each number the value of its group: ``[batch group]`` -> the structure of what is covered."""
        spread = []
        for ids, shape in zip(self.ids, self.masked.shapes, strict=True):
            flat = torch.gather(values, 1, ids.flatten(1).expand(len(values), -1))
            spread.append(flat.reshape(len(values), *shape[1:]).to(self.masked.dtype))
        return self.masked.like(spread)
