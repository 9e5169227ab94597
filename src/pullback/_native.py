"""Torch operations whose own form is wrong, random, unbatched, wasteful or has no second derivative, in a better one.

- `batch_norm`, `instance_norm`: on a CPU the native backward is silently wrong at batch size 1 when the cotangent comes
  back in channels-last-like strides. In eval mode batch norm is an affine map, and its backward one multiplication.
- `adaptive_avg_pool` to one position: its backward writes the same number to every position.
- `scaled_dot_product_attention`: the fused kernels have no batching rule and no second derivative. The explicit form
  holds the attention matrix, ``[batch head query key]``.
- `multi_head_attention_forward`: one Python function that would hide its parts (linear, softmax) from the rules.
- `dropout` with ``training=True`` hard-coded: an explanation of a random function is not a function. Left out and told.
- `weight_norm`: the fused kernel has neither a batching rule nor forward mode; `clamp_` has no batching rule.
- `embedding` with ``max_norm``: torch rescales the weight in place.
- `2 / x`, `2**x`, `x **= 2`, `a @ x` by reflection: Python functions that would hide what they are made of.
- recurrent layers on CUDA: cuDNN refuses a backward in eval mode and has no second derivative. On a CPU, torch 2.0's
  LSTM has none either, but in float64.

A form is called as ``form(mode, func, *args, **kwargs)``; it runs outside the mode; ``with mode.within():`` goes back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from pullback._torch import LSTM_IS_ONE_PIECE, compiling, current_level, is_functorch_wrapped_tensor

Form = Callable[..., Any]
DROPOUT = "dropout with training=True"


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(1, -1, *[1] * (x.ndim - 2))


def _normalised(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Apply ``(x - mean) / sqrt(var + eps) * weight + bias`` as one affine map, statistics in at least float32."""
    scale = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    shift = -mean * scale if bias is None else bias - mean * scale
    if scale.ndim == 1:
        scale, shift = _per_channel(scale, x), _per_channel(shift, x)
    y = x * scale
    # in place where no transform may batch the shift alone: one pass over memory less
    y = y + shift if compiling() or is_functorch_wrapped_tensor(shift) else y.add_(shift)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _is_constant(*tensors: Tensor | None) -> bool:
    """Say whether nothing is derived from a result of these: torch's own form is then right, and the fastest."""
    if compiling() or forward_ad._current_level >= 0:
        return False
    derives, mapped, first = torch.is_grad_enabled(), current_level() is not None, tensors[0]
    for t in tensors:
        if t is not None and (
            (derives and t.requires_grad)
            or t.dtype != first.dtype  # pyright: ignore[reportOptionalMemberAccess]
            or (mapped and is_functorch_wrapped_tensor(t))
        ):
            return False
    return True


class _Normed(torch.autograd.Function):
    """Batch norm by constant statistics, one pass over memory each way. For ordinary autograd alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
        scale = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
        ctx.save_for_backward(_per_channel(scale, x))
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (scale,) = ctx.saved_tensors
        return cotangent * scale, None, None, None, None, None


def _batch_norm(
    mode: Any,
    func: Form,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        dims = [0, *range(2, input.ndim)]
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        mean, var = wide.mean(dims, keepdim=True), wide.var(dims, unbiased=False, keepdim=True)
    else:
        same = func is F.batch_norm and input.dtype == running_mean.dtype
        if same and _is_constant(running_mean, running_var, weight, bias):
            if _is_constant(input):
                return torch.batch_norm(
                    input, weight, bias, running_mean, running_var, False, momentum, eps, torch.backends.cudnn.enabled
                )
            if current_level() is None:
                return _Normed.apply(input, running_mean, running_var, weight, bias, eps)  # pyright: ignore[reportReturnType]
        wide_dtype = torch.promote_types(running_mean.dtype, torch.float32)
        mean, var = running_mean.to(wide_dtype), running_var.to(wide_dtype)
        return _normalised(input, mean, var, weight, bias, eps)
    weight, bias = (None if v is None else _per_channel(v, input) for v in (weight, bias))
    return _normalised(input, mean, var, weight, bias, eps)


def _instance_norm(
    mode: Any,
    func: Form,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(mode, func, input, running_mean, running_var, weight, bias, False, momentum, eps)
    dims = list(range(2, input.ndim))
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    mean, var = wide.mean(dims, keepdim=True), wide.var(dims, unbiased=False, keepdim=True)
    weight, bias = (None if v is None else _per_channel(v, input) for v in (weight, bias))
    return _normalised(input, mean, var, weight, bias, eps)


def _pooled(mode: Any, func: Form, input: Tensor, output_size: Any) -> Tensor:
    """Average over all positions as a sum and a quotient: the same number, and a cotangent that takes no memory."""
    axes = int(func.__name__[-2])
    sizes = (output_size,) * axes if isinstance(output_size, int) else tuple(output_size)
    if any(n != 1 for n in sizes) or input.ndim != axes + 2 or input.dtype not in (torch.float32, torch.float64):
        return func(input, output_size)
    return input.sum(tuple(range(2, input.ndim)), keepdim=True) / math.prod(input.shape[2:])


def _torch_norm(form: Form) -> Form:
    """Adapt to the argument order of `torch.batch_norm` and `torch.instance_norm`: weight and bias come first."""

    def adapted(
        mode: Any,
        func: Form,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        use_input_stats: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        return form(mode, func, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)

    return adapted


def _attention(
    mode: Any,
    func: Form,
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
        mode.tell(DROPOUT)
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


def _multi_head_attention(
    mode: Any,
    func: Form,
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
        mode.tell(DROPOUT)
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


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer norm in parts, for third derivatives: those of torch's own are wrong. Stands in no table."""
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keepdim=True)
    unit = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    unit = unit if weight is None else unit * weight
    return (unit if bias is None else unit + bias).to(input.dtype)


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


