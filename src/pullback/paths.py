"""Integrals of the gradient along a path from a baseline to the input."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback._batch import chunks, each, folded, repeated, unfolded
from pullback._call import Inputs, Leaves, Model, Params, Select, Target, public, run, score
from pullback.gradients import gradient
from pullback.rules import Rules, table_of


@public
def integrated_gradients(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    baseline: Any = None,
    steps: int = 50,
    chunk_size: int | None = None,
    rules: Rules = None,
    output: Select = None,
    strict: bool = False,
    return_info: bool = False,
) -> Any:
    r"""Integrate the gradient along the straight line from a baseline to the input.

    .. math:: a_i = (x_i - b_i) \int_0^1 \partial_i f(b + \alpha (x - b)) \, d\alpha

    The integral is a Gauss-Legendre sum, exact for polynomials up to degree ``2 steps - 1``. Attributions add up to the
    difference in score between `x` and `baseline`, up to the error of that sum. Costs `steps` gradients; under `vmap`
    over targets the forwards are shared.

    Args:
        params, model, x, target, rules, output, strict: See `gradient`. A cotangent as `target` is taken as it is at
            each point.
        baseline: Start of the path, with the structure of `x`, broadcast to it. Zeros if omitted.
        steps: Points on the path.
        chunk_size: Points evaluated together. All of them if omitted.
        return_info: Return ``(attribution, info)``, where ``info["gap"]``, ``[batch]``, is the sum of the attribution
            less the difference in score. Costs 2 forwards.

    Returns:
        Attribution, shaped like `x`, signed, in units of the score.

    Raises:
        ValueError: If `steps` is less than 1, or `baseline` does not broadcast to `x`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.ones(4, 3)
        >>> a = integrated_gradients(params, model, x, target=0)
        >>> torch.allclose(a.sum(1), model(x)[:, 0] - model(0 * x)[:, 0], atol=1e-5)
        True

    Reference:
        Sundararajan, Taly & Yan, Axiomatic Attribution for Deep Networks, 2017, sec. 3.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    leaves = Leaves(x)
    starts = _baselines(leaves, baseline)
    nodes, weights = gauss_legendre(steps)
    table = table_of(rules)
    total: Any = None
    for part in chunks(steps, chunk_size):
        count = len(part)
        points = [
            folded(torch.stack([b + nodes[i] * (t - b) for i in part]))
            for t, b in zip(leaves.tensors, starts, strict=True)
        ]
        copies = leaves.rebuild(points, lambda v: repeated(v, count, leaves.batch))  # noqa: B023
        targets = repeated(target, count, leaves.batch)
        slopes = gradient(params, model, copies, targets, rules=table, output=output, strict=strict)
        summed = each(lambda g: _weighted(unfolded(g, count), weights[part.start : part.stop]), slopes)  # noqa: B023
        total = summed if total is None else each(torch.add, total, summed)
    integrals = Leaves(total).tensors
    attributions = [(t - b) * g for t, b, g in zip(leaves.tensors, starts, integrals, strict=True)]
    attribution = leaves.rebuild(attributions, lambda v: None)
    if not return_info:
        return attribution
    ends = [
        score(run(params, model, leaves.rebuild(tensors, lambda v: v), output=output), target)
        for tensors in (leaves.tensors, starts)
    ]
    gap = sum(a.flatten(1).sum(1) for a in attributions) - (ends[0] - ends[1])
    return attribution, {"gap": gap}


def gauss_legendre(steps: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Give nodes and weights on [0, 1], in float64."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return tuple(((1 + nodes) / 2).tolist()), tuple((weights / 2).tolist())


gauss_legendre._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # not traced


def _weighted(slopes: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Sum over the first axis with weights."""
    return torch.tensordot(torch.tensor(weights, dtype=slopes.dtype, device=slopes.device), slopes, 1)


def _baselines(leaves: Leaves, baseline: Any) -> list[Tensor]:
    if baseline is None:
        return [torch.zeros_like(t) for t in leaves.tensors]
    if isinstance(leaves.x, Tensor):
        given = {None: baseline}
    elif isinstance(leaves.x, dict):
        given = dict(baseline)
    else:
        given = dict(enumerate(baseline))
    starts = []
    for key, value in leaves.items:
        if key in leaves.floating:
            start = torch.as_tensor(given.get(key, 0), dtype=value.dtype, device=value.device)
            try:
                starts.append(start.expand_as(value))
            except RuntimeError:
                raise ValueError(
                    f"`baseline` must broadcast to `x`, {list(value.shape)}, got {list(start.shape)}."
                ) from None
    return starts
