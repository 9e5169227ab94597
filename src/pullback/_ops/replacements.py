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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback._ops.attention import attention, multi_head_attention
from pullback._ops.norms import batch_norm, instance_norm, torch_norm
from pullback._ops.spellings import Operation
from pullback._torch.internals import LSTM_IS_ONE_PIECE, is_functorch_wrapped_tensor


def _pooled(mode: Any, func: Operation, input: Tensor, output_size: Any) -> Tensor:
    """Average over all positions as a sum and a quotient: the same number, and a cotangent that takes no memory."""
    axes = int(func.__name__[-2])
    sizes = (output_size,) * axes if isinstance(output_size, int) else tuple(output_size)
    if any(n != 1 for n in sizes) or input.ndim != axes + 2 or input.dtype not in (torch.float32, torch.float64):
        return func(input, output_size)
    return input.sum(tuple(range(2, input.ndim)), keepdim=True) / math.prod(input.shape[2:])


def _dropout(
    mode: Any, func: Operation, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    if training and p > 0:
        mode.note_dropout()
    return input


def _torch_dropout(mode: Any, func: Operation, input: Tensor, p: float, train: bool) -> Tensor:
    return _dropout(mode, func, input, p, train)


def _embedding(
    mode: Any,
    func: Operation,
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


def _recurrent(mode: Any, func: Operation, data: Tensor, *rest: Any, **kwargs: Any) -> Any:
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


def _weight_norm(mode: Any, func: Operation, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Apply ``v * g / |v|``, the norm taken over all axes but `dim`, or over all of them for -1."""
    axes = [axis for axis in range(v.ndim) if axis != dim]
    return v * (g / torch.linalg.vector_norm(v, 2, axes, keepdim=dim != -1))


def _written(pure: Operation) -> Operation:
    """Do out of place what torch has no batching rule for in place, and write it back."""

    def form(mode: Any, func: Operation, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input.copy_(pure(input.clone(), *args, **kwargs))  # what it saves must not be overwritten

    return form


def _reflected(function: Operation) -> Operation:
    """Swap the arguments of an operator that Python asks of its right operand."""

    def form(mode: Any, func: Operation, input: Tensor, other: Any) -> Tensor:
        with mode.within():
            return function(other, input)

    return form


def _quotient(other: Any, input: Tensor) -> Tensor:
    return torch.reciprocal(input) * other


def _power(mode: Any, func: Operation, input: Tensor, other: Any) -> Tensor:
    with mode.within():
        return input.pow_(other)


def _replacements() -> dict[Operation, Operation]:
    forms: dict[Operation, Operation] = {
        F.batch_norm: batch_norm,
        torch.batch_norm: torch_norm(batch_norm),
        F.instance_norm: instance_norm,
        torch.instance_norm: torch_norm(instance_norm),
        F.scaled_dot_product_attention: attention,
        F.multi_head_attention_forward: multi_head_attention,
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


REPLACEMENTS = _replacements()
