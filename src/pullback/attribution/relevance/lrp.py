"""Layer-wise relevance propagation, and the sum of relevance at each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp

from pullback._core.entry import public
from pullback._core.forward import run
from pullback._core.inputs import InputTree
from pullback._core.layers import Site
from pullback._core.shapes import layer_shapes
from pullback._core.targets import cotangent
from pullback._core.types import Inputs, Model, Params, Select, Target
from pullback._core.vjp import Pulled, pullback
from pullback.rules._coordinates import nonzero
from pullback.rules._table import Rules, table_of


def times_activation(pulled: Pulled, cotangents: Sequence[Tensor]) -> Any:
    """Give relevance: the activation times its cotangent, zeros counted as a tiny number as in the rules."""
    return pulled.rebuild([nonzero(a) * c for a, c in zip(pulled.activations, cotangents, strict=True)])


@public
def lrp(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    rules: Rules = "epsilon_plus",
    layer: str = "",
    at: str = "output",
    output: Select = None,
    strict: bool = False,
) -> Any:
    r"""Share out the score backwards, operation by operation, to the input or to a layer.

    .. math:: R_i = \sum_j \frac{q_{ji}}{\sum_k q_{jk}} R_j

    with contributions q that the rules define. Relevance adds up to the score where the rules conserve it: biases and
    the epsilon in denominators take their share unless a rule is made with ``bias=False``, which does harm where batch
    norm is merged: see `docs/relevance.md`. Costs 1 gradient with the epsilon rule, and with others, at each linear
    map, one more forward and backward for each kind of contribution that they tell apart; under `vmap` over targets the
    forwards are shared.

    Args:
        params, model, x, target, layer, at, output: See `gradient`.
        rules: The name of a composite (``"epsilon"``, ``"epsilon_plus"``, ``"epsilon_alpha2_beta1"``, these two with
            ``"_flat"``, ``"attn_lrp"``, ``"cp_lrp"``, ``"excitation"``), or a table ``{operation: rule}``: see
            `pullback.rules`.
        strict: Raise where `rules` do not cover an operation that is not piecewise linear, instead of warning.

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
    pulled = pullback(params, model, x, layer=layer, at=at, output=output, table=table_of(rules), strict=strict)
    return times_activation(pulled, pulled.pull(cotangent(pulled.output, target)))


@public
def relevance_flow(
    params: Params,
    model: nn.Module,
    x: Inputs,
    target: Target,
    *,
    layers: Sequence[str],
    rules: Rules = "epsilon_plus",
    output: Select = None,
    strict: bool = False,
) -> dict[str, Tensor]:
    """Sum the relevance of `lrp` at each of several layers, to see where it is lost or made.

    A total that stays that of the score is necessary, not enough: two errors at a branching may cancel, and a layer
    beside which a skip passes has but a part of the total. Costs one call of `lrp` for all layers.

    Args:
        params, model, x, target, output: See `gradient`.
        layers: Layer names; ``""`` is the input.
        rules, strict: See `lrp`.

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
    sites = {name: Site.parse(name, "output") for name in layers if name}
    seen = {site: layer_shapes(params, model, x, site) for site in sites.values()}
    zeros = {(s, i): torch.zeros(v.shape, dtype=v.dtype) for s, calls in seen.items() for i, v in enumerate(calls)}
    tree = InputTree(x)

    def forward(inputs: tuple[Tensor, ...], added: dict[tuple[Site, int], Tensor]) -> tuple[Tensor, Any]:
        activations: dict[tuple[Site, int], Tensor] = {}

        def edit(site: Site, call: int, activation: Tensor) -> Tensor:
            if site.call not in (None, call):
                return activation
            activations[site, call] = activation
            return torch.ops.aten.add.Tensor(activation, added[site, call].to(activation.device, activation.dtype))

        options: dict[str, Any] = {"output": output, "table": table_of(rules), "strict": strict}
        given = tree.rebuild(inputs, lambda v: v)
        return run(params, model, given, sites=tuple(seen), edit=edit, seen=seen, **options), activations

    y, pull, activations = vjp(forward, tree.tensors, zeros, has_aux=True)  # pyright: ignore[reportAssignmentType]
    inputs, cotangents = pull(cotangent(y, target))
    found: dict[str, Tensor] = {}
    for name in layers:
        if name:
            parts = [(a, cotangents[at]) for at, a in activations.items() if at[0] == sites[name]]
        else:
            parts = list(zip(tree.tensors, inputs, strict=True))
        found[name] = sum((nonzero(a) * c).flatten(1).sum(1) for a, c in parts)  # pyright: ignore[reportArgumentType]
    return found
