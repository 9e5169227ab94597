"""Layer-wise relevance propagation, and the sum of relevance at each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pullback._core.call import Call, InputTree, Pulled
from pullback._core.entry import method, public
from pullback._core.shapes import layer_shapes
from pullback._core.targets import cotangent
from pullback._core.types import Inputs, Layer, Model, Output, Params, Target
from pullback._ops.accounting import Account
from pullback.rules._coordinates import nonzero
from pullback.rules._table import Rules, table_of


def times_activation(call: Call, pulled: Pulled, cotangents: Sequence[Tensor]) -> Any:
    """Give relevance: the activation times its cotangent, zeros counted as a tiny number as in the rules."""
    return call.like([nonzero(a) * c for a, c in zip(pulled.activations, cotangents, strict=True)])


@method("relevance", mechanism="own")
def lrp(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    rules: Rules = "epsilon_plus",
    layer: str | Layer = "",
    output: Output = None,
) -> Any:
    r"""Share out the score backwards, operation by operation, to the input or to a layer.

    .. math:: R_i = \sum_j \frac{q_{ji}}{\sum_k q_{jk}} R_j

    with contributions q that the rules define. Relevance adds up to the score where the rules conserve it: biases and
    the epsilon in denominators take their share unless a rule is made with ``bias=False``, which does harm where batch
    norm is merged: see `docs/relevance.md`. Costs 1 gradient with the epsilon rule, and with others, at each linear
    map, one more forward and backward for each kind of contribution that they tell apart; under `vmap` over targets the
    forwards are shared.

    Args:
        params, model, x, target, layer, output: See `gradient`.
        rules: The name of a composite (``"epsilon"``, ``"epsilon_plus"``, ``"epsilon_alpha2_beta1"``, these two with
            ``"_flat"``, ``"attn_lrp"``, ``"cp_lrp"``, ``"excitation"``), or a table ``{operation: rule}``: see
            `pullback.rules`.

    Returns:
        Relevance, signed, shaped like `x` or the activation, in units of the score. Calls of a reused layer are summed.

    Raises:
        ValueError: If there are no such rules, or `strict` and they do not cover the model.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
        >>> params, x = params_of(model), torch.randn(5, 3)
        >>> r = lrp(params, model, x, 0, rules="epsilon")
        >>> torch.allclose(r.sum(1), model(x)[:, 0], atol=1e-4)
        True

    Reference:
        Bach, Binder, Montavon, Klauschen, Müller & Samek, On Pixel-Wise Explanations for Non-Linear Classifier
        Decisions by Layer-Wise Relevance Propagation, 2015, sec. 2.
    """
    call = Call.bind(params, model, x, layer, table_of(rules), output)
    pulled = call.pullback()
    return times_activation(call, pulled, pulled.pull(cotangent(pulled.output, target)))


@public
def relevance_flow(
    params: Params,
    model: nn.Module,
    x: Inputs,
    target: Target,
    *,
    layers: Sequence[str],
    rules: Rules = "epsilon_plus",
    output: Output = None,
) -> dict[str, Tensor]:
    """Sum the relevance of `lrp` at each of several layers, to see where it is lost or made.

    A total that stays that of the score is necessary, not enough: two errors at a branching may cancel, and a layer
    beside which a skip passes has but a part of the total. Costs one call of `lrp` for all layers.

    Args:
        params, model, x, target, output: See `gradient`.
        layers: Layer names; ``""`` is the input.
        rules: See `lrp`.

    Returns:
        By layer, ``[batch]``: the sum over all of its activation, calls of a reused layer included.

    Raises:
        ValueError: If the model has no such layers.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
        >>> params, x = params_of(model), torch.randn(5, 3).double()
        >>> flow = relevance_flow(params, model, x, 1, layers=("", "0", "1", "2"), rules="epsilon")
        >>> all(torch.allclose(total, model(x)[:, 1], rtol=1e-3) for total in flow.values())
        True
    """
    call = Call.bind(params, model, x, rules=table_of(rules), output=output)
    shapes = {Layer(name): layer_shapes(params, model, x, Layer(name)) for name in layers if name}
    places = [(layer, i) for layer, calls in shapes.items() for i in range(len(calls))]
    zeros = [torch.zeros(shapes[layer][i].shape, dtype=shapes[layer][i].dtype) for layer, i in places]
    inputs = call.x.tensors

    def forward(account: Account | None, *tensors: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        added = dict(zip(places, tensors[len(inputs) :], strict=True))
        activations: dict[tuple[Layer, int], Tensor] = {}

        def edit(layer: Layer, number: int, activation: Tensor) -> Tensor:
            if layer.call not in (None, number):
                return activation
            activations[layer, number] = activation
            delta = added[layer, number].to(activation.device, activation.dtype)
            return torch.ops.aten.add.Tensor(activation, delta)

        moved = replace(call, x=InputTree(call.x.rebuild(tensors[: len(inputs)], lambda v: v)))
        y = moved.forward(edit, shapes, account)
        return y, tuple(activations[place] for place in places)

    (y, *_), pull, activations = call.linearise(forward, [*inputs, *zeros])
    cotangents = pull(cotangent(y, target))
    relevance = [(nonzero(a) * c).flatten(1).sum(1) for a, c in zip((*inputs, *activations), cotangents, strict=True)]
    of_place = dict(zip(places, relevance[len(inputs) :], strict=True))
    found: dict[str, Tensor] = {}
    for name in layers:
        parts = [r for (layer, _), r in of_place.items() if layer == Layer(name)] if name else relevance[: len(inputs)]
        found[name] = sum(parts[1:], parts[0])
    return found
