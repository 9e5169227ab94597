"""Maps from attention weights: which tokens a token's representation was mixed from.

The weights are read where `softmax` gives them, ``[batch head query key]``, so any model works as it is:
`nn.MultiheadAttention`, fused attention, models of timm and transformers, attention written by hand. A layer is a call
of `softmax` whose result has as many queries as keys, the same number in all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from pullback._core.call import Call
from pullback._core.entry import method, public
from pullback._core.targets import cotangent
from pullback._core.types import Inputs, Model, Output, Params, Target
from pullback._ops.accounting import Account
from pullback._ops.dispatch import Table
from pullback._ops.spellings import Operation
from pullback._torch.internals import eye


def _attention_table(weights: list[Tensor], added: Sequence[Tensor] | None) -> Table:
    """Give the table that reads attention weights, and adds a zero to each, whose cotangent is that of the weights."""

    def rule(operation: Operation, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = operation(input, *args, **kwargs)
        if y.ndim < 3 or y.shape[-1] != y.shape[-2]:
            return y
        weights.append(y)
        return y if added is None else y + added[len(weights) - 1]

    return Table.of({torch.softmax: rule}, name="The rule for attention weights")


def attention_weights(params: Params, model: Model, x: Inputs, *, output: Output = None) -> tuple[Tensor, ...]:
    """Read the attention weights of each layer, ``[batch head query key]``, in the order of calls. Costs 1 forward.

    Raises:
        ValueError: If the model has no self-attention.

    Example:
        >>> model = torch.nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
        >>> (weights,) = attention_weights(params_of(model), model, torch.randn(3, 5, 8))
        >>> weights.shape, torch.allclose(weights.sum(-1), torch.ones(3, 2, 5))
        (torch.Size([3, 2, 5, 5]), True)
    """
    weights: list[Tensor] = []
    call = Call.bind(params, model, x, rules=_attention_table(weights, None), output=output)
    call.forward()
    return _checked(weights, call.x.batch)


def _checked(weights: Sequence[Tensor], batch: int) -> tuple[Tensor, ...]:
    """Give the weights as ``[batch head query key]``."""
    if not weights:
        raise ValueError("`model` has no self-attention: no softmax gave weights with as many queries as keys.")
    if len({w.shape[-1] for w in weights}) > 1 or any(w.shape[0] % batch for w in weights):
        raise ValueError(
            "`model` must attend over the same tokens in all layers, got weights of shapes "
            f"{', '.join(str(list(w.shape)) for w in weights)}."
        )
    return tuple(w if w.ndim == 4 else rearrange(w, "(b h) q k -> b h q k", b=batch) for w in weights)


@public
def attention_rollout(params: Params, model: Model, x: Inputs, *, output: Output = None) -> Tensor:
    r"""Multiply the attention of all layers, the residual connection counted as attention to oneself.

    .. math:: R = \prod_l \tfrac{1}{2} \big(\bar A_l + 1\big)

    with :math:`\bar A` the mean over heads and later layers to the left. Each row adds up to 1. It is the same for all
    targets, and knows nothing of values, of signs or of what lies between attention layers. Costs 1 forward.

    Args:
        params, model, x, output: See `gradient`.

    Returns:
        ``[batch query key]``. For an image and a class token, `pullback.maps.token_grid` lays row 0 out.

    Raises:
        ValueError: If the model has no self-attention, or not over the same tokens in all layers.

    Example:
        >>> model = torch.nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
        >>> r = attention_rollout(params_of(model), model, torch.randn(3, 5, 8))
        >>> torch.allclose(r.sum(-1), torch.ones(3, 5))
        True

    Reference:
        Abnar & Zuidema, Quantifying Attention Flow in Transformers, 2020, sec. 3.
    """
    weights = attention_weights(params, model, x, output=output)
    total = eye(weights[0].shape[-1], weights[0])
    for w in weights:
        total = (w.mean(1) + eye(w.shape[-1], w)) / 2 @ total
    return total


@method("attention", "pairs", "self-attention", forwards=2)
def attention_relevance(
    params: Params, model: Model, x: Inputs, target: Target, *, output: Output = None, strict: bool = False
) -> Tensor:
    r"""Accumulate attention, weighted by its gradient, over layers.

    .. math:: R \leftarrow R + \overline{(\nabla A_l \odot A_l)^+} \, R, \quad R_0 = 1

    with the mean over heads, from the first layer to the last: the self-attention rule of Chefer et al., who call it
    generic attention explainability. Specific to the target. Costs 2 forwards and 1 backward.

    Args:
        params, model, x, target, output: See `gradient`.

    Returns:
        ``[batch query key]``, not negative, the identity included. For an image and a class token,
        `pullback.maps.token_grid` lays row 0 out.

    Raises:
        ValueError: If the model has no self-attention, or not over the same tokens in all layers.

    Example:
        >>> from torch import nn
        >>> layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        >>> model = nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3)).eval()
        >>> r = attention_relevance(params_of(model), model, torch.randn(2, 5, 8), target=1)
        >>> r.shape, bool((r >= torch.eye(5)).all())
        (torch.Size([2, 5, 5]), True)

    Reference:
        Chefer, Gur & Wolf, Generic Attention-Model Explainability for Interpreting Bi-Modal and Encoder-Decoder
        Transformers, 2021, eq. 5, 6.
    """
    found: list[Tensor] = []
    reading = Call.bind(params, model, x, rules=_attention_table(found, None), output=lambda result: torch.zeros(()))
    reading.forward()
    _checked(found, reading.x.batch)
    zeros = [torch.zeros((), dtype=w.dtype, device=w.device).expand(w.shape) for w in found]
    call = replace(reading, output=output)

    def forward(account: Account | None, *added: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        weights: list[Tensor] = []
        y = replace(call, rules=_attention_table(weights, added)).forward(account=account)
        return y, tuple(weights)

    (y, *_), pull, weights = call.linearise(forward, zeros)
    gradients = _checked(pull(cotangent(y, target)), call.x.batch)
    total = eye(weights[0].shape[-1], weights[0])
    for w, g in zip(_checked(weights, call.x.batch), gradients, strict=True):
        total = total + (w * g).clamp(min=0).mean(1) @ total
    return total
