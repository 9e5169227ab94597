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
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp

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
    return torch.where(x == 0, max(TINY, torch.finfo(x.dtype).tiny), x)


def stabilised(z: Tensor, epsilon: float, sign: int = 0) -> Tensor:
    """Move `z` away from 0 by `epsilon`, the way of its `sign` where that is known; 0 itself counts as positive."""
    return z + sign * epsilon if sign else torch.where(z < 0, z - epsilon, z + epsilon)


def scaled(y: Tensor, factor: Tensor | float) -> Tensor:
    """Give `y`, whose cotangent is multiplied by a factor on the way back."""
    value = still(y)
    return value + factor * (y - value)


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


_WITHOUT_DERIVATIVE = frozenset(
    "detach sign sgn round floor ceil trunc heaviside zeros_like ones_like full_like empty_like rand_like randn_like "
    "new_zeros new_ones new_full new_empty new_tensor".split()
)


def watch_constants(memo: dict[str, Any], func: Operation, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
    """Keep account of the tensors that are computed from parameters alone: they take no part in sharing relevance."""
    fixed = operation_of(func) is not F.embedding and constants_only(args, kwargs, memo)
    if fixed or getattr(func, "__name__", "") in _WITHOUT_DERIVATIVE:
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


def constants_only(args: Sequence[Any], kwargs: dict[str, Any], memo: dict[str, Any]) -> bool:
    """Say whether an operation takes in nothing that depends on the input."""
    return all(is_constant(t, memo) for t in tensors_in(args, kwargs))


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
BILINEAR = tuple(operation_of(op) for op in (torch.mul, torch.mv, torch.dot, torch.inner, torch.outer, torch.kron))
SUMMED_PRODUCTS = tuple(operation_of(op) for op in (torch.addmm, torch.baddbmm))
LINEAR = (operation_of(F.linear), *CONVOLUTIONS, *TRANSPOSED)


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


class Share(NamedTuple):
    r"""A part of a rule: :math:`\sum_k p_k \odot W_k^T \big(g R / z\big)` of relevance, :math:`z = \sum_k W_k p_k + b`.

    `gain` is g, `parts` the pairs of p (None for the input itself) and W, `sign` that of z, 0 where it has either.
    """

    gain: Tensor | float
    parts: Sequence[tuple[Tensor | None, Tensor]]
    bias: Tensor | None
    sign: int = 0


@dataclass(frozen=True)
class LinearRule:
    """A rule for linear maps with parameters. `shares(x, weight, bias, y)` says how relevance is shared out.

    Without `shares` it is the epsilon rule.

    Attributes:
        epsilon: What denominators are moved away from 0 by.
        bias: Whether the bias takes its share. If not, that is shared out as well, and relevance is conserved.
        plain: The cotangent is relevance itself.
    """

    name: str
    shares: Callable[[Tensor, Tensor, Tensor | None, Tensor], Sequence[Share]] | None = None
    epsilon: float = 1e-6
    bias: bool = True
    plain: bool = False

    wants_memo = True
    watch = staticmethod(watch_constants)

    def __call__(self, operation: Operation, *args: Any, memo: dict[str, Any], **kwargs: Any) -> Any:
        args, kwargs = by_place(operation, args, kwargs)
        map = linear_map(operation, args, kwargs, memo)
        if map is None:
            if operation in SUMMED_PRODUCTS:
                bias, a, b, beta, alpha = summed_product(args, kwargs)
                return beta * bias + alpha * self(torch.matmul, a, b, memo=memo)
            return product()(operation, *args, memo=memo, **kwargs) if operation in PRODUCTS else NotImplemented
        if (
            operation in LINEAR and not is_constant(map.weight, memo) and not self.plain
        ):  # made by the network: a factor as well
            factor = 1.0 if is_constant(map.input, memo) else 0.5
            return map.biased(scaled(map.apply(map.input, map.weight), factor), map.bias)
        rule = self.met(memo)
        value = map.biased(map.apply(map.input if rule.is_epsilon else still(map.input), map.weight), map.bias)
        result = rule.finished(map, value)
        remember(memo, "origins", result, (rule, map, value, version(result)))
        return result

    def met(self, memo: dict[str, Any]) -> LinearRule:
        """Count a linear map, and give the rule for it."""
        maps_met(memo)[0] += 1
        return self

    @property
    def is_epsilon(self) -> bool:
        """The ordinary derivative is the way back, but for a factor."""
        return self.shares is None

    def finished(self, map: LinearMap, value: Tensor) -> Tensor:
        """Give `value` with the way back of this rule; for the epsilon rule it has that of the map already."""
        y = still(value)
        if self.is_epsilon:
            return y + self._ahead(y) / self._denominator(self._total(map, y)) * (value - y)
        x, x_ = map.input, still(map.input)
        if not compiling():
            return _Propagated.apply(x, x_, map.weight, map.bias, y, value, _Plan(self, map))  # pyright: ignore[reportReturnType]
        for scale, p, weight in self.terms(map._replace(input=x_), y):
            value = value + scale * map.apply((x - x_) * self._moved(p, x_), weight)
        return value

    def terms(self, map: LinearMap, y: Tensor) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Give (s, p, W) of each part: relevance in proportion to ``p * W^T (s * cotangent)``, p None for the input."""
        x, ahead = map.input, self._ahead(y)
        if self.shares is None:
            yield ahead / self._denominator(self._total(map, y)), None, map.weight
            return
        for gain, parts, bias, sign in self.shares(x, map.weight, map.bias if self.bias else None, y):
            z = sum(map.apply(x if p is None else p, w) for p, w in parts)
            scale = ahead / self._denominator(map.biased(z, bias), sign)  # pyright: ignore[reportArgumentType]
            if isinstance(gain, Tensor) or gain != 1:
                scale = gain * scale
            for p, w in parts:
                yield scale, p, w

    def pulled(self, map: LinearMap, y: Tensor, cotangent: Tensor) -> Tensor:
        """Give the cotangent of the input for that of the output `y`."""
        own, others = None, None
        for scale, p, w in self.terms(map, y):
            back = _transposed(cotangent * scale, map, w)
            if p is None:
                own = back if own is None else own + back
            else:
                back = back * self._moved(p, map.input)
                others = back if others is None else others + back
        if own is None:
            assert others is not None
            return others
        own = own * self._moved(None, map.input)
        return own if others is None else own + others

    def _moved(self, p: Tensor | None, x: Tensor) -> Tensor:
        """Give the factor of a cotangent that makes relevance proportional to `p`, also where an input is 0."""
        if self.plain:
            return x if p is None else p
        return x != 0 if p is None else p / nonzero(x)

    def _total(self, map: LinearMap, y: Tensor) -> Tensor:
        return y if self.bias or map.bias is None else map.biased(y, -map.bias)

    def _ahead(self, y: Tensor) -> Tensor:
        return torch.ones_like(y) if self.plain else nonzero(y)

    def _denominator(self, z: Tensor, sign: int = 0) -> Tensor:
        return stabilised(z, self.epsilon, sign)


def maps_met(memo: dict[str, Any]) -> list[int]:
    """Give the count of the linear maps with parameters that a run has met so far; it goes on counting."""
    return memo.setdefault("maps", [0])


@dataclass(frozen=True, kw_only=True)
class Late(LinearRule):
    """One of two rules, chosen when a cotangent comes back: only then it is known which linear map was the last."""

    last: LinearRule
    others: LinearRule
    count: list[int] = field(default_factory=lambda: [0])  # of the run
    place: int = 0

    def met(self, memo: dict[str, Any]) -> LinearRule:
        if compiling():
            raise ValueError("`last` cannot be compiled: name the layer, `{('head', F.linear): rule}`.")
        super().met(memo)
        count = maps_met(memo)  # not the memo: that holds tensors that hold this
        return replace(self, count=count, place=count[0])

    @property
    def is_epsilon(self) -> bool:
        return False

    def pulled(self, map: LinearMap, y: Tensor, cotangent: Tensor) -> Tensor:
        rule = self.last if self.place == self.count[0] else self.others
        return rule.pulled(map, y, cotangent)


class _Plan:
    """A rule and a map without its tensors."""

    def __init__(self, rule: LinearRule, map: LinearMap) -> None:
        self.rule, self.map = rule, map._replace(input=None, weight=None, bias=None)  # pyright: ignore[reportArgumentType]


class _Propagated(torch.autograd.Function):
    """The value of a map with the way back of a rule, which is computed when it is asked for.

    A convolution whose batch norm is merged is then not shared out twice, and denominators take no memory. The rule's
    terms are 0 whatever their inputs are, so the derivative is that of the value, but for `x` itself.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        x: Tensor, still: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, value: Tensor, plan: _Plan
    ) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, still, weight, bias, y, _, ctx.plan = inputs
        ctx.save_for_backward(still, weight, bias, y)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        plan, dtype = ctx.plan, torch.promote_types(ctx.saved_tensors[1].dtype, cotangent.dtype)
        # autocast may have left them apart
        x, weight, bias, y = (None if t is None else t.to(dtype) for t in ctx.saved_tensors)
        map = plan.map._replace(input=x, weight=weight, bias=bias)
        total = plan.rule.pulled(map, y, cotangent).to(ctx.saved_tensors[0].dtype)
        return total, -total, None, None, None, cotangent, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tangents[5].clone()


def _transposed(g: Tensor, map: LinearMap, weight: Tensor) -> Tensor:
    if map.settings is None:
        _, back = vjp(lambda x: map.apply(x, weight), map.input)  # pyright: ignore[reportAssignmentType]
        return back(g)[0]
    if not map.settings:
        return torch.matmul(g, weight)
    stride, padding, dilation, transposed, extra, groups = map.settings
    return torch.ops.aten.convolution_backward(
        g, map.input, weight, None, stride, padding, dilation, transposed, extra, groups, [True, False, False]
    )[0]
