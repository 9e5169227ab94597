r"""Relevance rules: what layer-wise relevance propagation does at an operation.

**Coordinates.** The relevance of a tensor `h` is carried as a cotangent `c` with :math:`R = h \odot c`. Then every
linear operation without parameters (reshape, concatenation, sum, mean, `+`, pooling, padding, interpolation, indexing,
multiplication by a constant) needs no rule: its ordinary derivative shares relevance out in proportion,
:math:`R_i = \frac{h_i w_i}{\sum_j h_j w_j} R`. Skips and reused tensors come out right because cotangents add up.
Relevance can also be put on an activation that is 0 (the z-box, flat and w-square rules do): zeros count as
:math:`10^{-12}` in these coordinates.

**A rule adds a zero.** With :math:`\hat h` the input as the pullback that is under way does not see it (a constant to
it, but differentiable to whoever differentiates the explanation),

.. math:: y = f(\hat h) + M(\hat h) \, (h - \hat h)

has the value of `f` and pulls cotangents back by the transpose of any linear map `M` that one likes. What `M` needs of
the forward, such as denominators, does not depend on the cotangent: it is computed once for all targets that are pulled
back together. `propagated` makes such a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback._ops import Operation, operation_of
from pullback._torch import compiling, current_level, functorch

TINY = 1e-12


def _level() -> int:
    return current_level() or 0


_level._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # known while tracing


def still(x: Tensor) -> Tensor:
    """Give `x` as a constant to the pullback that is under way, and to nobody else."""
    level = _level()
    return functorch._unwrap_for_grad(x, level) if level else x.detach()


def nonzero(x: Tensor) -> Tensor:
    """Count zeros as a tiny number, so that relevance on them has coordinates."""
    return torch.where(x == 0, torch.full_like(x, max(TINY, torch.finfo(x.dtype).tiny)), x)


def stabilised(z: Tensor, epsilon: float) -> Tensor:
    """Move `z` away from 0 by `epsilon`; 0 itself counts as positive."""
    return z + epsilon * torch.where(z < 0, -torch.ones_like(z), torch.ones_like(z))


def scaled(y: Tensor, factor: Tensor | float) -> Tensor:
    """Give `y`, whose cotangent is multiplied by a factor on the way back."""
    value = still(y)
    return value + factor * (y - value)


def arguments(args: Sequence[Any], kwargs: dict[str, Any], *names: tuple[str, Any]) -> list[Any]:
    given = list(args) + [None] * (len(names) - len(args))
    return [given[i] if i < len(args) else kwargs.get(name, default) for i, (name, default) in enumerate(names)]


# -- what a run remembers of tensors


def remember(memo: dict[str, Any], kind: str, t: Tensor, value: Any) -> None:
    """Keep a value with a tensor, for the length of the run."""
    if compiling():  # a tensor that is traced has identity, but no id
        memo.setdefault(kind, []).append((t, value))
    else:
        memo.setdefault(kind, {})[id(t)] = (t, value)


def recall(memo: dict[str, Any], kind: str, t: Tensor) -> Any:
    """Give the value that was kept with a tensor, or None."""
    if compiling():
        for known, value in memo.get(kind, ()):
            if known is t:
                return value
        return None
    return memo.get(kind, {}).get(id(t), (None, None))[1]


def version(t: Tensor) -> int:
    """Count the writes to a tensor; a traced one is not written to by this count."""
    return 0 if compiling() else t._version


def tensors_in(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    found = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    for group in args:
        if isinstance(group, list | tuple):
            found += [t for t in group if isinstance(t, Tensor)]
    return found


def watch_constants(memo: dict[str, Any], func: Operation, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
    """Keep account of the tensors that are computed from parameters alone: they take no part in sharing relevance."""
    fixed = operation_of(func) is not F.embedding and all(is_constant(t, memo) for t in tensors_in(args, kwargs))
    if fixed:
        for value in result if isinstance(result, list | tuple) else (result,):
            if isinstance(value, Tensor) and value.is_floating_point():
                mark_constant(value, memo)
        return
    name = getattr(func, "__name__", "")
    if args and isinstance(args[0], Tensor) and (name == "__setitem__" or (name[-1:] == "_" and name[:2] != "__")):
        remember(memo, "constants", args[0], False)  # what depends on the input was written to it


def is_constant(t: Any, memo: dict[str, Any]) -> bool:
    """Say whether a tensor does not depend on the input, or has no relevance because it is no floating-point number."""
    if not isinstance(t, Tensor) or isinstance(t, torch.nn.Parameter) or not t.is_floating_point():
        return True
    return bool(recall(memo, "constants", t))


def mark_constant(t: Tensor, memo: dict[str, Any]) -> Tensor:
    remember(memo, "constants", t, True)
    return t


class Remembering:
    """A rule that reads the memo of the run."""

    wants_memo = True
    watch = staticmethod(watch_constants)

    def __init__(self, rule: Callable[..., Any]) -> None:
        self.rule = rule

    def __call__(self, operation: Operation, *args: Any, memo: dict[str, Any], **kwargs: Any) -> Any:
        return self.rule(operation, *args, memo=memo, **kwargs)


def product() -> Callable[..., Any]:
    """Give the rule that shares the relevance of a product equally between the factors that depend on the input.

    Reference:
        Achtibat et al., AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers, 2024, eq. 14.
    """

    def rule(operation: Operation, *args: Any, memo: dict[str, Any], **kwargs: Any) -> Any:
        tensors = tensors_in(args, kwargs)
        factors = sum(not is_constant(t, memo) for t in tensors)
        y = operation(*args, **kwargs)
        return scaled(y, 1 / factors) if factors > 1 else y

    return Remembering(rule)


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


CONVOLUTIONS = tuple(operation_of(getattr(F, f"conv{n}d")) for n in (1, 2, 3))
TRANSPOSED = tuple(operation_of(getattr(F, f"conv_transpose{n}d")) for n in (1, 2, 3))
PRODUCTS = tuple(operation_of(op) for op in (torch.matmul, torch.mm, torch.bmm, torch.einsum))
SUMMED_PRODUCTS = tuple(operation_of(op) for op in (torch.addmm, torch.baddbmm))
LINEAR = (operation_of(F.linear), *CONVOLUTIONS, *TRANSPOSED)


def linear_map(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], memo: Any) -> LinearMap | None:
    """Read an operation as a linear map of one input, where it is one."""
    if operation in LINEAR:
        (input, weight, bias), rest = (
            arguments(args[:3], kwargs, *((n, None) for n in ("input", "weight", "bias"))),
            args[3:],
        )
        options = {k: v for k, v in kwargs.items() if k not in ("input", "weight", "bias")}
        if operation is F.linear:
            return LinearMap(operation, input, weight, bias, F.linear, -1, ())
        settings = _convolution(operation, input, weight, rest, options)
        axis = 1 - weight.ndim
        return LinearMap(
            operation, input, weight, bias, lambda x, w: operation(x, w, None, *rest, **options), axis, settings
        )
    if operation in SUMMED_PRODUCTS and not kwargs:
        bias, input, weight = args[:3]
        if is_constant(bias, memo) and is_constant(weight, memo) and not is_constant(input, memo) and len(args) == 3:
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


class Share(NamedTuple):
    r"""A part of a rule: :math:`\sum_k p_k \odot W_k^T \big(g R / z\big)` of relevance, :math:`z = \sum_k W_k p_k + b`.

    `gain` is g, `parts` the pairs of p (None for the input itself) and W.
    """

    gain: Tensor | float
    parts: Sequence[tuple[Tensor | None, Tensor]]
    bias: Tensor | None


@dataclass(frozen=True)
class LinearRule:
    """A rule for linear maps with parameters. `shares(x, weight, bias, y)` says how relevance is shared out.

    Without `shares` it is the epsilon rule.

    Attributes:
        epsilon: What denominators are moved away from 0 by.
        bias: Whether the bias takes its share. If not, that is shared out as well, and relevance is conserved.
        signed: Move denominators by the sign of each, or upwards.
        plain: The cotangent is relevance itself.
    """

    name: str
    shares: Callable[[Tensor, Tensor, Tensor | None, Tensor], Sequence[Share]] | None = None
    epsilon: float = 1e-6
    bias: bool = True
    signed: bool = True
    plain: bool = False

    wants_memo = True
    watch = staticmethod(watch_constants)

    def __call__(self, operation: Operation, *args: Any, memo: dict[str, Any], **kwargs: Any) -> Any:
        map = linear_map(operation, args, kwargs, memo)
        if map is None:
            return product()(operation, *args, memo=memo, **kwargs) if operation in PRODUCTS else NotImplemented
        memo["maps"] = memo.get("maps", 0) + 1
        if self.shares is None:
            value = map.biased(map.apply(map.input, map.weight), map.bias)
        else:
            value = map.biased(map.apply(still(map.input), map.weight), map.bias)
        result = self.finished(map, value)
        remember(memo, "origins", result, (self, map, value, version(result)))
        return result

    def finished(self, map: LinearMap, value: Tensor) -> Tensor:
        """Give `value` with the way back of this rule; for the epsilon rule it has that of the map already."""
        y = still(value)
        if self.shares is None:
            z = y if self.bias or map.bias is None else map.biased(y, -map.bias)
            return y + self._ahead(y) / self._denominator(z) * (value - y)
        x, x_ = map.input, still(map.input)
        if map.settings is not None and not compiling():
            return value + _Propagated.apply(x, x_, map.weight, map.bias, y, _Plan(self, map))  # pyright: ignore[reportOperatorIssue]
        for scale, moved, weight in self.terms(map._replace(input=x_), y):
            value = value + scale * map.apply(moved * (x - x_), weight)
        return value

    def terms(self, map: LinearMap, y: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Give (s, m, W) of each term ``s * W (m * (x - still(x)))`` that the rule adds to the output `y`."""
        assert self.shares is not None
        x, ahead = map.input, self._ahead(y)
        for gain, parts, bias in self.shares(x, map.weight, map.bias if self.bias else None, y):
            z = sum(map.apply(x if p is None else p, w) for p, w in parts)
            scale = gain * ahead / self._denominator(map.biased(z, bias))  # pyright: ignore[reportArgumentType]
            for p, w in parts:
                p = x if p is None else p
                yield scale, p if self.plain else p / nonzero(x), w  # of an input of 0 no more than its part

    def _ahead(self, y: Tensor) -> Tensor:
        return torch.ones_like(y) if self.plain else nonzero(y)

    def _denominator(self, z: Tensor) -> Tensor:
        return stabilised(z, self.epsilon) if self.signed else z + self.epsilon


