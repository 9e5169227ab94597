"""Attention in terms of linear, matmul and softmax.

The fused kernels have no batching rule and no second derivative, and would hide their parts from the rules. The
explicit form holds the attention matrix, ``[batch head query key]``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback._ops.spellings import Operation


def attention(
    mode: Any,
    func: Operation,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p > 0:
        mode.note_dropout()
    if enable_gqa:
        key, value = (v.repeat_interleave(query.shape[-3] // v.shape[-3], -3) for v in (key, value))
    allowed = None
    if is_causal:
        rows, columns = (torch.arange(n, device=query.device) for n in (query.shape[-2], key.shape[-2]))
        allowed = columns <= rows[:, None]
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed, attn_mask = attn_mask, None
    with mode.within():  # what comes of parameters alone is known to, also where it is the query
        query = query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        scores = torch.matmul(query, key.transpose(-2, -1))
    if attn_mask is not None:
        scores = torch.ops.aten.add.Tensor(scores, attn_mask.to(scores.dtype))
    if allowed is not None:  # a row that may look at nothing gives zeros, as the native operation does
        scores = scores.masked_fill(~allowed, -math.inf).masked_fill(~allowed.any(-1, keepdim=True), 0)
    with mode.within():
        weights = torch.softmax(scores, -1)
        if allowed is not None:  # by the rules too: what they hold of the weights holds of these
            weights = weights.masked_fill(~allowed, 0)
        return torch.matmul(weights, value)


def multi_head_attention(
    mode: Any,
    func: Operation,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention over ``[token batch channel]``, or ``[token channel]``, in terms of linear, matmul and softmax."""
    batched = query.ndim == 3
    if not batched:
        query, key, value = (v.unsqueeze(1) for v in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    batch, width = query.shape[1], query.shape[2] // num_heads
    with mode.within():
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        if use_separate_proj_weight:
            weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        else:
            assert in_proj_weight is not None
            weights = in_proj_weight.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))  # pyright: ignore[reportArgumentType]
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([x, b.expand(1, batch, -1)]) for x, b in ((k, bias_k), (v, bias_v)))
    with mode.within():
        q, k, v = (x.reshape(x.shape[0], batch, num_heads, width).permute(1, 2, 0, 3) for x in (q, k, v))
    k, v = (x if s is None else s.reshape(batch, num_heads, -1, width) for x, s in ((k, static_k), (v, static_v)))
    extra = k.shape[2] - (key.shape[0] if static_k is None else k.shape[2])
    if add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        extra += 1
    if is_causal and key_padding_mask is None and not need_weights:  # torch then takes the hint for the mask
        mask = q.new_full((q.shape[2], k.shape[2]), -math.inf).triu(1)
    else:
        mask = _attention_mask(q, attn_mask, key_padding_mask, batch, num_heads, extra)
    with mode.within():
        scores = torch.matmul(q * width**-0.5, k.transpose(-2, -1))
    if mask is not None:
        scores = torch.ops.aten.add.Tensor(scores, mask)
    if training and dropout_p > 0:
        mode.note_dropout()
    with mode.within():
        attention = torch.softmax(scores, -1)
        mixed = torch.matmul(attention, v)
    mixed = mixed.permute(2, 0, 1, 3).reshape(query.shape[0], batch, -1)
    with mode.within():
        out = F.linear(mixed, out_proj_weight, out_proj_bias)
    attention = attention.mean(1) if average_attn_weights else attention
    if not batched:
        out, attention = out.squeeze(1), attention.squeeze(0)
    return out, attention if need_weights else None


def _attention_mask(
    q: Tensor, attn_mask: Tensor | None, padding: Tensor | None, batch: int, heads: int, extra: int
) -> Tensor | None:
    """Join the two masks (True or -inf: do not look) into one to be added to the scores."""

    def additive(mask: Tensor) -> Tensor:
        mask = q.new_zeros(mask.shape).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask.to(q.dtype)
        return F.pad(mask, (0, extra))

    masks = []
    if attn_mask is not None:
        mask = additive(attn_mask)
        masks.append(mask.reshape(batch, heads, *mask.shape[1:]) if mask.ndim == 3 else mask)
    if padding is not None:
        masks.append(additive(padding)[:, None, None, :])
    return sum(masks[1:], masks[0]) if masks else None
