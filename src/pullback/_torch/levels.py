"""Which derivative is being taken: the pullback's own, or one of an explanation.

An explanation is a function of input and parameters, and can be differentiated itself. A rule changes the derivative
that *makes* the explanation; the derivative *of* the explanation must see every operation as it is. Both pass through
the same operations, each at a level of its own: a transform of `torch.func`, or ordinary autograd below them all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pullback._torch.internals import bare, compiling, functorch, interpreter_stack

_DIFFERENTIATES = (functorch.TransformType.Grad, functorch.TransformType.Jvp)


def _levels() -> list[int]:
    return [transform.level() for transform in interpreter_stack() or () if transform.key() in _DIFFERENTIATES]


def level() -> int | None:
    """Return the level of the innermost derivative that is being taken; `None` for ordinary autograd."""
    return max(_levels(), default=None)


def own_elsewhere(ruled: Tensor, input: Tensor, operation: Callable[[], Tensor]) -> Tensor:
    """Return `ruled`, the result of a rule at `input`, with the operation's own derivative at every other level."""
    if compiling():
        return ruled
    levels = _levels()
    if len(levels) < 2 and not (levels and bare(input).requires_grad):  # only one derivative is taken
        return ruled
    return _OwnElsewhere.apply(ruled, operation(), max(levels))  # pyright: ignore[reportReturnType]


class _OwnElsewhere(torch.autograd.Function):
    """One value with two derivatives: by the first argument at the given level, by the second at all others."""

    generate_vmap_rule = True

    @staticmethod
    def forward(ruled: Tensor, own: Tensor, at: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ruled.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.here = level() == inputs[2]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (cotangent, None, None) if ctx.here else (None, cotangent, None)

    @staticmethod
    def jvp(ctx: Any, ruled: Tensor, own: Tensor, _: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return own.clone()


_forward_mode = threading.RLock()


def jvp(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """Run `torch.func.jvp`, one thread at a time.

    torch keeps the levels of forward mode for the process, not for the thread: two threads would end each other's.
    """
    if compiling():
        return torch.func.jvp(function, primals, tangents)
    with _forward_mode:
        return torch.func.jvp(function, primals, tangents)
