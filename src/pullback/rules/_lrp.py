"""The rules of layer-wise relevance propagation and excitation backprop for linear maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback._ops.constants import (
    Remembering,
)
from pullback._ops.dispatch import Rule
from pullback._ops.spellings import Operation
from pullback._torch.internals import readable
from pullback.rules._coordinates import nonzero, scaled, stabilised, stop_gradient
from pullback.rules._linear import Late, LinearRule, Share, maps_met

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
            return scaled(y, nonzero(stop_gradient(y)) / stabilised(stop_gradient(y), epsilon))
        x = stop_gradient(input)
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
        >>> from torch.nn import functional as F
        >>> from pullback.rules import composed
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.randn(5, 3)
        >>> a = lrp(params, model, x, 0, rules=composed(last(z_plus(), epsilon())))
        >>> b = lrp(params, model, x, 0, rules={**composed(epsilon()), ("2", F.linear): z_plus()})
        >>> torch.allclose(a, b)
        True
    """
    return Late(name="last", last=rule, others=others)
