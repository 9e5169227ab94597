r"""Secants in place of derivatives: what DeepLIFT's rescale rule does at an operation.

A first run records what goes into each nonlinear operation, in the order of calls; a second run takes from that tape,
pairs its own inputs with it, and has :math:`\frac{f(x) - f(b)}{x - b}` for a derivative. As both are in the order of
calls, a module that is called twice, or an activation that is no module, is paired rightly.

An operation of several variables is made of elementwise functions, sums and products. A product has the mean of the
other factor for a derivative: :math:`xy - bc = (x - b) \frac{y + c}{2} + (y - c) \frac{x + b}{2}`. So differences add
up through any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp

from pullback._ops.constants import Remembering, constants_only, is_constant, watch_constants
from pullback._ops.dispatch import Rule, Table
from pullback._ops.reading import BILINEAR, LINEAR, PRODUCTS, SUMMED_PRODUCTS, arguments, by_place, summed_product
from pullback._ops.replacements import REPLACEMENTS
from pullback._ops.spellings import ACTIVATIONS, FUNCTIONS, Operation, canonical
from pullback.rules._coordinates import stop_gradient

Tape = list[tuple[Operation, tuple[Any, ...], dict[str, Any]]]
Paired = Callable[..., Any]
CLOSE_INPUTS = 1e-10  # of two inputs, whose secant is the derivative between them
_KINKED = frozenset(
    canonical(getattr(F, name))
    for name in "relu relu6 hardtanh threshold leaky_relu prelu rrelu elu selu celu softshrink hardshrink hardsigmoid "
    "hardswish".split()
) | {canonical(op) for op in (torch.abs, torch.clamp, torch.clamp_min, torch.clamp_max)}
_BENT_AT_0 = frozenset(
    canonical(getattr(torch, name)) for name in "sqrt rsqrt reciprocal pow log log2 log10 lgamma digamma".split()
)

ELEMENTWISE = tuple(
    canonical(getattr(torch if hasattr(torch, name) else F, name))
    for name in [*ACTIVATIONS, *FUNCTIONS, *"clamp clamp_min clamp_max".split()]
    if name != "glu"
)


def secant(function: Callable[..., Tensor], x: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Give ``function(x, ...)``, with the secant to `b` for a derivative.

    Where a smooth function's inputs are close, the difference of its values is mostly rounding: the derivative halfway
    differs from the secant by the square of their distance, for a function that bends without bound at 0 by that of
    their ratio.
    """
    at = stop_gradient(x)
    y, way = function(at, *args, **kwargs), at - b
    close = way.abs() <= _near(function, at, b)
    _, back = vjp(lambda v: function(v, *args, **kwargs), (at + b) / 2)  # pyright: ignore[reportAssignmentType]
    (slope,) = back(torch.ones_like(y))
    rise = y - function(b, *args, **kwargs)
    slope = torch.where(close, slope, rise / torch.where(close, torch.ones_like(way), way))
    return y + slope * (x - at)


def _near(function: Callable[..., Tensor], x: Tensor, b: Tensor) -> Tensor | float:
    """Say how far apart inputs are close."""
    if function in _KINKED:
        return CLOSE_INPUTS
    near = torch.finfo(x.dtype).eps ** (1 / 3)
    return near * torch.minimum(x.abs(), b.abs()) if function in _BENT_AT_0 else near


