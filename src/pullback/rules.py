"""Rules: what changes the backward pass, by operation.

`rules=` of a method takes

- a name: ``"guided"``, ``"deconvnet"``, ...;
- a table ``{operation: rule}``; a key ``(layer name pattern, operation)`` holds in those layers only, and wins. Any
  spelling of an operation names it: `torch.relu`, `torch.nn.functional.relu` and `torch.Tensor.relu_` are one;
- an `autograd.Function` in the place of ReLU, or a rule for all rectifiers.

A rule is called as ``rule(operation, *args, **kwargs)`` with the operation in its pure form, and returns what the
operation returns, or `NotImplemented` for a use that it does not cover.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback import _native, relu
from pullback._levels import own_elsewhere
from pullback._ops import ACTIVATIONS, FUNCTIONS, Operation, Rule, Table, activations, operation_of
from pullback._relevance import (
    BILINEAR,
    CONVOLUTIONS,
    LINEAR,
    PRODUCTS,
    SUMMED_PRODUCTS,
    TRANSPOSED,
    Late,
    LinearMap,
    LinearRule,
    Remembering,
    Share,
    arguments,
    constants_only,
    is_constant,
    maps_met,
    mark_constant,
    nonzero,
    product,
    recall,
    remember,
    scaled,
    stabilised,
    still,
    version,
    watch_constants,
)
from pullback._targets import readable

Rules: TypeAlias = "str | Table | Mapping[Any, Rule] | type[torch.autograd.Function] | Rule | None"


def rectifier_rules(rule: Rule, name: str) -> Table:
    """Give the table that runs all rectifiers by one rule, and tells of other activations."""
    return Table.of(dict.fromkeys(relu.RECTIFIERS, rule), tell=activations(), name=name)


def from_function(function: type[torch.autograd.Function]) -> Rule:
    """Make a rule for ReLU of an `autograd.Function`; a rectifier with a ceiling is not covered.

    Example:
        >>> class Doubled(torch.autograd.Function):
        ...     generate_vmap_rule = True
        ...     @staticmethod
        ...     def forward(x):
        ...         return x.clamp(min=0)
        ...     @staticmethod
        ...     def setup_context(ctx, inputs, output):
        ...         ctx.save_for_backward(inputs[0] > 0)
        ...     @staticmethod
        ...     def backward(ctx, cotangent):
        ...         return 2 * cotangent * ctx.saved_tensors[0]
        >>> from pullback import gradient, params_of
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.ones(1, 3)
        >>> a, b = gradient(params, model, x, 0, rules=Doubled), gradient(params, model, x, 0)
        >>> torch.allclose(a, 2 * b)
        True
    """
    base = torch.autograd.function._SingleLevelFunction
    if function.setup_context is base.setup_context:
        raise TypeError(
            f"`rules` got {function.__name__}, an autograd.Function of the old form, `forward(ctx, x)`, which "
            "torch.func cannot run. Split it into `forward(x)` and `setup_context(ctx, inputs, output)`, with "
            "`generate_vmap_rule = True`."
        )

    def rule(operation: Operation, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if relu.ceiling(operation, input, *args, **kwargs) != float("inf"):
            return NotImplemented
        return own_elsewhere(function.apply(input), input, lambda: operation(input, *args, **kwargs))  # pyright: ignore[reportArgumentType]

    return rule


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
        x = still(input)
        y = _value(operation, x, *args, **kwargs)
        return y + slope(y, x) * (input - x)

    return rule


def _value(operation: Operation, *args: Any, **kwargs: Any) -> Any:
    """Run an operation, in the form that can be differentiated by all that it takes."""
    form = _native.FORMS.get(operation)
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
        x = still(input)
        y, step = _value(operation, x, *args, **kwargs), input - x
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
        return mark_constant(still(operation(*args, **kwargs)), memo)

    return Remembering(rule)


def quotient() -> Rule:
    """Give the rule that takes a divisor for a constant."""

    def rule(operation: Operation, input: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        return operation(input, still(other) if isinstance(other, Tensor) else other, *args, **kwargs)

    return rule


def power() -> Rule:
    """Give the rule for `pow` that hands relevance on to the base, or to the exponent of a constant."""

    def rule(operation: Operation, input: Any, exponent: Any, *, memo: dict[str, Any], **kwargs: Any) -> Any:
        if is_constant(input, memo):
            return passing()(lambda e: operation(input, e, **kwargs), exponent)
        return passing()(operation, input, exponent, **kwargs) if is_constant(exponent, memo) else NotImplemented

    return Remembering(rule)


# -- relevance: linear maps with parameters


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def _negative(x: Tensor) -> Tensor:
    return x.clamp(max=0)


def _halves(x: Tensor, up: Tensor, down: Tensor) -> list[tuple[Tensor | None, Tensor]]:
    """Pair the positive part of `x` with `up`, the negative with `down`; one that is seen to be empty is left out."""
    if readable(x) and x.numel() and bool(x.amin() >= 0):  # as after a rectifier
        return [(None, up)]
    return [(_positive(x), up), (_negative(x), down)]


def _some(function: Callable[[Tensor], Tensor], bias: Tensor | None) -> Tensor | None:
    return None if bias is None else function(bias)


def excitation(plain: bool = False) -> LinearRule:
    r"""Give the rule of excitation backprop, :math:`R_i = x_i \sum_j \frac{w_{ji}^+}{\sum_k w_{jk}^+ x_k} R_j`.

    For inputs of at least 0, as rectified activations are. Where they are negative, a negative weight excites as well,
    and relevance stays a probability. `plain`: as TorchRay has it, for a cotangent that is relevance; inputs are taken
    to be at least 0, whatever they are.

    Reference:
        Zhang, Lin, Brandt, Shen & Sclaroff, Top-down Neural Attention by Excitation Backprop, 2016, eq. 5.
    """

    def shares(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Sequence[Share]:
        if plain:
            return [Share(1.0, [(None, _positive(w))], None, 1)]
        return [Share(1.0, _halves(x, _positive(w), _negative(w)), None, 1)]

    return LinearRule("excitation", shares, 1e-20, plain=plain)


def contrasted() -> LinearRule:
    r"""Give the rule of a classifier in contrastive excitation backprop: less what its negated weights excite.

    .. math::
        R_i = x_i \sum_j \Big( \frac{w_{ji}^+}{\sum_k w_{jk}^+ x_k} - \frac{w_{ji}^-}{\sum_k w_{jk}^- x_k} \Big) R_j

    Reference:
        Zhang, Lin, Brandt, Shen & Sclaroff, Top-down Neural Attention by Excitation Backprop, 2016, sec. 3.3.
    """

    def shares(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Sequence[Share]:
        up, down = _positive(w), _negative(w)
        return [Share(1.0, _halves(x, up, down), None, 1), Share(-1.0, _halves(x, -down, -up), None, 1)]

    return LinearRule("contrasted", shares, 1e-20)


def epsilon(epsilon: float = 1e-6, bias: bool = True) -> LinearRule:
    r"""Give the rule :math:`R_i = x_i \sum_j \frac{w_{ji}}{z_j + \epsilon \, \mathrm{sign} z_j} R_j`.

    Reference:
        Bach et al., On Pixel-Wise Explanations for Non-Linear Classifier Decisions, 2015, eq. 58.
    """
    return LinearRule("epsilon", None, epsilon, bias)


def z_plus(epsilon: float = 1e-6, bias: bool = True) -> LinearRule:
    r"""Give the rule of positive contributions, :math:`R_i = \sum_j \frac{(x_i w_{ji})^+}{\sum_k (x_k w_{jk})^+} R_j`.

    Reference:
        Montavon, Lapuschkin, Binder, Samek & Müller, Explaining NonLinear Classification Decisions, 2017, sec. 4.1.
    """

    def shares(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Sequence[Share]:
        return [Share(1.0, _halves(x, _positive(w), _negative(w)), _some(_positive, b), 1)]

    return LinearRule("z_plus", shares, epsilon, bias)


def alpha_beta(alpha: float = 2.0, beta: float = 1.0, epsilon: float = 1e-6, bias: bool = True) -> LinearRule:
    r"""Give the rule that weighs positive contributions by alpha and negative ones by beta, alpha - beta = 1.

    .. math:: R_i = \sum_j \Big( \alpha \frac{(x_i w_{ji})^+}{z_j^+} - \beta \frac{(x_i w_{ji})^-}{z_j^-} \Big) R_j

    Raises:
        ValueError: If alpha - beta is not 1, or one of them is negative.

    Reference:
        Bach et al., On Pixel-Wise Explanations for Non-Linear Classifier Decisions, 2015, eq. 60.
    """
    if alpha < 0 or beta < 0 or abs(alpha - beta - 1) > 1e-9:
        raise ValueError(f"`alpha` and `beta` must not be negative, and `alpha - beta` be 1, got {alpha} and {beta}.")

    def shares(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Sequence[Share]:
        up, down = _positive(w), _negative(w)
        shares = [Share(alpha, _halves(x, up, down), _some(_positive, b), 1)]
        if beta:
            shares.append(Share(-beta, _halves(x, down, up), _some(_negative, b), -1))
        return shares

    return LinearRule("alpha_beta", shares, epsilon, bias)


def gamma(gamma: float = 0.25, epsilon: float = 1e-6, bias: bool = True) -> LinearRule:
    r"""Give the rule that favours positive contributions.

    .. math:: R_i = \sum_j \frac{x_i (w_{ji} + \gamma w_{ji}^+)}{\sum_k x_k (w_{jk} + \gamma w_{jk}^+)} R_j

    For inputs or outputs that are negative, in its general form: what agrees in sign with the output is favoured.

    Reference:
        Montavon, Binder, Lapuschkin, Samek & Müller, Layer-Wise Relevance Propagation: An Overview, 2019, sec. 10.2.
        Andéol, Kawakami, Wada, Kanamori, Müller & Montavon, Learning Domain Invariant Representations, 2021, app. A.
    """

    def shares(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Sequence[Share]:
        more, less = w + gamma * _positive(w), w + gamma * _negative(w)
        above, below = (y > 0).to(y.dtype), (y < 0).to(y.dtype)
        return [
            Share(above, _halves(x, more, less), _some(lambda b: b + gamma * _positive(b), b)),
            Share(below, _halves(x, less, more), _some(lambda b: b + gamma * _negative(b), b)),
        ]

    return LinearRule("gamma", shares, epsilon, bias)


def z_box(low: Any, high: Any, epsilon: float = 1e-6) -> LinearRule:
    r"""Give the rule for a first layer whose input lies in a box, :math:`l \le x \le h`.

    .. math:: R_i = \sum_j \frac{q_{ji}}{\sum_k q_{jk}} R_j, \quad q_{ji} = x_i w_{ji} - l_i w_{ji}^+ - h_i w_{ji}^-

    `low` and `high` are numbers or tensors that broadcast to the input.

    Reference:
        Montavon, Lapuschkin, Binder, Samek & Müller, Explaining NonLinear Classification Decisions, 2017, sec. 4.2.
    """

    def shares(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Sequence[Share]:
        lowest, highest = (torch.as_tensor(v, dtype=x.dtype, device=x.device).expand_as(x) for v in (low, high))
        return [Share(1.0, [(None, w), (-lowest, _positive(w)), (-highest, _negative(w))], None)]

    return LinearRule("z_box", shares, epsilon)


def w_square(epsilon: float = 1e-6, bias: bool = True) -> LinearRule:
    r"""Give the rule for a first layer that looks at weights alone.

    .. math:: R_i = \sum_j \frac{w_{ji}^2}{\sum_k w_{jk}^2} R_j

    Reference:
        Montavon, Lapuschkin, Binder, Samek & Müller, Explaining NonLinear Classification Decisions, 2017, sec. 4.3.
    """

    def shares(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Sequence[Share]:
        return [Share(1.0, [(torch.ones_like(x), w.square())], _some(torch.square, b), 1)]

    return LinearRule("w_square", shares, epsilon, bias)


def flat(epsilon: float = 1e-6) -> LinearRule:
    """Give the rule for a first layer that shares relevance equally among all inputs of a unit.

    Reference:
        Lapuschkin et al., Unmasking Clever Hans Predictors, 2019, supplementary note 3.
    """

    def shares(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Sequence[Share]:
        return [Share(1.0, [(torch.ones_like(x), torch.ones_like(w))], None, 1)]

    return LinearRule("flat", shares, epsilon, False)


def norm(epsilon: float = 1e-6, plain: bool = False) -> Rule:
    r"""Give the rule that shares relevance in proportion, for pooling.

    .. math:: R_i = \sum_j \frac{x_i a_{ji}}{\sum_k x_k a_{jk}} R_j

    In the coordinates of this module the ordinary derivative does the same, but for `epsilon`.
    """

    def rule(operation: Operation, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not plain:
            y = operation(input, *args, **kwargs)
            return scaled(y, nonzero(still(y)) / stabilised(still(y), epsilon))
        x = still(input)
        y = operation(x, *args, **kwargs)
        return y + operation(x * (input - x), *args, **kwargs) / (y + epsilon)

    return rule


def first(rule: LinearRule, others: Rule) -> Rule:
    """Use one rule at the first linear map with parameters that a run meets, and another at all others."""

    def chosen(operation: Operation, *args: Any, memo: dict[str, Any], **kwargs: Any) -> Any:
        return (others if maps_met(memo)[0] else rule)(operation, *args, memo=memo, **kwargs)

    return Remembering(chosen)


def last(rule: LinearRule, others: LinearRule) -> LinearRule:
    """Use one rule at the last linear map with parameters that a run meets, and another at all others.

    To treat both ends apart: ``first(a, last(c, b))``. It cannot be compiled.

    Example:
        >>> from pullback import lrp, params_of
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.randn(5, 3)
        >>> a = lrp(params, model, x, 0, rules=composed(last(z_plus(), epsilon())))
        >>> b = lrp(params, model, x, 0, rules={**composed(epsilon()), ("2", F.linear): z_plus()})
        >>> torch.allclose(a, b)
        True
    """
    return Late(name="last", last=rule, others=others)


# -- relevance: batch norm


def _affine(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor] | None:
    """Give scale and shift of batch norm in eval mode, by channel."""
    if training or running_mean is None or running_var is None:
        return None
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    return scale, shift if bias is None else shift + bias


def _by_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(-1, *[1] * (x.ndim - 2)).to(x.dtype)


def merged() -> Rule:
    """Give the rule for batch norm in eval mode that makes it one with the linear map before it, by that map's rule.

    Where no linear map comes before it, batch norm is a linear map by itself, one weight and one bias a channel, whose
    derivative is taken: its bias takes its share.
    """

    def rule(operation: Operation, input: Tensor, *args: Any, memo: dict[str, Any], **kwargs: Any) -> Any:
        # instance norm has another name for it
        renamed = {"training" if name == "use_input_stats" else name: value for name, value in kwargs.items()}
        affine = _affine(input, *args, **renamed)
        if affine is None:
            return detached_statistics()(operation, input, *args, **kwargs)
        scale, shift = affine
        found = recall(memo, "origins", input)
        if found is None or found[3] != version(input) or not _runs_along(found[1], input):
            return input * _by_channel(scale, input) + _by_channel(shift, input)
        rule, map, value, _ = found
        value = value * _by_channel(scale, input) + _by_channel(shift, input)
        bias = shift if map.bias is None else shift + scale * map.bias
        weight = _scaled_weight(map, scale)
        whole = map._replace(weight=weight, bias=bias)
        result = rule.finished(whole, value)
        remember(memo, "origins", result, (rule, whole, value, version(result)))
        return result

    return Remembering(rule)


def _runs_along(map: LinearMap, y: Tensor) -> bool:
    return map.settings is not None and (map.axis is not None) and map.axis % y.ndim == 1


def _scaled_weight(map: LinearMap, scale: Tensor) -> Tensor:
    scale = scale.to(map.weight.dtype)
    if map.operation in TRANSPOSED:  # [in, out of a group, ...], groups along `in`
        assert map.settings is not None
        groups = map.settings[-1]
        grouped = map.weight.reshape(groups, -1, *map.weight.shape[1:])
        return (grouped * scale.reshape(groups, 1, -1, *[1] * (map.weight.ndim - 2))).reshape_as(map.weight)
    return map.weight * scale.reshape(-1, *[1] * (map.weight.ndim - 1))


# -- relevance: tables

_ELEMENTWISE = tuple(
    operation_of(getattr(torch if hasattr(torch, name) else F, name))
    for name in [*ACTIVATIONS, *FUNCTIONS, *"clamp clamp_min clamp_max normalize".split()]
    if name not in ("glu", "rsqrt", "reciprocal")
)
_NORMS = tuple(
    operation_of(getattr(F, name))
    for name in "layer_norm group_norm instance_norm rms_norm".split()
    if hasattr(F, name)  # the last is newer than the oldest torch
)
_POOLING = tuple(operation_of(getattr(F, f"{kind}avg_pool{n}d")) for kind in ("", "adaptive_") for n in (1, 2, 3))
_OTHERS = (
    *(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, torch.softmax, torch.log_softmax, F.softmin, torch.pow),
    *(torch.prod, torch.cumprod, torch.tensordot, torch.addmv, torch.addbmm, torch.addcmul, torch.addcdiv, torch.lerp),
    *(
        torch.logsumexp,
        torch.logcumsumexp,
        torch.logaddexp,
        torch.atan2,
        torch.xlogy,
        torch.cdist,
        torch.linalg.multi_dot,
    ),
    *(F.cosine_similarity, F.glu, F.bilinear, F.batch_norm, F.local_response_norm, F.lp_pool1d, F.lp_pool2d),
)
_SCALES = (torch.rsqrt, torch.reciprocal, torch.var, torch.std)
# what is not piecewise linear, or has parameters: told where a table of relevance rules does not cover it
_TOLD = frozenset(
    map(
        operation_of,
        (*_ELEMENTWISE, *_NORMS, *_OTHERS, *_SCALES, *PRODUCTS, *SUMMED_PRODUCTS, *BILINEAR, *LINEAR, torch.div),
    )
)
_TOLD -= {operation_of(torch.relu), operation_of(torch.abs)}


def derivative() -> Rule:
    """Give the rule that leaves an operation its derivative: for what is piecewise linear, or meant to be expanded."""
    return lambda operation, *args, **kwargs: operation(*args, **kwargs)


def gated() -> Rule:
    """Give the rule for `glu`: value and gate take half each."""

    def rule(operation: Operation, input: Tensor, dim: int = -1) -> Tensor:
        value, gate = input.chunk(2, dim)
        return scaled(value * passing()(torch.sigmoid, gate), 0.5)

    return rule


def composed(linear: Rule, convolution: Rule | None = None, *, zeros: bool = False) -> dict[Any, Rule]:
    """Give the table of a composite: a rule for linear layers, one for convolutions, and what belongs around them.

    Batch norm is merged, the scale of other norms is a constant, activations pass relevance on, products share it
    equally, attention weights are expanded (AttnLRP). It is a plain dict: change or add what you like. `zeros` says
    that `linear` or `convolution` puts relevance on activations that are 0, which rectifiers then must pass on.
    """
    table: dict[Any, Rule] = dict.fromkeys(_ELEMENTWISE, passing())
    table |= dict.fromkeys(_NORMS, detached_statistics())
    table |= dict.fromkeys((*PRODUCTS, *SUMMED_PRODUCTS, F.linear), linear)
    table |= dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED), convolution or linear)
    table |= dict.fromkeys(_SCALES, constant())
    table |= dict.fromkeys(BILINEAR, product())
    table |= {
        torch.pow: power(),
        F.batch_norm: merged(),
        F.instance_norm: merged(),
        F.glu: gated(),
        torch.div: quotient(),
    }
    table |= {torch.softmax: derivative()}
    if not zeros:
        for rectifier in (torch.relu, torch.abs):
            del table[operation_of(rectifier)]
    return table


def excitation_table() -> dict[Any, Rule]:
    """Give the table of excitation backprop: norms and activations pass on, attention weights are constants."""
    table: dict[Any, Rule] = dict.fromkeys((*_ELEMENTWISE, *_NORMS, F.batch_norm), passing())
    table |= dict.fromkeys((*LINEAR, *SUMMED_PRODUCTS, *PRODUCTS), excitation())
    table |= dict.fromkeys((*_SCALES, torch.softmax), constant())
    table |= dict.fromkeys(BILINEAR, product())
    return table | {torch.pow: power(), torch.div: quotient(), F.glu: gated()}


def excitation_torchray() -> dict[Any, Rule]:
    """Give TorchRay's table, by which the cotangent itself is relevance.

    ReLU, maximum pooling and `+` keep their derivatives: at a skip relevance is doubled.
    """
    table: dict[Any, Rule] = dict.fromkeys((F.linear, *CONVOLUTIONS), excitation(plain=True))
    table |= dict.fromkeys(_POOLING, norm(1e-20, plain=True))
    return table | {F.batch_norm: propagated(lambda y, x: torch.ones_like(x))}


def epsilon_plus(epsilon_: float = 1e-6) -> dict[Any, Rule]:
    """Give the composite of the epsilon rule for linear layers and z-plus for convolutions."""
    return composed(epsilon(epsilon_), z_plus())


def epsilon_gamma_box(low: Any, high: Any, epsilon_: float = 1e-6, gamma_: float = 0.25) -> dict[Any, Rule]:
    """Give the composite of epsilon for linear layers, gamma for convolutions, z-box for the first of them."""
    return composed(epsilon(epsilon_), first(z_box(low, high), gamma(gamma_)))


def epsilon_alpha2_beta1(epsilon_: float = 1e-6) -> dict[Any, Rule]:
    """Give the composite of epsilon for linear layers and alpha-beta (2, 1) for convolutions."""
    return composed(epsilon(epsilon_), alpha_beta(2.0, 1.0))


def epsilon_plus_flat(epsilon_: float = 1e-6) -> dict[Any, Rule]:
    """Give the composite `epsilon_plus` with the flat rule at the first linear map."""
    return composed(first(flat(), epsilon(epsilon_)), first(flat(), z_plus()))


def epsilon_alpha2_beta1_flat(epsilon_: float = 1e-6) -> dict[Any, Rule]:
    """Give the composite `epsilon_alpha2_beta1` with the flat rule at the first linear map."""
    return composed(first(flat(), epsilon(epsilon_)), first(flat(), alpha_beta(2.0, 1.0)))


def attn_lrp(epsilon_: float = 1e-6) -> dict[Any, Rule]:
    """Give the composite of Achtibat et al. (2024): epsilon, and the rules for attention that every composite has."""
    return composed(epsilon(epsilon_))


def cp_lrp(epsilon_: float = 1e-6, bias: bool = True) -> dict[Any, Rule]:
    """Give the composite of Ali et al. (2022): attention weights and scales of norms are constants.

    With ``bias=False`` it conserves relevance where norms have no bias.
    """
    return composed(epsilon(epsilon_, bias)) | {torch.softmax: constant()}


NAMED: dict[str, Callable[[], Table]] = {
    name: lambda name=name: rectifier_rules(relu.variant(name), f'The rules "{name}"') for name in relu.VARIANTS
}
for _name, _composite in {
    "excitation": excitation_table,
    "excitation_torchray": excitation_torchray,
    "epsilon": attn_lrp,
    "epsilon_plus": epsilon_plus,
    "epsilon_alpha2_beta1": epsilon_alpha2_beta1,
    "epsilon_plus_flat": epsilon_plus_flat,
    "epsilon_alpha2_beta1_flat": epsilon_alpha2_beta1_flat,
    "attn_lrp": attn_lrp,
    "cp_lrp": cp_lrp,
}.items():
    NAMED[_name] = lambda name=_name, make=_composite: _table(make(), f'The rules "{name}"')


def _table(mapping: Mapping[Any, Rule], name: str) -> Table:
    """Make a table of a mapping; one that shares out relevance watches what is constant, and tells what bends."""
    if not any(isinstance(rule, LinearRule | Remembering) for rule in mapping.values()):
        return Table.of(mapping, name=name)
    told = _TOLD - set(relu.RECTIFIERS)
    untouched = dict.fromkeys(told, lambda *args, **kwargs: NotImplemented)
    chosen = {key: _of_the_input(rule) for key, rule in {**untouched, **mapping}.items()}
    return replace(Table.of(chosen, name=name), watch=watch_constants, tell=told)


def _of_the_input(rule: Rule) -> Rule:
    """Leave what is computed from parameters alone as it is: there is no relevance to share out, nor to tell of."""
    if getattr(rule, "writes", False):
        return rule
    wants_memo = getattr(rule, "wants_memo", False)

    def chosen(operation: Operation, *args: Any, memo: dict[str, Any], **kwargs: Any) -> Any:
        if constants_only(args, kwargs, memo):
            return _value(operation, *args, **kwargs)
        return rule(operation, *args, memo=memo, **kwargs) if wants_memo else rule(operation, *args, **kwargs)

    return Remembering(chosen)


def table_of(rules: Rules) -> Table | None:
    """Turn what `rules=` takes into a table."""
    if rules is None or isinstance(rules, Table):
        return rules
    if isinstance(rules, str):
        if rules not in NAMED:
            raise ValueError(f"`rules` must be one of {', '.join(map(repr, NAMED))}, or a table, got {rules!r}.")
        return NAMED[rules]()
    if isinstance(rules, Mapping):
        for key, rule in rules.items():
            operation = key[1] if isinstance(key, tuple) and len(key) == 2 else key
            if not callable(operation) or not callable(rule):
                raise TypeError(
                    "`rules` must map an operation, or a pair (layer name pattern, operation), to a rule, got "
                    f"{key!r}: {rule!r}."
                )
        return _table({key: _as_rule(rule) for key, rule in rules.items()}, "The rules")
    if isinstance(rules, type) and issubclass(rules, torch.autograd.Function):
        return rectifier_rules(from_function(rules), f"The rules by {rules.__name__}")
    if isinstance(rules, LinearRule | Remembering):
        raise TypeError(
            "`rules` as one function is a rule for rectifiers, and this one shares out relevance: say of which "
            "operations, as in {torch.nn.functional.linear: rule}."
        )
    if callable(rules):
        return rectifier_rules(_for_rectifiers(rules), "The rules")
    raise TypeError(f"`rules` must be a name, a table, an autograd.Function or a function, got {type(rules).__name__}.")


def _as_rule(rule: Rule | type[torch.autograd.Function]) -> Rule:
    return from_function(rule) if isinstance(rule, type) and issubclass(rule, torch.autograd.Function) else rule


def _for_rectifiers(rule: Rule) -> Rule:
    @wraps(rule)
    def only(operation: Operation, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if relu.ceiling(operation, input, *args, **kwargs) is None:
            return NotImplemented
        result = rule(operation, input, *args, **kwargs)
        if not isinstance(result, Tensor) and result is not NotImplemented:
            raise TypeError(
                f"`rules` gave {type(result).__name__} where a rule gives a tensor. A function that makes rules is "
                "called first."
            )
        return result

    return only
