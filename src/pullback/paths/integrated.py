"""Integrated gradients and their kin: the gradient, or its square, summed along a path that is known beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from pullback import maps
from pullback._batch import Progress, Together, report
from pullback._call import Inputs, Leaves, Model, Params, Select, Target, public, run, score
from pullback._native import layer_norm
from pullback._ops import Table
from pullback._random import Seed, normal, uniform
from pullback._targets import copies
from pullback._torch import eye
from pullback.paths.course import Course, ends_of, gap_of, needs_floating, starts_of
from pullback.paths.quadrature import (
    Path,
    Point,
    Quadrature,
    Tensors,
    integral,
    on_path,
    quadrature_of,
    stacked,
    straight,
)
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
    quadrature: Quadrature = "gauss_legendre",
    path: Path = straight,
    layer: str = "",
    at: str = "output",
    chunk_size: Together = "auto",
    progress: Progress = None,
    rules: Rules = None,
    output: Select = None,
    strict: bool = False,
    return_info: bool = False,
) -> Any:
    r"""Integrate the gradient along a path from a baseline to the input, or to its activation at a layer.

    .. math:: a_i = \int_0^1 \partial_i f(\gamma(\alpha)) \, \dot\gamma_i(\alpha) \, d\alpha
              \overset{\text{straight}}{=} (x_i - b_i) \int_0^1 \partial_i f(b + \alpha (x - b)) \, d\alpha

    The integral is a Gauss-Legendre sum, exact for polynomials up to degree ``2 steps - 1``. Attributions add up to the
    difference in score between the path's ends, up to the error of that sum. Costs `steps` gradients; under `vmap`
    over targets the forwards are shared. Memory follows `chunk_size`, not `steps`.

    Args:
        params, model, x, target, layer, at, rules, output, strict: See `gradient`. A cotangent as `target` is taken as
            it is at each point.
        baseline: Start of the path, with the structure of `x`, broadcast to it. Zeros if omitted. A list means several,
            and the mean over them. With `layer`, the path starts at the baseline's activation, and integer members of
            `x` may have a baseline too; where `x` holds nothing else and none is given, it starts at zero activation.
        steps: Points on the path.
        quadrature: ``"gauss_legendre"``, ``"riemann_left"``, ``"riemann_right"``, ``"riemann_middle"`` or
            ``"trapezoid"``.
        path: From baseline, input (or activations) and `alpha` in [0, 1] to a point, for each tensor; straight if
            omitted. Its velocity is taken by `torch.func.jvp`.
        chunk_size: Points evaluated together: ``"auto"`` for as many as run fast, and under `over_targets` as its
            memory allows; `None` for all.
        progress: Called with (points done, points in all).
        return_info: Return ``(attribution, info)``, where ``info["gap"]``, ``[batch]``, is the sum of the attribution
            less the difference in score. Costs a forward for each end.

    Returns:
        Attribution, shaped like `x` or the activation, signed, in units of the score.

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
    course = Course(params, model, x, target, output, table_of(rules), strict, layer, at)
    nodes, weights = quadrature_of(quadrature, steps)
    starts, end = ends_of(course, baseline)

    def point(k: int) -> Point:
        return on_path(path, starts[k // steps], end, nodes[k % steps])

    a = integral(course.shares, point, [w / len(starts) for w in weights] * len(starts), chunk_size, end, progress)
    if not return_info:
        return course.result(a)
    first = [on_path(path, start, end, 0.0)[0] for start in starts]
    return course.result(a), {"gap": gap_of(course, a, first, end)}


@public
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
    layer: str = "",
    at: str = "output",
    chunk_size: Together = "auto",
    progress: Progress = None,
    rules: Rules = None,
    output: Select = None,
    strict: bool = False,
) -> Any:
    r"""Average integrated gradients over baselines, by random baselines and random points on their paths.

    .. math:: a = E_{b \sim D, \, \alpha \sim U(0, 1)} \big[ (x - b) \odot \nabla f(b + \alpha (x - b)) \big]

    With `noise` it is GradientSHAP, which also moves the input by Gaussian noise for each sample. Attributions add up,
    in expectation, to the score less the mean score over baselines. Costs `samples` gradients. All examples of a batch
    share the draws.

    Args:
        params, model, x, target, layer, at, rules, output, strict: See `gradient`. At a layer the paths lead from the
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
    course, leaves = Course(params, model, x, target, output, table_of(rules), strict, layer, at), Leaves(x)
    if not layer:
        needs_floating(x)
    for key, t in zip(leaves.floating, leaves.tensors, strict=True):
        _check_pool(baselines if key is None else baselines[key], t)
    data, end = course.place(baselines), course.place(x)

    def point(k: int) -> Point:
        index = torch.full((1,), k, device=end[0].device)
        alpha, choice = (uniform(seed, index, (), torch.float64, stream)[0] for stream in (0, 1))
        moved = noise and leaves.floating
        ends = course.place(_noisy(leaves, noise, seed, index)) if moved else end
        starts = [_drawn(pool, choice).to(e) for pool, e in zip(data, ends, strict=True)]
        velocities = [e - start for start, e in zip(starts, ends, strict=True)]
        return [s + alpha.to(v.dtype) * v for s, v in zip(starts, velocities, strict=True)], velocities

    return course.result(integral(course.shares, point, (1 / samples,) * samples, chunk_size, end, progress))


def _noisy(leaves: Leaves, noise: float, seed: Seed, index: Tensor) -> Any:
    """Add noise to an input, the same to all examples."""
    draws = (normal(seed, index, t.shape[1:], t.dtype, 1 + stream) for stream, t in enumerate(leaves.tensors))
    return leaves.rebuild([t + noise * draw for t, draw in zip(leaves.tensors, draws, strict=True)], lambda v: v)


def _drawn(pool: Tensor, choice: Tensor) -> Tensor:
    """Take the example of ``[baseline ...]`` that a number in (0, 1) falls on."""
    return pool.index_select(0, (choice * len(pool)).long().reshape(1))


def _check_pool(pool: Any, value: Tensor) -> None:
    if not isinstance(pool, Tensor) or pool.shape[1:] != value.shape[1:] or not len(pool):
        got = list(pool.shape) if isinstance(pool, Tensor) else type(pool).__name__
        shape = ", ".join(map(str, ["baseline", *value.shape[1:]]))
        raise ValueError(f"`baselines` must be [{shape}], at least one, got {got}.")


@public
def blur_integrated_gradients(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    sigma: float = 0.2,
    steps: int = 50,
    quadrature: Quadrature = "gauss_legendre",
    padding: str = "replicate",
    chunk_size: Together = "auto",
    progress: Progress = None,
    rules: Rules = None,
    output: Select = None,
    strict: bool = False,
    return_info: bool = False,
) -> Any:
    r"""Integrate the gradient along the path from the blurred input to the input.

    .. math:: a = \int_0^1 \nabla f(\gamma(\alpha)) \odot \dot\gamma(\alpha) \, d\alpha, \quad
              \gamma(\alpha) = G_{(1 - \alpha) \sigma} * x

    The path adds detail without a baseline's colour. Attributions add up to the difference in score between the input
    and its blurred form. Costs `steps` gradients. The velocity of the path is exact; the reference implementation takes
    differences.

    Args:
        params, model, x, target, rules, output, strict: See `gradient`; `x` is ``[batch channel ...]``.
        sigma: Standard deviation of the Gaussian at the start, as a fraction of the longer side.
        padding: What lies beyond the border: see `pullback.maps.smooth`.
        steps, quadrature, chunk_size, progress, return_info: See `integrated_gradients`.

    Returns:
        Attribution, shaped like `x`, signed, in units of the score.

    Raises:
        ValueError: If `sigma` is not positive.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
        >>> params, x = params_of(model), torch.ones(1, 1, 8, 8)
        >>> a = blur_integrated_gradients(params, model, x, 0)  # a flat image loses nothing by blur
        >>> torch.allclose(a, torch.zeros_like(a), atol=1e-5)
        True

    Reference:
        Xu, Venugopalan & Sundararajan, Attribution in Scale and Space, 2020, sec. 3.
    """
    if not sigma > 0:
        raise ValueError(f"`sigma` must be a positive fraction of the longer side, got {sigma}.")
    if any(t.ndim < 3 for t in Leaves(x).tensors):
        raise ValueError("`x` must have spatial axes, [batch channel ...], to be blurred.")

    def sharpen(start: Tensor, end: Tensor, alpha: Tensor) -> Tensor:
        widest = sigma * max(end.shape[2:])
        return maps.blurred(end, (1 - alpha) * widest, math.ceil(4 * widest), padding)

    sums: dict[str, Any] = {"steps": steps, "quadrature": quadrature, "path": sharpen}
    sums |= {"chunk_size": chunk_size, "progress": progress}
    where: dict[str, Any] = {"rules": rules, "output": output, "strict": strict}
    return integrated_gradients(params, model, x, target, **sums, **where, return_info=return_info)


@public
def idgi(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    baseline: Any = None,
    steps: int = 50,
    path: Path = straight,
    chunk_size: Together = "auto",
    progress: Progress = None,
    rules: Rules = None,
    output: Select = None,
    strict: bool = False,
) -> Any:
    r"""Share out each step's change in score by the squared gradient: the part of a path that matters to the score.

    .. math:: a = \sum_k \frac{g_k \odot g_k}{\|g_k\|^2} \big(f(x_{k+1}) - f(x_k)\big), \quad g_k = \nabla f(x_k)

    The direction of each step is taken as that of the gradient, which leaves out the noise of directions that do not
    change the score. Adds up to the difference in score between the path's ends exactly, for any number of steps, where
    no gradient is zero. Costs `steps` gradients and a forward.

    Args:
        params, model, x, target, rules, output, strict: See `gradient`.
        baseline, path, chunk_size, progress: See `integrated_gradients`; one baseline.
        steps: Equal steps of the path.

    Returns:
        Attribution, shaped like `x`, signed by the change of score alone, in units of the score.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.ones(4, 3)
        >>> a = idgi(params, model, x, target=0, steps=3)
        >>> torch.allclose(a.sum(1), model(x)[:, 0] - model(0 * x)[:, 0], atol=1e-5)
        True

    Reference:
        Yang, Wang & Bilgic, IDGI: A Framework to Eliminate Explanation Noise from Integrated Gradients, 2023, sec. 4.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    course = Course(params, model, x, target, output, table_of(rules), strict)
    (start, *_), end = ends_of(course, baseline)
    total: list[Tensor] = []
    before: tuple[Tensor, list[Tensor]] | None = None  # score and shares of the last point of the chunk before
    for part in copies(steps + 1, chunk_size, end, progress):
        scores, slopes = course.slopes(stacked([on_path(path, start, end, k / steps) for k in part])[0])
        shares = _shares(slopes)
        if before is not None:
            scores = torch.cat([before[0], scores])
            shares = [torch.cat(pair) for pair in zip(before[1], shares, strict=True)]
        change = scores.diff(dim=0)
        moves = [(s[:-1] * change.reshape(*change.shape, *[1] * (s.ndim - 2))).sum(0) for s in shares]
        total = [a + b for a, b in zip(total, moves, strict=True)] if total else moves
        before = scores[-1:], [s[-1:] for s in shares]
    return course.result(total)


def _shares(slopes: Tensors) -> list[Tensor]:
    """Give squares of ``[point batch ...]`` that add up to 1 for each point and example, or to 0 where all are 0."""
    norm = sum(g.flatten(2).square().sum(2) for g in slopes)
    assert isinstance(norm, Tensor)
    norm = torch.where(norm == 0, torch.ones_like(norm), norm)
    return [g.square() / norm.reshape(*norm.shape, *[1] * (g.ndim - 2)) for g in slopes]


# the third derivative of torch's own layer norm is wrong
_SMOOTH = Table.of({torch.nn.functional.layer_norm: lambda operation, *args, **kwargs: layer_norm(*args, **kwargs)})


@public
def integrated_hessians(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    baseline: Any = None,
    steps: int = 8,
    chunk_size: int | None = None,
    progress: Progress = None,
    output: Select = None,
    strict: bool = False,
    method: Callable[..., Any] = integrated_gradients,
) -> Tensor:
    r"""Explain an explanation: integrated gradients of each entry of integrated gradients, the pairs' interactions.

    .. math:: \Gamma_{ij} = (x_j - b_j) \int_0^1 \partial_j \, a_i(b + \beta (x - b)) \, d\beta

    with the attribution :math:`a_i` that integrated gradients give. Symmetric; rows add up to the attribution, all of
    it to the difference in score, up to the error of the sums. Smooth activations are needed: a ReLU has no second
    derivative. Costs about ``steps**2`` second-order gradients a feature.

    Args:
        params, model, x, target, output, strict: See `gradient`; `x` is one tensor.
        baseline, steps: See `integrated_gradients`; one baseline.
        chunk_size: Features whose row is pulled back together. All of them if omitted.
        progress: Called with (steps done, steps in all).
        method: What is explained: any attribution with the options `baseline`, `steps`, `rules`, `output` and `strict`.

    Returns:
        Interactions ``[batch *features *features]``, in units of the score.

    Raises:
        ValueError: If `steps` is less than 1.
        TypeError: If `x` is not one tensor.

    Example:
        >>> model = lambda params, x: x[:, 0] * x[:, 1]
        >>> h = integrated_hessians({}, model, torch.tensor([[3.0, 5.0]]), None)
        >>> torch.allclose(h[0], torch.tensor([[3.75, 3.75], [3.75, 3.75]]))
        True

    Reference:
        Janizek, Sturmfels & Lee, Explaining Explanations: Axiomatic Feature Interactions, 2021, eq. 5.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"`x` must be one tensor, got {type(x).__name__}.")
    nodes, weights = quadrature_of("gauss_legendre", steps)
    start = starts_of(x, baseline)[0]
    score(run(params, model, x, output=output), target)  # finds an index that is no class: below it cannot be read
    rows = eye(x[0].numel(), x).reshape(-1, 1, *x.shape[1:])

    def row_slopes(place: Tensor) -> Tensor:
        def attribution(place: Tensor) -> Tensor:
            options = {"baseline": start, "steps": steps, "output": output, "strict": strict}
            return method(params, model, place, target, rules=_SMOOTH, **options)

        a, pull = vjp(attribution, place)  # pyright: ignore[reportAssignmentType]
        return torch.vmap(lambda row: pull(row.expand_as(a))[0], chunk_size=chunk_size)(rows)

    total: Any = 0
    for done, (node, weight) in enumerate(zip(nodes, weights, strict=True), 1):
        total = total + weight * row_slopes(start + node * (x - start))
        report(progress, done, steps)
    interactions = ((x - start) * total).movedim(0, 1)
    return interactions.reshape(len(x), *x.shape[1:], *x.shape[1:])
