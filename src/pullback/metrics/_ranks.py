"""Maps as orders of their pixels: which comes first, and which are among the first k.

Equal values keep reading order, so that a map has one order. What is computed from a map that holds NaN is void: NaN,
or False where a metric says yes or no.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pixels(map: Tensor, batch: int, sizes: Sequence[int], name: str = "map") -> Tensor:
    """Check a map of `sizes` for each example, and lay it out as ``[batch pixel]``."""
    if not isinstance(map, Tensor) or not map.is_floating_point():
        got = map.dtype if isinstance(map, Tensor) else type(map).__name__
        raise TypeError(f"`{name}` must be a floating-point tensor, got {got}.")
    if tuple(map.shape) not in ((batch, 1, *sizes), (batch, *sizes)):
        axes = ["batch 1", *map_axes(len(sizes))]
        raise ValueError(
            f"`{name}` must be [{' '.join(axes)}], {[batch, 1, *sizes]}, got {list(map.shape)}. Sum an attribution "
            "over channels with `pullback.maps.channel_sum`; resize a map with `pullback.maps.resize`."
        )
    return map.reshape(batch, math.prod(sizes))


def map_axes(count: int) -> list[str]:
    """Name the spatial axes of a map."""
    return {1: ["length"], 2: ["height", "width"], 3: ["depth", "height", "width"]}.get(count, [])


def ranks(values: Tensor) -> Tensor:
    """Give the place of each of ``[batch pixel]`` in the order from the highest on, from 0.

    Example:
        >>> ranks(torch.tensor([[1.0, 3.0, 3.0, 0.0]]))
        tensor([[2, 0, 1, 3]])
    """
    order = torch.sort(values, dim=1, descending=True, stable=True).indices
    place = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, place)


def voided(results: Tensor, *judged: Tensor) -> Tensor:
    """Turn the results ``[batch]`` of examples whose map holds NaN to NaN, or to False."""
    for map in judged:
        void = map.flatten(1).isnan().any(1)
        results = results & ~void if results.dtype == torch.bool else results.masked_fill(void, float("nan"))
    return results
