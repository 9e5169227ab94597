"""Guided integrated gradients: a path that moves the least important numbers first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pullback._core.batching import report
from pullback._core.call import Call
from pullback._core.entry import method
from pullback._core.types import Inputs, Model, Output, Params, Progress, Target
from pullback.attribution.paths._along import ends_of
from pullback.rules._table import Rules, table_of


@method("paths", small={"steps": 3}, forwards=lambda o: o["steps"], adaptive=lambda o: o["steps"] - 1)
def guided_integrated_gradients(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    baseline: Any = None,
    steps: int = 50,
    fraction: float = 0.25,
    max_distance: float = 0.02,
    progress: Progress = None,
    rules: Rules = None,
    output: Output = None,
) -> Any:
    r"""Integrate the gradient along a path that moves first the features with the smallest gradient.

    Each step brings the point nearer to the input by the same distance in the 1-norm. It moves the `fraction` of
    features with the smallest absolute gradient, then the next, none further ahead of or behind the straight line than
    `max_distance`, until the distance is used up. The path avoids regions of high curvature, where gradients explain
    the path more than the model. Adds up to the difference in score between input and baseline, up to the error of the
    sum over steps. Costs `steps` gradients, one after the other.

    Args:
        params, model, x, target, rules, output: See `gradient`.
        baseline: See `integrated_gradients`; one baseline.
        steps: Steps of the path.
        fraction: Share of the features that moves at once.
        max_distance: How far a feature may leave the straight line, as a fraction of its way.
        progress: Called with (steps done, steps in all).

    Returns:
        Attribution, shaped like `x`, signed, in units of the score.

    Raises:
        ValueError: If `steps` is less than 1, or `fraction` or `max_distance` is not in (0, 1].

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> params, x = params_of(model), torch.randn(4, 3)
        >>> a = guided_integrated_gradients(params, model, x, 0, steps=5)
        >>> torch.allclose(a, x * model.weight[0], atol=1e-5)  # on a linear model all paths agree
        True

    Reference:
        Kapishnikov et al., Guided Integrated Gradients: An Adaptive Path Method for Removing Noise, 2021, alg. 1.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    for name, value in (("fraction", fraction), ("max_distance", max_distance)):
        if not 0 < value <= 1:
            raise ValueError(f"`{name}` must lie in (0, 1], got {value}.")
    call = Call.bind(params, model, x, "", table_of(rules), output)
    (start, *_), end = ends_of(call, baseline)
    shapes = [t.shape for t in end]
    start, end = (torch.cat([t.flatten(1) for t in tensors], 1) for tensors in (start, end))
    point, total = start, torch.zeros_like(start)
    for k in range(1, steps + 1):
        parts = _parts(point, shapes)
        slope = torch.cat([g[0].flatten(1) for g in call.at([p.unsqueeze(0) for p in parts]).gradients(target)], 1)
        moved = _move(point, start, end, slope, k / steps, fraction, max_distance)
        total = total + (moved - point) * slope
        point = moved
        report(progress, k, steps)
    return call.like(_parts(total, shapes))


def _parts(joined: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Cut ``[batch feature]`` into tensors of these shapes."""
    parts = joined.split([math.prod(shape[1:]) for shape in shapes], 1)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _move(
    point: Tensor, start: Tensor, end: Tensor, slope: Tensor, alpha: float, fraction: float, max_distance: float
) -> Tensor:
    """Move the features with the smallest gradients, ``[batch feature]``, until `alpha` of the way is done."""
    way = end - start
    behind, ahead = (start + min(max(a, 0.0), 1.0) * way for a in (alpha - max_distance, alpha + max_distance))
    lags = (point - behind) * way < 0
    point = torch.where(lags, behind, point)
    due = ((end - point).abs().sum(1) - (1 - alpha) * way.abs().sum(1)).clamp(min=0).unsqueeze(1)
    room = (ahead - point) * way.sign()
    room = torch.where(room > 0, room, torch.zeros_like(room))
    magnitude = slope.abs() / slope.abs().amax(1, keepdim=True)
    magnitude = (magnitude * 2**20).round()  # what differs by rounding alone is equal
    magnitude = torch.where(room > 0, magnitude, torch.full_like(slope, math.inf))
    ranked, count = magnitude.sort(1).values, magnitude.shape[1]
    size = math.floor(fraction * (count - 1)) + 1
    done, below = torch.zeros_like(ranked[:, :1], dtype=torch.long), torch.full_like(ranked[:, :1], -1)
    for _ in range(math.ceil(count / size)):  # a group of features at a time, with those that are equal to its last
        top = ranked.gather(1, (done + size - 1).clamp(max=count - 1))
        space = torch.where((magnitude > below) & (magnitude <= top), room, torch.zeros_like(room))
        whole = space.sum(1, keepdim=True)
        share = (due / torch.where(whole == 0, torch.ones_like(whole), whole)).clamp(0, 1)
        point, due = point + share * space * way.sign(), due - share * whole
        done, below = (ranked <= top).sum(1, keepdim=True), top
    return point
