"""Expected gradients: integrated gradients averaged over baselines."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pullback._core.call import Call, InputTree
from pullback._core.entry import method
from pullback._core.types import ChunkSize, Inputs, Layer, Model, Output, Params, Progress, Target
from pullback._torch.random import Seed, normal, uniform
from pullback.attribution.paths._along import slope_along
from pullback.attribution.paths._quadrature import (
    Point,
    integral,
)
from pullback.rules._table import Rules, table_of


@method("paths", small={"samples": 2, "noise": 0.1}, forwards=lambda o: o["samples"], reads=2, mechanism="formula")
def expected_gradients(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    baselines: Any,
    samples: int = 50,
    noise: float = 0.0,
    seed: Seed = 0,
    layer: str | Layer = "",
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
    rules: Rules = None,
    output: Output = None,
) -> Any:
    r"""Average integrated gradients over baselines, by random baselines and random points on their paths.

    .. math:: a = E_{b \sim D, \, \alpha \sim U(0, 1)} \big[ (x - b) \odot \nabla f(b + \alpha (x - b)) \big]

    With `noise` it is GradientSHAP, which also moves the input by Gaussian noise for each sample. Attributions add up,
    in expectation, to the score less the mean score over baselines. Costs `samples` gradients. All examples of a batch
    share the draws.

    Args:
        params, model, x, target, layer, rules, output: See `gradient`. At a layer the paths lead from the
            baselines' activations to the input's.
        baselines: Data to draw from, with the structure of `x` and an axis of its own in the place of the batch:
            ``[baseline ...]``.
        samples: Draws of a baseline and a point.
        noise: Standard deviation added to the input, in its units.
        seed, chunk_size, progress: See `smooth_grad`.

    Returns:
        Attribution, shaped like `x` or the activation, signed, in units of the score.

    Raises:
        ValueError: If `samples` is less than 1, or `baselines` do not have the shape of examples.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> params, x, b = params_of(model), torch.randn(4, 3), torch.randn(1, 3)
        >>> a = expected_gradients(params, model, x, 0, baselines=b, samples=4)
        >>> torch.allclose(a, (x - b) * model.weight[0], atol=1e-5)  # one baseline, and a linear model
        True

    References:
        Erion et al., Improving Performance of Deep Learning Models with Axiomatic Attribution Priors and Expected
        Gradients, 2021, eq. 3. Lundberg & Lee, A Unified Approach to Interpreting Model Predictions, 2017 (the limit
        of many samples is their gradient-based estimate).
    """
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1, got {samples}.")
    call = Call.bind(params, model, x, layer, table_of(rules), output)
    tree = call.x
    for key, t in zip(tree.floating, tree.tensors, strict=True):
        _check_pool(baselines if key is None else baselines[key], t)
    data, end = call.on(baselines).activations(), call.activations()

    def point(k: int) -> Point:
        index = torch.full((1,), k, device=end[0].device)
        alpha, choice = (uniform(seed, index, (), torch.float64, stream)[0] for stream in (0, 1))
        moved = noise and tree.floating
        ends = call.on(_noisy(tree, noise, seed, index)).activations() if moved else end
        starts = [_drawn(pool, choice).to(e) for pool, e in zip(data, ends, strict=True)]
        velocities = [e - start for start, e in zip(starts, ends, strict=True)]
        return [s + alpha.to(v.dtype) * v for s, v in zip(starts, velocities, strict=True)], velocities

    return call.like(
        integral(partial(slope_along, call, target), point, (1 / samples,) * samples, chunk_size, end, progress)
    )


def _noisy(tree: InputTree, noise: float, seed: Seed, index: Tensor) -> Any:
    """Add noise to an input, the same to all examples."""
    draws = (normal(seed, index, t.shape[1:], t.dtype, 1 + stream) for stream, t in enumerate(tree.tensors))
    return tree.rebuild([t + noise * draw for t, draw in zip(tree.tensors, draws, strict=True)], lambda v: v)


def _drawn(pool: Tensor, choice: Tensor) -> Tensor:
    """Take the example of ``[baseline ...]`` that a number in (0, 1) falls on."""
    return pool.index_select(0, (choice * len(pool)).long().reshape(1))


def _check_pool(pool: Any, value: Tensor) -> None:
    if not isinstance(pool, Tensor) or pool.shape[1:] != value.shape[1:] or not len(pool):
        got = list(pool.shape) if isinstance(pool, Tensor) else type(pool).__name__
        shape = ", ".join(map(str, ["baseline", *value.shape[1:]]))
        raise ValueError(f"`baselines` must be [{shape}], at least one, got {got}.")