def product(multiply: Callable[[Any, Any], Tensor], x: Tensor, y: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Give a product of `x` and `y`, each with the mean of the other, at the input and the baseline, for a factor."""
    x_, y_ = stop_gradient(x), stop_gradient(y)
    return multiply(x_, y_) + multiply(x - x_, (y_ + c) / 2) + multiply((x_ + b) / 2, y - y_)


def _elementwise(operation: Operation, x: Tensor, *args: Any, pair: tuple[Any, ...], **kwargs: Any) -> Tensor:
    return secant(operation, x, pair[0], *args, **kwargs)


def _power(operation: Operation, x: Any, exponent: Any, *, pair: tuple[Any, ...]) -> Tensor:
    if not isinstance(exponent, Tensor):
        return secant(operation, x, pair[0], exponent)
    if not isinstance(x, Tensor):
        return secant(lambda v: operation(x, v), exponent, pair[1])
    return NotImplemented


def _product(operation: Operation, *args: Any, pair: tuple[Any, ...], **kwargs: Any) -> Any:
    *before, x, y = args if operation is not torch.einsum or not isinstance(args[-1], list | tuple) else (
        args[0], *args[1]
    )  # fmt: skip
    *_, b, c = pair if operation is not torch.einsum or not isinstance(pair[-1], list | tuple) else (pair[0], *pair[1])
    if len(before) != (operation is torch.einsum) or kwargs:
        return NotImplemented
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or not x.is_floating_point() or not y.is_floating_point():
        return operation(*args)
    return product(lambda u, v: operation(*before, u, v), x, y, b, c)


def _summed(operation: Operation, *args: Any, pair: tuple[Any, ...], **kwargs: Any) -> Any:
    bias, x, y, beta, alpha = summed_product(args, kwargs)
    return beta * bias + alpha * _product(torch.matmul, x, y, pair=pair[1:])


def _linear(operation: Operation, x: Tensor, weight: Tensor, *args: Any, pair: tuple[Any, ...], **kwargs: Any) -> Any:
    """Take a linear map whose weight the network makes for a product."""
    (bias,), rest = arguments(args[:1], kwargs, ("bias", None)), args[1:]
    options = {k: v for k, v in kwargs.items() if k != "bias"}
    y = product(lambda u, v: operation(u, v, None, *rest, **options), x, weight, *pair[:2])
    return y if bias is None else y + (bias if operation is F.linear else bias.reshape(-1, *[1] * (weight.ndim - 2)))


def _quotient(operation: Operation, x: Any, y: Any, *, pair: tuple[Any, ...], **kwargs: Any) -> Any:
    if kwargs:
        return NotImplemented
    b, c = pair
    if not isinstance(y, Tensor) or not y.is_floating_point():
        return operation(x, y)
    inverse = secant(torch.reciprocal, y, c)
    if not isinstance(x, Tensor):
        return x * inverse
    return product(torch.mul, x, inverse, b, c.reciprocal())


def _read(v: Tensor, places: Tensor, axes: int) -> Tensor:
    """Read values at flat places of the last axes."""
    return v.flatten(-axes).gather(-1, places.flatten(-axes)).reshape(places.shape)


def _log_total(x: Tensor, b: Tensor) -> Tensor:
    """Give the logarithm of the sum of exponentials over the last axis: the secants of both, one after the other.

    Both sums are scaled by the largest term of either, and their logarithms taken apart from that, so that a sum that
    vanishes beside the other does no harm.
    """
    at = stop_gradient(x)
    most = torch.maximum(at, b).amax(-1, keepdim=True)
    up, down = (at - most).exp(), (b - most).exp()
    total, total_ = up.sum(-1, keepdim=True), down.sum(-1, keepdim=True)
    y, y_ = at.logsumexp(-1, keepdim=True), b.logsumexp(-1, keepdim=True)
    slopes = _quotients(up - down, at - b, ((at + b) / 2 - most).exp())
    slope = _quotients(y - y_, total - total_, 2 / (total + total_))
    return y + (slope * slopes * (x - at)).sum(-1, keepdim=True)


def _quotients(rise: Tensor, way: Tensor, otherwise: Tensor) -> Tensor:
    close = way.abs() < torch.finfo(way.dtype).eps ** (1 / 3)
    return torch.where(close, otherwise, rise / torch.where(close, torch.ones_like(way), way))


def _softmax(operation: Operation, x: Tensor, *args: Any, pair: tuple[Any, ...], **kwargs: Any) -> Tensor:
    (axis,) = arguments(args[:1], kwargs, ("dim", None))
    if axis is None:
        return NotImplemented
    lowest = torch.finfo(x.dtype).min / 4  # where nothing is attended to
    x, b = (v.movedim(axis, -1).clamp(min=lowest) for v in (x, pair[0]))
    y, y_ = x - _log_total(x, b), b - b.logsumexp(-1, keepdim=True)
    return (y if operation is torch.log_softmax else secant(torch.exp, y, y_)).movedim(-1, axis)


def _standardised(x: Tensor, b: Tensor, axes: Sequence[int], eps: float, centred: bool = True) -> Tensor:
    axes = tuple(axes)
    if centred:
        x, b = x - x.mean(axes, keepdim=True), b - b.mean(axes, keepdim=True)
    spread = secant(torch.square, x, b).mean(axes, keepdim=True) + eps
    spread_ = b.square().mean(axes, keepdim=True) + eps
    return product(torch.mul, x, secant(torch.rsqrt, spread, spread_), b, spread_.rsqrt())


def _weighted(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _layer_norm(
    operation: Operation, x: Tensor, shape: Any, *args: Any, pair: tuple[Any, ...], **kwargs: Any
) -> Tensor:
    axes = tuple(range(-len(shape), 0))
    if operation.__name__ == "rms_norm":
        weight, eps = arguments(args, kwargs, ("weight", None), ("eps", None))
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return _weighted(_standardised(x, pair[0], axes, eps, centred=False), weight, None)
    weight, bias, eps = arguments(args[:3], kwargs, ("weight", None), ("bias", None), ("eps", 1e-5))
    return _weighted(_standardised(x, pair[0], axes, eps), weight, bias)


def _by_channel(v: Tensor | None, x: Tensor) -> Tensor | None:
    return None if v is None else v.reshape(-1, *[1] * (x.ndim - 2))


def _group_norm(
    operation: Operation, x: Tensor, groups: int, *args: Any, pair: tuple[Any, ...], **kwargs: Any
) -> Tensor:
    weight, bias, eps = arguments(args[:3], kwargs, ("weight", None), ("bias", None), ("eps", 1e-5))
    grouped, grouped_ = (v.reshape(v.shape[0], groups, -1) for v in (x, pair[0]))
    y = _standardised(grouped, grouped_, (2,), eps).reshape_as(x)
    return _weighted(y, _by_channel(weight, x), _by_channel(bias, x))


def instance_norm(operation: Operation, x: Tensor, *args: Any, pair: tuple[Any, ...], **kwargs: Any) -> Tensor:
    mean, var, weight, bias, own, _, eps = arguments(
        args, kwargs, ("running_mean", None), ("running_var", None), ("weight", None), ("bias", None),
        ("use_input_stats", True), ("momentum", 0.1), ("eps", 1e-5),
    )  # fmt: skip
    weight, bias, mean, var = (_by_channel(v, x) for v in (weight, bias, mean, var))
    if not own and mean is not None and var is not None:
        return _weighted((x - mean) * (var + eps).rsqrt(), weight, bias)
    return _weighted(_standardised(x, pair[0], range(2, x.ndim), eps), weight, bias)


def _gated(operation: Operation, x: Tensor, dim: int = -1, *, pair: tuple[Any, ...]) -> Tensor:
    (value, gate), (value_, gate_) = x.chunk(2, dim), pair[0].chunk(2, dim)
    return product(torch.mul, value, secant(torch.sigmoid, gate, gate_), value_, gate_.sigmoid())


def _larger(operation: Operation, x: Tensor, y: Tensor, *, pair: tuple[Any, ...]) -> Tensor:
    b, c = pair
    sign = 1 if operation is torch.maximum else -1
    return x + sign * secant(torch.relu, sign * (y - x), sign * (c - b))


def _largest(x: Tensor, b: Tensor, largest: Callable[[Tensor], tuple[Tensor, Tensor]], axes: int) -> Tensor:
    """Give the largest values, whose difference is shared between the places where they are, at `x` and at `b`."""
    at = stop_gradient(x)
    (y, here), (y_, there) = largest(at), largest(b)
    larger = torch.maximum(y, y_)
    for places, gained in ((here, larger - y_), (there, y - larger)):
        way = _read(at - b, places, axes)
        flat = way.abs() < CLOSE_INPUTS
        share = torch.where(flat, torch.zeros_like(way), gained / torch.where(flat, torch.ones_like(way), way))
        y = y + share * _read(x - at, places, axes)
    return y


def _max_pool(operation: Operation, x: Tensor, *args: Any, pair: tuple[Any, ...], **kwargs: Any) -> Any:
    """Share the difference of the two maxima between the places where they are."""
    if kwargs.pop("return_indices", False):
        return NotImplemented
    spatial = int(operation.__name__[-2])
    return _largest(x, pair[0], lambda v: operation(v, *args, return_indices=True, **kwargs), spatial)


def _max_pool_and_places(
    operation: Operation, x: Tensor, *args: Any, pair: tuple[Any, ...], **kwargs: Any
) -> tuple[Tensor, Tensor]:
    spatial = next(int(c) for c in operation.__name__ if c.isdigit())
    y = _largest(x, pair[0], lambda v: operation(v, *args, **kwargs), spatial)
    return y, operation(stop_gradient(x), *args, **kwargs)[1]


def _rules() -> dict[Operation, Paired]:
    rules: dict[Operation, Paired] = dict.fromkeys(ELEMENTWISE, _elementwise)
    rules |= dict.fromkeys((*PRODUCTS, *BILINEAR), _product)
    rules |= dict.fromkeys(SUMMED_PRODUCTS, _summed)
    rules |= dict.fromkeys(LINEAR, _linear)
    rules |= {torch.pow: _power, torch.div: _quotient, torch.softmax: _softmax, torch.log_softmax: _softmax}
    rules |= {torch.layer_norm: _layer_norm, torch.group_norm: _group_norm, F.instance_norm: instance_norm}
    rules |= {F.glu: _gated, torch.maximum: _larger, torch.minimum: _larger}
    if hasattr(torch, "rms_norm"):  # newer than the oldest torch
        rules[torch.rms_norm] = _layer_norm
    for kind in ("", "adaptive_"):
        rules |= {getattr(F, f"{kind}max_pool{n}d"): _max_pool for n in (1, 2, 3)}
        rules |= {getattr(F, f"{kind}max_pool{n}d_with_indices"): _max_pool_and_places for n in (1, 2, 3)}
    rules[torch.adaptive_max_pool1d] = _max_pool_and_places
    return {canonical(operation): rule for operation, rule in rules.items()}


RULES = _rules()
MUST_COVER = (
    *(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, torch.prod, torch.var, torch.std, torch.max, torch.min),
    *(torch.amax, torch.amin, F.bilinear, F.normalize, F.local_response_norm, F.lp_pool1d, F.lp_pool2d, F.softmin),
    *(torch.cumprod, torch.tensordot, torch.addmv, torch.addbmm, torch.addcmul, torch.addcdiv, torch.lerp, torch.norm),
    *(torch.logsumexp, torch.logcumsumexp, torch.logaddexp, torch.atan2, torch.hypot, torch.xlogy, torch.cdist),
    *(torch.linalg.vector_norm, F.cosine_similarity, F.pairwise_distance, torch.sort, torch.topk, torch.median),
    *(torch.cummax, torch.quantile, torch.linalg.multi_dot, *RULES),  # uses that a rule does not cover
)


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()  # what comes after may write to it
    return tuple(map(_kept, value)) if isinstance(value, list | tuple) else value


def recording(tape: Tape) -> Table:
    """Give the table that runs operations as they are and keeps what goes into them."""

    def rule(operation: Operation, *args: Any, memo: dict[str, Any], **kwargs: Any) -> Any:
        args, kwargs = by_place(operation, args, kwargs)
        if not _is_linear(operation, args, kwargs, memo):
            tape.append((operation, _kept(args), kwargs))
        return _as_it_is(operation, *args, **kwargs)

    return replace(Table.of(dict.fromkeys(RULES, Remembering(rule))), on_operation=watch_constants)


def paired(tape: Tape) -> Table:
    """Give the table that takes secants between what goes into an operation and what the tape has for it."""
    rest = iter(tape)

    def make(take: Paired) -> Rule:
        def rule(operation: Operation, *args: Any, memo: dict[str, Any], **kwargs: Any) -> Any:
            args, kwargs = by_place(operation, args, kwargs)
            if _is_linear(operation, args, kwargs, memo):
                return _as_it_is(operation, *args, **kwargs)
            recorded, pair, _ = next(rest, (None, (), {}))
            if recorded is not operation or _shapes(pair) != _shapes(args):
                raise ValueError(
                    "`baseline` must take the model the way `x` does: their operations differ, first at "
                    f"`{operation.__name__}`. Choose another baseline."
                )
            return take(operation, *args, pair=pair, **kwargs)

        return Remembering(rule)

    def untouched(operation: Operation, *args: Any, memo: dict[str, Any], **kwargs: Any) -> Any:
        return _as_it_is(operation, *args, **kwargs) if constants_only(args, kwargs, memo) else NotImplemented

    rules: dict[Operation, Rule] = dict.fromkeys(map(canonical, MUST_COVER), Remembering(untouched))
    rules |= {op: make(take) for op, take in RULES.items()}
    return replace(Table.of(rules, must_cover=MUST_COVER, name="DeepLIFT's rules"), on_operation=watch_constants)


def _is_linear(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], memo: dict[str, Any]) -> bool:
    """Say whether the derivative is the secant: parameters alone, or a linear map by them."""
    if operation in LINEAR:
        return is_constant(args[1], memo)
    return constants_only(args, kwargs, memo)


def _as_it_is(operation: Operation, *args: Any, **kwargs: Any) -> Any:
    form = REPLACEMENTS.get(operation)
    return operation(*args, **kwargs) if form is None else form(None, operation, *args, **kwargs)


def _shapes(args: Any) -> list[Any]:
    found: list[Any] = []
    for value in args:
        if isinstance(value, Tensor):
            found.append(value.shape)
        elif isinstance(value, list | tuple):
            found += _shapes(value)
    return found
