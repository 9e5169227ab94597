"""Rules for operations on single numbers, for products and quotients, and for norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pullback._ops.constants import (
    Remembering,
    is_constant,
    mark_constant,
)
from pullback._ops.dispatch import Rule
from pullback._ops.reading import (
    arguments,
)
from pullback._ops.replacements import REPLACEMENTS
from pullback._ops.spellings import Operation
from pullback.rules._coordinates import nonzero, scaled, stop_gradient

# -- relevance: elementwise


def propagated(slope: Callable[..., Tensor]) -> Rule:
    """Make a rule for a function of one tensor: ``slope(y, x, ...)`` is what a cotangent is multiplied by.

    Example:
        >>> halved = propagated(lambda y, x: torch.full_like(x, 0.5))
        >>> from pullback import gradient, params_of
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.ones(1, 3)
        >>> a = gradient(params, model, x, 0, layer="0", rules={torch.tanh: halved})
        >>> torch.allclose(a, model[2].weight[:1] / 2)
        True
    """

    def rule(operation: Operation, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = stop_gradient(input)
        y = run_replaced(operation, x, *args, **kwargs)
        return y + slope(y, x) * (input - x)

    return rule


def run_replaced(operation: Operation, *args: Any, **kwargs: Any) -> Any:
    """Run an operation, in the form that can be differentiated by all that it takes."""
    form = REPLACEMENTS.get(operation)
    return operation(*args, **kwargs) if form is None else form(None, operation, *args, **kwargs)


def passing() -> Rule:
    """Give the rule that hands relevance on unchanged, from each element of the output to that of the input."""
    return propagated(lambda y, x: nonzero(y) / nonzero(x))


def detached_statistics() -> Rule:
    """Give the rule for layer, group and RMS norm that takes the scale it divides by for a constant.

    The mean that is taken away is linear; the bias keeps its share of relevance.

    Reference:
        Ali et al., XAI for Transformers: Better Explanations through Conservative Propagation, 2022, sec. 4.
    """

    def rule(operation: Operation, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = stop_gradient(input)
        y, step = run_replaced(operation, x, *args, **kwargs), input - x
        name = operation.__name__
        if name == "batch_norm":  # with the statistics of the batch: no example is on its own
            return NotImplemented
        if name == "group_norm":
            groups = args[0] if args else kwargs["num_groups"]
            weight, _, eps = arguments(args[1:], kwargs, ("weight", None), ("bias", None), ("eps", 1e-5))
            grouped, moved = (v.reshape(v.shape[0], groups, -1) for v in (x, step))
            moved = (moved - moved.mean(2, keepdim=True)) * _inverse_spread(grouped, (2,), eps)
            moved = moved.reshape_as(step)
            weight = None if weight is None else weight.reshape(1, -1, *[1] * (x.ndim - 2))
        elif name == "instance_norm":
            _, _, weight, _, _, _, eps = arguments(
                args, kwargs, ("running_mean", None), ("running_var", None), ("weight", None), ("bias", None),
                ("use_input_stats", True), ("momentum", 0.1), ("eps", 1e-5),
            )  # fmt: skip
            axes = tuple(range(2, x.ndim))
            moved = (step - step.mean(axes, keepdim=True)) * _inverse_spread(x, axes, eps)
            weight = None if weight is None else weight.reshape(1, -1, *[1] * (x.ndim - 2))
        else:
            shape = args[0] if args else kwargs["normalized_shape"]
            axes = tuple(range(-len(shape), 0))
            if name == "rms_norm":
                weight, eps = arguments(args[1:], kwargs, ("weight", None), ("eps", None))
                eps = torch.finfo(x.dtype).eps if eps is None else eps
                moved = step * (x.square().mean(axes, keepdim=True) + eps).rsqrt()
            else:
                weight, _, eps = arguments(args[1:], kwargs, ("weight", None), ("bias", None), ("eps", 1e-5))
                moved = (step - step.mean(axes, keepdim=True)) * _inverse_spread(x, axes, eps)
        return y + (moved if weight is None else moved * weight)

    return rule


def _inverse_spread(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    return (x.var(axes, unbiased=False, keepdim=True) + eps).rsqrt()


# -- relevance: products


def constant() -> Rule:
    """Give the rule that takes the result of an operation for a constant: no relevance passes.

    For attention weights it is the rule of Ali et al. (2022); for `rsqrt` in a hand-written norm it makes the scale a
    constant.
    """

    def rule(operation: Operation, *args: Any, memo: dict[str, Any], **kwargs: Any) -> Tensor:
        return mark_constant(stop_gradient(operation(*args, **kwargs)), memo)

    return Remembering(rule)


def quotient() -> Rule:
    """Give the rule that takes a divisor for a constant."""

    def rule(operation: Operation, input: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        return operation(input, stop_gradient(other) if isinstance(other, Tensor) else other, *args, **kwargs)

    return rule


def power() -> Rule:
    """Give the rule for `pow` that hands relevance on to the base, or to the exponent of a constant."""

    def rule(operation: Operation, input: Any, exponent: Any, *, memo: dict[str, Any], **kwargs: Any) -> Any:
        if is_constant(input, memo):
            return passing()(lambda e: operation(input, e, **kwargs), exponent)
        return passing()(operation, input, exponent, **kwargs) if is_constant(exponent, memo) else NotImplemented

    return Remembering(rule)


def derivative() -> Rule:
    """Give the rule that leaves an operation its derivative: for what is piecewise linear, or meant to be expanded."""
    return lambda operation, *args, **kwargs: operation(*args, **kwargs)


def gated() -> Rule:
    """Give the rule for `glu`: value and gate take half each."""

    def rule(operation: Operation, input: Tensor, dim: int = -1) -> Tensor:
        value, gate = input.chunk(2, dim)
        return scaled(value * passing()(torch.sigmoid, gate), 0.5)

    return rule
