"""Batch, instance and layer norm in forms that can be differentiated as often as needed.

On a CPU the native backward of batch and instance norm is silently wrong at batch size 1 when the cotangent comes back
in channels-last-like strides. In eval mode batch norm is an affine map, and its backward one multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from pullback._ops.spellings import Operation
from pullback._torch.internals import compiling, current_level, is_functorch_wrapped_tensor


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


def batch_norm(
    mode: Any,
    func: Operation,
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


def instance_norm(
    mode: Any,
    func: Operation,
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
        return batch_norm(mode, func, input, running_mean, running_var, weight, bias, False, momentum, eps)
    dims = list(range(2, input.ndim))
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    mean, var = wide.mean(dims, keepdim=True), wide.var(dims, unbiased=False, keepdim=True)
    weight, bias = (None if v is None else _per_channel(v, input) for v in (weight, bias))
    return _normalised(input, mean, var, weight, bias, eps)


def torch_norm(form: Operation) -> Operation:
    """Adapt to the argument order of `torch.batch_norm` and `torch.instance_norm`: weight and bias come first."""

    def adapted(
        mode: Any,
        func: Operation,
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
