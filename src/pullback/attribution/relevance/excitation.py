"""Excitation backprop, and its contrast with a negated classifier."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from pullback._core.call import Call
from pullback._core.entry import method
from pullback._core.modules import named_layers, nearest
from pullback._core.targets import cotangent
from pullback._core.types import Inputs, Layer, Model, Output, Params, Target
from pullback._ops.constants import Remembering
from pullback._ops.reading import LINEAR
from pullback._torch.internals import compiling
from pullback.attribution.relevance.lrp import times_activation
from pullback.rules._composites import excitation_table
from pullback.rules._coordinates import nonzero
from pullback.rules._lrp import contrasted, excitation, last
from pullback.rules._table import table_of


@method("relevance")
def excitation_backprop(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer = "",
    output: Output = None,
) -> Any:
    r"""Share out a probability of 1 backwards, in proportion to positive contributions.

    .. math:: R_i = x_i \sum_j \frac{w_{ji}^+}{\sum_k w_{jk}^+ x_k} R_j

    A winner-take-all walk from the target to the input. It adds up to 1 for each example: at a skip and at a
    concatenation relevance is split in proportion, batch norm and activations hand it on. Where no weight into a unit
    is positive, its relevance ends. Where numbers of both signs are added, as at a skip, shares may be negative.

    Args:
        params, model, x, layer, output: See `gradient`.
        target: See `gradient`; a cotangent is taken as the relevance of the output.

    Returns:
        Relevance, shaped like `x` or the activation. Sum it over channels for a map.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> r = excitation_backprop(params, model, x, target=0, layer="1")
        >>> torch.allclose(r.sum((1, 2, 3)), torch.ones(2), atol=1e-5)
        True

    Reference:
        Zhang, Lin, Brandt, Shen & Sclaroff, Top-down Neural Attention by Excitation Backprop, 2016, sec. 3.2.
    """
    table = table_of("excitation")
    call = Call.bind(params, model, x, layer, table, output)
    pulled = call.pullback()
    return times_activation(call, pulled, pulled.pull(_probability(pulled.output, target)))


def _probability(y: Tensor, target: Target) -> Tensor:
    """Give the cotangent whose relevance is the target's indicator."""
    return cotangent(y, target) / nonzero(y)


@method("relevance")
def contrastive_excitation_backprop(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer = "",
    contrast_layer: str | None = None,
    classifier: str | None = None,
    output: Output = None,
) -> Any:
    r"""Excitation backprop of the target less that of its opposite, a classifier with negated weights.

    .. math:: R = T (P - \bar P)

    with relevance P of the target and :math:`\bar P` of its opposite before the classifier, and T the way from there to
    `layer`. What all classes share cancels. T is linear, so the rule of the classifier hands on the difference, and one
    pass serves both. Costs 1 gradient with the rules of excitation backprop.

    Args:
        params, model, x, target, output: See `excitation_backprop`.
        layer: Where relevance is wanted, before the classifier.
        contrast_layer: Where the paper compares target and opposite. As T is linear, the result is the same at every
            layer that all paths pass through: it need not be given.
        classifier: The layer whose weight is negated. The last linear layer or convolution if omitted.

    Returns:
        Relevance, signed, shaped like `x` or the activation.

    Raises:
        ValueError: If the model has no such layers, or the classifier is no linear layer or convolution.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.randn(5, 3)
        >>> a = contrastive_excitation_backprop(params, model, x, 0, layer="1")
        >>> b = excitation_backprop(params, model, x, 0, layer="1")
        >>> bool((a <= b + 1e-6).all())
        True

    Reference:
        Zhang, Lin, Brandt, Shen & Sclaroff, Top-down Neural Attention by Excitation Backprop, 2016, sec. 3.3.
    """
    if not isinstance(model, nn.Module):
        raise TypeError("`model` must be a torch.nn.Module, whose classifier can be negated, got a function.")
    names = [name for name, _ in named_layers(model)]
    if contrast_layer is not None and Layer(contrast_layer).name not in names:
        raise ValueError(f"No layer `{contrast_layer}` in the model. {nearest(contrast_layer, names)}")
    by_itself = classifier is None and not compiling()
    if classifier is None:
        linear = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        classifier = next((n for n, layer in reversed([*named_layers(model)]) if isinstance(layer, linear)), None)
        if classifier is None:
            raise ValueError("`classifier` must be named: the model has no linear layer or convolution.")
    met: list[bool] = []

    def rule(*args: Any, **kwargs: Any) -> Any:
        met.append(True)
        return contrast(*args, **kwargs)

    def ending(*given: Any) -> Any:
        return (plain if met else contrast).shares(*given)  # pyright: ignore[reportOptionalCall]

    contrast, plain = contrasted(), excitation()
    chosen = excitation_table()
    if by_itself:  # where the classifier's forward is called past the layer, the last map is it
        chosen |= dict.fromkeys(LINEAR, last(replace(contrast, shares=ending), plain))
    table = table_of({**chosen, **{(classifier, operation): Remembering(rule) for operation in LINEAR}})
    call = Call.bind(params, model, x, layer, table, output)
    pulled = call.pullback()
    if not met and not by_itself:
        raise ValueError(f"`classifier` must name a linear layer or a convolution that runs, got {classifier!r}.")
    return times_activation(call, pulled, pulled.pull(_probability(pulled.output, target)))
