"""Where paths start and end, what is summed along them, and how far their sum is from complete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pullback._core.call import Call, InputTree
from pullback._core.types import Target, Tensors


def starts_of(tree: InputTree, baseline: Any) -> list[Any]:
    """Return the baselines, each with the structure of `x` and broadcast to it; a list means several."""
    several = baseline if isinstance(baseline, list) else [baseline]
    if not several:
        raise ValueError("`baseline` must not be an empty list.")
    return [_start(tree, one) for one in several]


def _start(tree: InputTree, baseline: Any) -> Any:
    """Give a baseline the structure and the shapes of `x`; what it tree out is 0, or an integer of `x` as it is."""
    if isinstance(tree.x, Tensor):
        return _broadcast(baseline, tree.x) if tree.floating or baseline is not None else tree.x
    given = dict(baseline or {}) if isinstance(tree.x, dict) else dict(enumerate(baseline or ()))
    unknown = set(given) - {key for key, _ in tree.items}
    if unknown:
        raise ValueError(f"`baseline` must have the structure of `x`; `x` has nothing at {sorted(map(str, unknown))}.")

    def start(key: Any, value: Tensor | None) -> Tensor | None:
        stays = value is None or (key not in tree.floating and given.get(key) is None)
        return value if stays else _broadcast(given.get(key), value)  # pyright: ignore[reportArgumentType]

    values = {key: start(key, value) for key, value in tree.items}
    return tuple(values.values()) if isinstance(tree.x, tuple) else values


def _broadcast(baseline: Any, value: Tensor) -> Tensor:
    start = torch.as_tensor(0 if baseline is None else baseline, dtype=value.dtype, device=value.device)
    try:
        return start.expand_as(value)
    except RuntimeError:
        raise ValueError(f"`baseline` must broadcast to `x`, {list(value.shape)}, got {list(start.shape)}.") from None


def ends_of(call: Call, baseline: Any) -> tuple[list[Tensors], Tensors]:
    """Return where the paths start and where they end: tensors of `x`, or activations of the call's layer."""
    end = call.activations()
    if baseline is None and call.layer is not None and not call.x.floating:
        return [tuple(torch.zeros_like(a) for a in end)], end
    return [call.on(start).activations() for start in starts_of(call.x, baseline)], end


def slope_along(call: Call, target: Target, points: Sequence[Tensor], velocities: Sequence[Tensor]) -> list[Tensor]:
    """Velocity times gradient, ``[point batch ...]``: what each number adds to the score on its way along a path."""
    return [v * g for v, g in zip(velocities, call.at(points).gradients(target), strict=True)]


def convergence_delta(
    call: Call,
    target: Target,
    attributions: Sequence[Tensor],
    starts: Sequence[Sequence[Tensor]],
    end: Sequence[Tensor],
) -> Tensor:
    """Sum the attributions, and subtract the difference in score between the end and the mean start, ``[batch]``."""
    total = sum(a.flatten(1).sum(1) for a in attributions)
    first = call.at([torch.stack(t) for t in zip(*starts, strict=True)]).scores(target).mean(0)
    return total - (call.at([t.unsqueeze(0) for t in end]).scores(target)[0] - first)
