r"""Backward variants of rectifiers.

A rectifier passes its input where it is positive, :math:`y = \max(x, 0)`, and its derivative passes the cotangent
there. The variants of this module keep the forward and change what passes backward:

==================== ==========================================
plain                :math:`g \cdot 1[x > 0]`, the derivative
guided               :math:`\max(g, 0) \cdot 1[x > 0]`
guided_torchray      :math:`\max(g, 0) \cdot 1[x \ge 0]`
deconvnet            :math:`\max(g, 0)`
==================== ==========================================

At 0 nothing passes, as in torch; TorchRay lets the cotangent pass there. Rectifiers with a ceiling (`relu6`,
`hardtanh(0, c)`, `clamp(0, c)`) pass nothing above it either, but for deconvnet.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from pullback._ops.dispatch import SAVED_TENSORS, Rule
from pullback._ops.spellings import Operation, canonical
from pullback._torch.internals import compiling, current_level
from pullback._torch.levels import level

RECTIFIERS = tuple(
    canonical(op) for op in (torch.relu, F.relu6, F.hardtanh, torch.clamp, torch.clamp_min, torch.threshold)
)
_RELU, _RELU6, _HARDTANH, _CLAMP, _CLAMP_MIN, _THRESHOLD = RECTIFIERS


def ceiling(operation: Operation, x: Tensor, *args: Any, **kwargs: Any) -> float | None:
    """Give the value at which a rectifier saturates (infinity for ReLU), or None where the operation is none."""

    def argument(position: int, name: str, default: Any) -> Any:
        return kwargs.get(name, args[position] if len(args) > position else default)

    if operation is _RELU:
        return float("inf")
    if operation is _RELU6:
        return 6.0
    if operation is _THRESHOLD:
        bounds = argument(0, "threshold", None), argument(1, "value", None), None
        low, high = (0 if bounds[:2] == (0, 0) else None), None
    elif operation is _HARDTANH:
        low, high = argument(0, "min_val", -1.0), argument(1, "max_val", 1.0)
    elif operation is _CLAMP_MIN:
        low, high = argument(0, "min", None), None
    elif operation is _CLAMP:
        low, high = argument(0, "min", None), argument(1, "max", None)
    else:
        return None
    if isinstance(low, Tensor) or isinstance(high, Tensor) or low is None or low != 0:
        return None
    return float("inf") if high is None else float(high)


class _TracedRectifier(torch.autograd.Function):
    """A rectifier with one of the backward variants. It keeps a mask, not its input, which may be overwritten."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, high: float, variant: str, at: int | None) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = x.clamp(min=0) if high == float("inf") else x.clamp(0, high)
        # 0 and 1 in the dtype of x: comparisons, and products with them, are slow on a CPU
        passes = 1 - x.clamp(max=0).abs().sign() if variant == "guided_torchray" else y.sign()
        return y, passes if high == float("inf") else passes * (high - y).sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.variant = inputs[2]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Any) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (passes,) = ctx.saved_tensors
        if ctx.variant != "plain":
            cotangent = cotangent.clamp(min=0)
        return (cotangent if ctx.variant == "deconvnet" else cotangent * passes), None, None, None


class _Rectifier(_TracedRectifier):
    """The same with what torch.compile does not trace: forward mode, and the plain derivative at levels but `at`."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _TracedRectifier.setup_context(ctx, inputs, output)
        ctx.variant = inputs[2] if level() == inputs[3] else "plain"

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (passes,) = ctx.saved_tensors
        return tangent * passes, None


def _guided(cotangents: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
    """Where a rectifier's own derivative has passed, keep what is positive: in its place, where nobody derives that."""
    positive = torch.relu if torch.is_grad_enabled() else torch.relu_
    return tuple(None if g is None else positive(g) for g in cotangents)


def _deconvnet(_: Any, cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else torch.relu(g) for g in cotangents)


_HOOKS = {"guided": _guided, "deconvnet": _deconvnet}


def _hooked(x: Tensor, high: float, name: str, inplace: bool, kept: list[tuple[Tensor, int]]) -> Tensor:
    """Run torch's own rectifier and change what its node in the graph passes on: no mask, no more memory.

    The node keeps `x` or the result, which the model may write to: what is noted in `kept` finds that.
    """
    y = (torch.relu_ if inplace else torch.relu)(x) if high == float("inf") else F.hardtanh(x, 0.0, high, inplace)
    if y.grad_fn is not None:
        if name in _HOOKS:
            y.grad_fn.register_hook(_HOOKS[name])
        saved = x if high != float("inf") and not inplace else y
        kept.append((saved, saved._version))
    return y


def variant(name: str) -> Rule:
    """Give the rule that runs every rectifier with the backward variant of this name."""

    def rule(
        operation: Operation, input: Tensor, *args: Any, inplace: bool = False, memo: Any = None, **kwargs: Any
    ) -> Any:
        high = ceiling(operation, input, *args, **kwargs)
        if high is None:
            return NotImplemented
        kept = None if memo is None or name == "guided_torchray" else memo.get(SAVED_TENSORS)
        if compiling():
            y = _TracedRectifier.apply(input, high, name, None)[0]  # pyright: ignore[reportOptionalSubscript]
        elif kept is None or current_level() is not None or forward_ad._current_level >= 0:
            y = _Rectifier.apply(input, high, name, level())[0]  # pyright: ignore[reportOptionalSubscript]
        elif inplace and input._is_view():  # its node would be that of the whole tensor
            y = _hooked(input, high, name, False, kept)
        else:
            return _hooked(input, high, name, inplace, kept)
        return input.copy_(y) if inplace else y

    rule.writes = rule.wants_memo = True  # pyright: ignore[reportFunctionMemberAccess]  # see `pullback._ops`
    return rule


VARIANTS = ("plain", "guided", "guided_torchray", "deconvnet")
