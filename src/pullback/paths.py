"""Integrals of the gradient along a path.

A *path* leads from a baseline to the input, or from a baseline's activation at a layer to the input's. Most methods
here are one sum, `integral`: over points of the path, of a weight times a term made of point and velocity. They
differ in the points, and in the term: velocity times gradient for the family of integrated gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.func import vjp

from pullback import maps
from pullback._batch import chunks, folded, repeated, unfolded
from pullback._call import (
    Inputs,
    Leaves,
    Model,
    Params,
    Pulled,
    Select,
    Target,
    activations,
    cotangent,
    public,
    pullback,
    run,
    score,
)
from pullback._levels import jvp
from pullback._native import layer_norm
from pullback._ops import Table
from pullback._random import Seed, normal, uniform
from pullback.rules import Rules, table_of

Path: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"
Tensors: TypeAlias = "Sequence[Tensor]"
Point: TypeAlias = "tuple[Tensors, Tensors]"
Quadrature = Literal["gauss_legendre", "riemann_left", "riemann_right", "riemann_middle", "trapezoid"]


# -- the engine


@dataclass(frozen=True)
class Course:
    """What runs along a path: the model and its target, from the input or from a layer on."""

    params: Params
    model: Model
    x: Inputs
    target: Target
    output: Select
    table: Table | None
    strict: bool
    layer: str = ""
    at: str = "output"

    def place(self, x: Inputs) -> tuple[Tensor, ...]:
        """Give where `x` lies: its tensors, or the layer's activations."""
        return activations(self.params, self.model, x, self.layer, self.at)

    def pulled(self, points: Tensors) -> tuple[Pulled, Target]:
        """Run the model at points ``[point batch ...]``; give the target of each as well."""
        leaves, count = Leaves(self.x), len(points[0])
        given = [folded(point) for point in points]

        def copies(v: Any) -> Any:
            return repeated(v, count, leaves.batch)

        tensors = [copies(t) for t in leaves.tensors] if self.layer else given
        x = leaves.rebuild(tensors, copies)
        where = {"layer": self.layer, "at": self.at, "output": self.output, "table": self.table, "strict": self.strict}
        return pullback(self.params, self.model, x, **where, given=given), copies(self.target)

    def slopes(self, points: Tensors) -> tuple[Tensor, list[Tensor]]:
        """Give scores ``[point batch]`` and gradients ``[point batch ...]`` at points ``[point batch ...]``."""
        pulled, target = self.pulled(points)
        slopes = pulled.pull(cotangent(pulled.output, target))
        count = len(points[0])
        return unfolded(score(pulled.output, target), count), [unfolded(g, count) for g in slopes]

    def scores(self, points: Tensors) -> Tensor:
        """Give scores ``[point batch]``."""
        pulled, target = self.pulled(points)
        return unfolded(score(pulled.output, target), len(points[0]))

    def result(self, attributions: Tensors) -> Any:
        """Give attributions the structure of `x`; at a layer, the sum over its calls."""
        if not self.layer:
            return Leaves(self.x).rebuild(attributions, lambda v: None)
        if any(a.shape != attributions[0].shape for a in attributions):
            raise ValueError(
                f"`layer` names `{self.layer}`, whose calls have activations of different shapes: choose one, "
                f"`{self.layer}#0` to `{self.layer}#{len(attributions) - 1}`."
            )
        return sum(attributions[1:], attributions[0])


def integral(
    term: Callable[[Tensors, Tensors], Tensors],
    point: Callable[[int], Point],
    weights: Sequence[float],
    chunk_size: int | None,
) -> list[Tensor]:
    """Sum weight times term over the points of a path.

    `point(k)` gives the k-th point and the velocity there, each as tensors ``[batch ...]``. `term` takes points and
    velocities ``[point batch ...]`` and gives such tensors; the sum is over their first axis.
    """
    total: list[Tensor] = []
    for part in chunks(len(weights), chunk_size):
        points, velocities = stacked([point(k) for k in part])
        terms = term(points, velocities)
        summed = [_weighted(t, weights[part.start : part.stop]) for t in terms]
        total = [a + b for a, b in zip(total, summed, strict=True)] if total else summed
    return total