class _Plan:
    """A rule and a map without its tensors."""

    def __init__(self, rule: LinearRule, map: LinearMap) -> None:
        self.rule, self.map = rule, map._replace(input=None, weight=None, bias=None)  # pyright: ignore[reportArgumentType]


class _Propagated(torch.autograd.Function):
    """The terms of a rule, which are 0, so only their transposes are computed, and these when they are asked for.

    A convolution whose batch norm is merged is then not shared out twice, and denominators take no memory. As the terms
    are 0 whatever the other inputs are, so is their derivative with respect to these.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        x: Tensor, still: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, plan: _Plan
    ) -> Tensor:
        return torch.zeros_like(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, still, weight, bias, y, ctx.plan = inputs
        ctx.save_for_backward(still, weight, bias, y)
        ctx.shape, ctx.dtype, ctx.device = output.shape, output.dtype, output.device

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        plan, dtype = ctx.plan, torch.promote_types(ctx.saved_tensors[1].dtype, cotangent.dtype)
        # autocast may have left them apart
        x, weight, bias, y = (None if t is None else t.to(dtype) for t in ctx.saved_tensors)
        map = plan.map._replace(input=x, weight=weight, bias=bias)
        total = None
        for scale, moved, w in plan.rule.terms(map, y):
            back = moved * _transposed(cotangent * scale, x, w, map.settings)  # pyright: ignore[reportArgumentType]
            total = back if total is None else total + back
        assert total is not None
        total = total.to(ctx.saved_tensors[0].dtype)
        return total, -total, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.device)


def _transposed(g: Tensor, x: Tensor, weight: Tensor, settings: tuple[Any, ...]) -> Tensor:
    if not settings:
        return torch.matmul(g, weight)
    stride, padding, dilation, transposed, extra, groups = settings
    return torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, transposed, extra, groups, [True, False, False]
    )[0]