def _dropout(
    mode: Any, func: Form, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    if training and p > 0:
        mode.tell(DROPOUT)
    return input


def _torch_dropout(mode: Any, func: Form, input: Tensor, p: float, train: bool) -> Tensor:
    return _dropout(mode, func, input, p, train)


def _embedding(
    mode: Any,
    func: Form,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is None:
        return func(input, weight, padding_idx)
    rows = func(input, weight, padding_idx)
    norm = torch.linalg.vector_norm(rows.detach(), norm_type, -1, keepdim=True)
    return torch.where(norm > max_norm, rows * (max_norm / (norm + 1e-7)), rows)


def _recurrent(mode: Any, func: Form, data: Tensor, *rest: Any, **kwargs: Any) -> Any:
    args: tuple[Any, ...] = (data, *rest)
    packed = len(args) > 3 and isinstance(args[3], list | tuple)  # (data, batch_sizes, hx, params, ...)
    given = [part for arg in args for part in (arg if isinstance(arg, list | tuple) else [arg])]
    # torch takes it apart for a derivative, but not for `vmap` alone
    mapped = any(torch._C._functorch.is_batchedtensor(t) for t in given if isinstance(t, Tensor))  # pyright: ignore[reportAttributeAccessIssue]
    whole = LSTM_IS_ONE_PIECE and func is torch.lstm and data.dtype != torch.float64
    if not data.is_cuda and not mapped and not whole:
        if is_functorch_wrapped_tensor(data):  # the state is written in place: batch it wherever the input is
            zero = torch.zeros_like(data).flatten()[0]
            place = 2 if packed else 1
            state = args[place] + zero if isinstance(args[place], Tensor) else [s + zero for s in args[place]]
            args = (*args[:place], state, *args[place + 1 :])
        return func(*args, **kwargs)
    from torch._decomp import decomposition_table  # imported late: it is slow to import

    overload = "data" if packed else "input"
    return decomposition_table[getattr(getattr(torch.ops.aten, func.__name__), overload)](*args, **kwargs)


def _weight_norm(mode: Any, func: Form, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Apply ``v * g / |v|``, the norm taken over all axes but `dim`, or over all of them for -1."""
    axes = [axis for axis in range(v.ndim) if axis != dim]
    return v * (g / torch.linalg.vector_norm(v, 2, axes, keepdim=dim != -1))


def _written(pure: Form) -> Form:
    """Do out of place what torch has no batching rule for in place, and write it back."""

    def form(mode: Any, func: Form, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input.copy_(pure(input.clone(), *args, **kwargs))  # what it saves must not be overwritten

    return form


def _reflected(function: Form) -> Form:
    """Swap the arguments of an operator that Python asks of its right operand."""

    def form(mode: Any, func: Form, input: Tensor, other: Any) -> Tensor:
        with mode.within():
            return function(other, input)

    return form


def _quotient(other: Any, input: Tensor) -> Tensor:
    return torch.reciprocal(input) * other


def _power(mode: Any, func: Form, input: Tensor, other: Any) -> Tensor:
    with mode.within():
        return input.pow_(other)


def _forms() -> dict[Form, Form]:
    forms: dict[Form, Form] = {
        F.batch_norm: _batch_norm,
        torch.batch_norm: _torch_norm(_batch_norm),
        F.instance_norm: _instance_norm,
        torch.instance_norm: _torch_norm(_instance_norm),
        F.scaled_dot_product_attention: _attention,
        F.multi_head_attention_forward: _multi_head_attention,
        F.embedding: _embedding,
        torch._weight_norm: _weight_norm,
        Tensor.__rdiv__: _reflected(_quotient),
        Tensor.__rpow__: _reflected(torch.pow),
        Tensor.__rmatmul__: _reflected(torch.matmul),
        Tensor.__ipow__: _power,
    }
    for axes in (1, 2, 3):
        forms[getattr(F, f"adaptive_avg_pool{axes}d")] = _pooled
    for name in ("clamp", "clip"):
        for home in (torch, Tensor):
            forms[getattr(home, name + "_")] = _written(getattr(torch, name))
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"):
        forms[getattr(F, name)] = _dropout
    for name in ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"):
        forms[getattr(torch, name)] = forms[getattr(torch, name + "_")] = _torch_dropout
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        forms[getattr(torch, name)] = _recurrent
    return forms


FORMS = _forms()