def stacked(points: Sequence[Point]) -> Point:
    """Stack points and velocities: ``[point batch ...]``."""
    places, velocities = zip(*points, strict=True)
    return [torch.stack(t) for t in zip(*places, strict=True)], [torch.stack(t) for t in zip(*velocities, strict=True)]


def _weighted(terms: Tensor, weights: Sequence[float]) -> Tensor:
    """Sum over the first axis with weights."""
    return torch.tensordot(torch.tensor(weights, dtype=terms.dtype, device=terms.device), terms, 1)


def straight(start: Tensor, end: Tensor, alpha: Tensor) -> Tensor:
    """The straight line."""
    return start + alpha * (end - start)


def on_path(path: Path, starts: Tensors, ends: Tensors, alpha: float) -> Point:
    """Give a path's point and velocity at `alpha`."""
    if path is straight:
        points = [start + alpha * (end - start) for start, end in zip(starts, ends, strict=True)]
        return points, [end - start for start, end in zip(starts, ends, strict=True)]
    at = torch.full((), alpha, dtype=ends[0].dtype, device=ends[0].device)

    def places(alpha: Tensor) -> tuple[Tensor, ...]:
        return tuple(path(start, end, alpha) for start, end in zip(starts, ends, strict=True))

    return jvp(places, (at,), (torch.ones_like(at),))  # pyright: ignore[reportReturnType]


