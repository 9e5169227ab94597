"""Read the arguments of an operation: operands by place, and linear maps with their weight, bias and settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback._ops.constants import is_constant
from pullback._ops.spellings import Operation, canonical


def arguments(args: Sequence[Any], kwargs: dict[str, Any], *names: tuple[str, Any]) -> list[Any]:
    given = list(args) + [None] * (len(names) - len(args))
    return [given[i] if i < len(args) else kwargs.get(name, default) for i, (name, default) in enumerate(names)]


_OPERANDS = "input mat1 batch1 mat2 batch2 other tensor vec vec2 exponent normalized_shape num_groups".split()


def by_place(operation: Operation, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Give operands that were passed by name their places."""
    if not kwargs:
        return tuple(args), kwargs
    names = [name for name in (*_OPERANDS, *(("weight",) if operation in LINEAR else ())) if name in kwargs]
    named = tuple(kwargs[name] for name in names)
    return (*args, *named), {name: v for name, v in kwargs.items() if name not in names}


# -- linear maps


class LinearMap(NamedTuple):
    """A linear map with parameters: what goes in, what it is multiplied by, and what is added."""

    operation: Operation
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    apply: Callable[[Tensor, Tensor], Tensor]
    axis: int | None  # of the output that the bias runs along
    settings: tuple[Any, ...] | None  # of a convolution; () of a linear layer; None where it is neither

    def biased(self, y: Tensor, bias: Tensor | None) -> Tensor:
        return y if bias is None else y + self._laid_out(bias, y)

    def _laid_out(self, bias: Tensor, y: Tensor) -> Tensor:
        if self.axis is None or bias.ndim != 1:
            return bias
        return bias.reshape(-1, *[1] * (y.ndim - 1 - self.axis % y.ndim))


CONVOLUTIONS = tuple(canonical(getattr(F, f"conv{n}d")) for n in (1, 2, 3))
TRANSPOSED = tuple(canonical(getattr(F, f"conv_transpose{n}d")) for n in (1, 2, 3))
PRODUCTS = tuple(canonical(op) for op in (torch.matmul, torch.mm, torch.bmm, torch.einsum))
BILINEAR = tuple(canonical(op) for op in (torch.mul, torch.mv, torch.dot, torch.inner, torch.outer, torch.kron))
SUMMED_PRODUCTS = tuple(canonical(op) for op in (torch.addmm, torch.baddbmm))
LINEAR = (canonical(F.linear), *CONVOLUTIONS, *TRANSPOSED)


def summed_product(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Read what is added, the two factors, and what the sum and the product are multiplied by."""
    return [*args, kwargs.get("beta", 1), kwargs.get("alpha", 1)]


def linear_map(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], memo: Any) -> LinearMap | None:
    """Read an operation as a linear map of one input, where it is one."""
    args, kwargs = by_place(operation, args, kwargs)
    if operation in LINEAR:
        input, weight, bias = arguments(args[:3], kwargs, ("input", None), ("weight", None), ("bias", None))
        rest, options = args[3:], {k: v for k, v in kwargs.items() if k != "bias"}
        if operation is F.linear:
            return LinearMap(operation, input, weight, bias, F.linear, -1, ())
        settings = _convolution(operation, input, weight, rest, options)
        axis = 1 - weight.ndim
        return LinearMap(
            operation, input, weight, bias, lambda x, w: operation(x, w, None, *rest, **options), axis, settings
        )
    if operation in SUMMED_PRODUCTS:
        bias, input, weight, beta, alpha = summed_product(args, kwargs)
        if is_constant(bias, memo) and is_constant(weight, memo) and not is_constant(input, memo):
            weight, bias = weight if alpha == 1 else alpha * weight, bias if beta == 1 else beta * bias
            return LinearMap(operation, input, weight, bias, torch.matmul, None, None)
    if operation in PRODUCTS and not kwargs:
        *equation, a, b = args if operation is not torch.einsum else (args[0], *_operands(args[1:]))
        if len(equation) > (operation is torch.einsum):
            return None
        if is_constant(b, memo) and not is_constant(a, memo):
            return LinearMap(operation, a, b, None, lambda x, w: operation(*equation, x, w), None, None)
        if is_constant(a, memo) and not is_constant(b, memo):
            return LinearMap(operation, b, a, None, lambda x, w: operation(*equation, w, x), None, None)
    return None


def _operands(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], list | tuple) else args


def _convolution(
    operation: Operation, input: Tensor, weight: Tensor, rest: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, ...] | None:
    """Give (stride, padding, dilation, transposed, output padding, groups), or None where they are not so simple."""
    axes = weight.ndim - 2
    transposed = operation in TRANSPOSED
    if transposed:
        names = ("stride", 1), ("padding", 0), ("output_padding", 0), ("groups", 1), ("dilation", 1)
        stride, padding, extra, groups, dilation = arguments(rest, options, *names)
    else:
        names = ("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)
        (stride, padding, dilation, groups), extra = arguments(rest, options, *names), 0
    if input.ndim != weight.ndim or padding == "same":
        return None
    padding = 0 if padding == "valid" else padding

    def each_axis(v: Any) -> tuple[int, ...]:
        v = (v,) if isinstance(v, int) else tuple(v)
        return v * axes if len(v) == 1 else v

    return each_axis(stride), each_axis(padding), each_axis(dilation), transposed, each_axis(extra), groups
