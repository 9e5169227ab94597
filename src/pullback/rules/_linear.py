"""Rules for linear maps with parameters: how the relevance of each output is shared out over the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp

from pullback._ops.constants import Remembering, is_constant, remember, tensors_in, version
from pullback._ops.reading import LINEAR, PRODUCTS, SUMMED_PRODUCTS, LinearMap, by_place, linear_map, summed_product
from pullback._ops.spellings import Operation
from pullback._torch.internals import compiling
from pullback.rules._coordinates import nonzero, scaled, stabilised, stop_gradient


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
        value = map.biased(map.apply(map.input if rule.is_epsilon else stop_gradient(map.input), map.weight), map.bias)
        result = rule.apply_rule(map, value)
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

    def apply_rule(self, map: LinearMap, value: Tensor) -> Tensor:
        """Give `value` with the way back of this rule; for the epsilon rule it has that of the map already."""
        y = stop_gradient(value)
        if self.is_epsilon:
            return y + self._numerator(y) / self._denominator(self._total(map, y)) * (value - y)
        x, x_ = map.input, stop_gradient(map.input)
        if not compiling():
            return _Propagated.apply(x, x_, map.weight, map.bias, y, value, _Plan(self, map))  # pyright: ignore[reportReturnType]
        for scale, p, weight in self.terms(map._replace(input=x_), y):
            value = value + scale * map.apply((x - x_) * self._input_factor(p, x_), weight)
        return value

    def terms(self, map: LinearMap, y: Tensor) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Give (s, p, W) of each part: relevance in proportion to ``p * W^T (s * cotangent)``, p None for the input."""
        x, ahead = map.input, self._numerator(y)
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
                back = back * self._input_factor(p, map.input)
                others = back if others is None else others + back
        if own is None:
            assert others is not None
            return others
        own = own * self._input_factor(None, map.input)
        return own if others is None else own + others

    def _input_factor(self, p: Tensor | None, x: Tensor) -> Tensor:
        """Give the factor of a cotangent that makes relevance proportional to `p`, also where an input is 0."""
        if self.plain:
            return x if p is None else p
        return x != 0 if p is None else p / nonzero(x)

    def _total(self, map: LinearMap, y: Tensor) -> Tensor:
        return y if self.bias or map.bias is None else map.biased(y, -map.bias)

    def _numerator(self, y: Tensor) -> Tensor:
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
        x: Tensor, stop_gradient: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, value: Tensor, plan: _Plan
    ) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, stop_gradient, weight, bias, y, _, ctx.plan = inputs
        ctx.save_for_backward(stop_gradient, weight, bias, y)

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