def quadrature_of(name: str, steps: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Give nodes and weights on [0, 1], in float64."""
    if name not in ("gauss_legendre", "riemann_left", "riemann_right", "riemann_middle", "trapezoid"):
        raise ValueError(
            "`quadrature` must be 'gauss_legendre', 'riemann_left', 'riemann_right', 'riemann_middle' or 'trapezoid', "
            f"got {name!r}."
        )
    least = 2 if name == "trapezoid" else 1
    if steps < least:
        raise ValueError(f"`steps` must be at least {least}, got {steps}.")
    if name == "gauss_legendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return tuple(((1 + nodes) / 2).tolist()), tuple((weights / 2).tolist())
    if name == "trapezoid":
        ends = {0, steps - 1}
        return (
            tuple(k / (steps - 1) for k in range(steps)),
            tuple((0.5 if k in ends else 1.0) / (steps - 1) for k in range(steps)),
        )
    shift = {"riemann_left": 0.0, "riemann_middle": 0.5, "riemann_right": 1.0}[name]
    return tuple((k + shift) / steps for k in range(steps)), (1 / steps,) * steps


quadrature_of._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # not traced


def needs_floating(x: Inputs) -> None:
    if not Leaves(x).floating:
        raise TypeError("`x` holds no floating-point tensor, so no path leads to it. Name a `layer`, or cast `x`.")


def starts_of(x: Inputs, baseline: Any) -> list[Any]:
    """Give the baselines, each with the structure of `x` and broadcast to it; a list means several."""
    leaves = Leaves(x)
    several = baseline if isinstance(baseline, list) else [baseline]
    if not several:
        raise ValueError("`baseline` must not be an empty list.")
    return [_start(leaves, one) for one in several]


def _start(leaves: Leaves, baseline: Any) -> Any:
    if isinstance(leaves.x, Tensor):
        given: dict[Any, Any] = {None: baseline}
    elif isinstance(leaves.x, dict):
        given = dict(baseline or {})
    else:
        given = dict(enumerate(baseline or ()))
    unknown = set(given) - {key for key, _ in leaves.items}
    if unknown:
        raise ValueError(f"`baseline` must have the structure of `x`; `x` has nothing at {sorted(map(str, unknown))}.")

    def start(key: Any, value: Tensor | None) -> Tensor | None:
        if value is None or (key not in leaves.floating and given.get(key) is None):
            return value
        chosen = given.get(key)
        tensor = torch.as_tensor(0 if chosen is None else chosen, dtype=value.dtype, device=value.device)
        try:
            return tensor.expand_as(value)
        except RuntimeError:
            raise ValueError(
                f"`baseline` must broadcast to `x`, {list(value.shape)}, got {list(tensor.shape)}."
            ) from None

    values = {key: start(key, value) for key, value in leaves.items}
    if isinstance(leaves.x, Tensor):
        return values[None]
    return tuple(values.values()) if isinstance(leaves.x, tuple) else values


def _ends(course: Course, baseline: Any) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Give the places where the paths start, and where they end."""
    if not course.layer:
        needs_floating(course.x)
    end = course.place(course.x)
    if baseline is None and course.layer and not Leaves(course.x).floating:
        return [tuple(torch.zeros_like(a) for a in end)], end
    return [course.place(start) for start in starts_of(course.x, baseline)], end


def _gap(course: Course, attributions: Tensors, starts: Sequence[Tensors], end: Tensors) -> Tensor:
    """Sum of the attributions, less the difference in score between the end and the mean start."""
    total = sum(a.flatten(1).sum(1) for a in attributions)
    first = [torch.stack(t) for t in zip(*starts, strict=True)]
    return total - (course.scores([t.unsqueeze(0) for t in end])[0] - course.scores(first).mean(0))


# -- the family of integrated gradients


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
    chunk_size: int | None = None,
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
        chunk_size: Points evaluated together. All of them if omitted.
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
    starts, end = _ends(course, baseline)

    def point(k: int) -> Point:
        return on_path(path, starts[k // steps], end, nodes[k % steps])

    def term(points: Tensors, velocities: Tensors) -> Tensors:
        return [v * g for v, g in zip(velocities, course.slopes(points)[1], strict=True)]

    a = integral(term, point, [w / len(starts) for w in weights] * len(starts), chunk_size)
    if not return_info:
        return course.result(a)
    first = [on_path(path, start, end, 0.0)[0] for start in starts]
    return course.result(a), {"gap": _gap(course, a, first, end)}


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
    chunk_size: int | None = None,
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
        seed, chunk_size: See `smooth_grad`.

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
        ends = (
            course.place(leaves.rebuild(_noisy(leaves.tensors, noise, seed, index), lambda v: v))
            if noise and leaves.floating
            else end
        )
        starts = [
            pool.index_select(0, (choice * len(pool)).long().reshape(1)).to(e)
            for pool, e in zip(data, ends, strict=True)
        ]
        velocities = [e - start for start, e in zip(starts, ends, strict=True)]
        return [s + alpha.to(v.dtype) * v for s, v in zip(starts, velocities, strict=True)], velocities

    def term(points: Tensors, velocities: Tensors) -> Tensors:
        return [v * g for v, g in zip(velocities, course.slopes(points)[1], strict=True)]

    return course.result(integral(term, point, (1 / samples,) * samples, chunk_size))


def _noisy(tensors: Tensors, noise: float, seed: Seed, index: Tensor) -> list[Tensor]:
    return [t + noise * normal(seed, index, t.shape[1:], t.dtype, 1 + stream) for stream, t in enumerate(tensors)]


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
    chunk_size: int | None = None,
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
        steps, quadrature, chunk_size, return_info: See `integrated_gradients`.

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

    return integrated_gradients(
        params,
        model,
        x,
        target,
        steps=steps,
        quadrature=quadrature,
        path=sharpen,
        chunk_size=chunk_size,
        rules=rules,
        output=output,
        strict=strict,
        return_info=return_info,
    )


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
    chunk_size: int | None = None,
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
        baseline, path, chunk_size: See `integrated_gradients`; one baseline.
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
    (start, *_), end = _ends(course, baseline)
    total: list[Tensor] = []
    before: tuple[Tensor, list[Tensor]] | None = None  # score and shares of the last point of the chunk before
    for part in chunks(steps + 1, chunk_size):
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


# -- paths that look at the gradient, or at words


@public
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
    rules: Rules = None,
    output: Select = None,
    strict: bool = False,
) -> Any:
    r"""Integrate the gradient along a path that moves first the features with the smallest gradient.

    Each step brings the point nearer to the input by the same distance in the 1-norm. It moves the `fraction` of
    features with the smallest absolute gradient, then the next, none further ahead of or behind the straight line than
    `max_distance`, until the distance is used up. The path avoids regions of high curvature, where gradients explain
    the path more than the model. Adds up to the difference in score between input and baseline, up to the error of the
    sum over steps. Costs `steps` gradients, one after the other.

    Args:
        params, model, x, target, rules, output, strict: See `gradient`.
        baseline: See `integrated_gradients`; one baseline.
        steps: Steps of the path.
        fraction: Share of the features that moves at once.
        max_distance: How far a feature may leave the straight line, as a fraction of its way.

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
    course = Course(params, model, x, target, output, table_of(rules), strict)
    (start, *_), end = _ends(course, baseline)
    shapes = [t.shape for t in end]
    start, end = (torch.cat([t.flatten(1) for t in tensors], 1) for tensors in (start, end))
    point, total = start, torch.zeros_like(start)
    for k in range(1, steps + 1):
        parts = _parts(point, shapes)
        slope = torch.cat([g[0].flatten(1) for g in course.slopes([p.unsqueeze(0) for p in parts])[1]], 1)
        moved = _moved(point, start, end, slope, k / steps, fraction, max_distance)
        total = total + (moved - point) * slope
        point = moved
    return course.result(_parts(total, shapes))


def _parts(joined: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Cut ``[batch feature]`` into tensors of these shapes."""
    parts = joined.split([math.prod(shape[1:]) for shape in shapes], 1)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _moved(
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


@public
def discretised_integrated_gradients(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    words: Tensor,
    layer: str = "",
    at: str = "output",
    baseline: Any = None,
    steps: int = 30,
    neighbours: int = 50,
    strategy: Literal["greedy", "max_count"] = "greedy",
    chunk_size: int | None = None,
    rules: Rules = None,
    output: Select = None,
    strict: bool = False,
) -> Any:
    r"""Integrate the gradient along paths between words that pass near words.

    .. math:: a = \sum_k \tfrac{1}{2} (g_k + g_{k+1}) \odot (z_k - z_{k+1}), \quad
              z_0 = x, \; z_\text{steps} = b, \; g_k = \nabla f(z_k)

    A straight line between embeddings leads through points that mean nothing to a language model. Here each step goes
    to one of the `neighbours` nearest words of the word before, made monotonic: an entry that does not lie between the
    point and the baseline is replaced by that of an equal step on the straight line. Adds up to the difference in score
    between input and baseline, up to the error of the trapezoidal sum. Costs `steps` gradients.

    Args:
        params, model, x, target, rules, output, strict: See `gradient`.
        words: The embeddings, ``[word channel]``, such as ``params["embed.weight"]``.
        layer, at: Where the embeddings ``[batch token channel]`` are; ``""`` where `x` holds them.
        baseline, chunk_size: See `integrated_gradients`; one baseline.
        steps: Steps of the path.
        neighbours: Words to choose from at each step.
        strategy: ``"greedy"`` chooses the word that its monotonic form is nearest to, ``"max_count"`` the one with most
            monotonic entries.

    Returns:
        Attribution ``[batch token channel]``, signed, in units of the score.

    Raises:
        ValueError: If `steps` or `neighbours` is less than 1, or `words` do not fit the embeddings.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2))
        >>> params, x = params_of(model), torch.tensor([[1, 4, 6]])
        >>> words = params["0.weight"]
        >>> a = discretised_integrated_gradients(params, model, x, 0, words=words, layer="0", baseline=0)
        >>> torch.allclose(a.sum((1, 2)), (model(x) - model(0 * x))[:, 0], atol=1e-4)  # linear from the layer on
        True

    Reference:
        Sanyal & Ren, Discretized Integrated Gradients for Explaining Language Models, 2021, sec. 3.
    """
    for name, value in (("steps", steps), ("neighbours", neighbours)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if strategy not in ("greedy", "max_count"):
        raise ValueError(f"`strategy` must be 'greedy' or 'max_count', got {strategy!r}.")
    course = Course(params, model, x, target, output, table_of(rules), strict, layer, at)
    (start, *_), end = _ends(course, baseline)
    if len(end) != 1 or words.ndim != 2 or end[0].shape[-1] != words.shape[-1]:
        shapes = ", ".join(str(list(t.shape)) for t in end)
        raise ValueError(f"`words` must be [word channel] for embeddings {shapes}, got {list(words.shape)}.")
    places = _word_path(end[0], start[0], words.to(end[0]), steps, neighbours, strategy)
    steps_taken = [b - a for a, b in zip(places[1:], places, strict=False)]
    none = torch.zeros_like(end[0])

    def point(k: int) -> Point:  # each gradient counts for half of the step before and half of the step after
        before, after = (steps_taken[j] if 0 <= j < steps else none for j in (k - 1, k))
        return [places[k]], [(before + after) / 2]

    def term(points: Tensors, velocities: Tensors) -> Tensors:
        return [v * g for v, g in zip(velocities, course.slopes(points)[1], strict=True)]

    return course.result(integral(term, point, (1.0,) * (steps + 1), chunk_size))


def _word_path(end: Tensor, start: Tensor, words: Tensor, steps: int, neighbours: int, strategy: str) -> list[Tensor]:
    """Give points from `end` to `start`, each in every entry between the one before and `start`."""
    neighbours = min(neighbours, len(words) - 1)
    wide = words.to(torch.promote_types(words.dtype, torch.float32))
    places, anchor = [end], end.detach()
    for left in range(steps, 1, -1):
        place = places[-1]
        nearest = (
            torch.cdist(anchor.to(wide.dtype), wide).topk(neighbours + 1, largest=False).indices[..., 1:]
        )  # but itself
        near = words[nearest]  # [batch token neighbour ...]
        here, there = place.unsqueeze(-2), start.unsqueeze(-2)
        between = (near - here) * (near - there) <= 0
        monotonic = torch.where(between, near, here + (there - here) / left)
        if strategy == "greedy":
            cost = (monotonic - near).norm(dim=-1)
        else:
            cost = -between.sum(-1)
        best = cost.argmin(-1)[..., None, None].expand(*cost.shape[:-1], 1, words.shape[1])
        places.append(monotonic.gather(-2, best).squeeze(-2))
        anchor = near.gather(-2, best).squeeze(-2).detach()
    return [*places, start]


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
    rows = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).reshape(-1, 1, *x.shape[1:])

    def row_slopes(place: Tensor) -> Tensor:
        def attribution(place: Tensor) -> Tensor:
            options = {"baseline": start, "steps": steps, "output": output, "strict": strict}
            return method(params, model, place, target, rules=_SMOOTH, **options)

        a, pull = vjp(attribution, place)  # pyright: ignore[reportAssignmentType]
        return torch.vmap(lambda row: pull(row.expand_as(a))[0], chunk_size=chunk_size)(rows)

    total = sum(w * row_slopes(start + node * (x - start)) for node, w in zip(nodes, weights, strict=True))
    interactions = ((x - start) * total).movedim(0, 1)
    return interactions.reshape(len(x), *x.shape[1:], *x.shape[1:])
