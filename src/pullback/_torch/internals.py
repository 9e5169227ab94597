"""What torch keeps to itself, under one name for every torch from 2.0 on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import pyfunctorch


def readable(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read: not under a transform, nor while a graph is traced."""
    if compiling() or tensor.is_meta or is_functorch_wrapped_tensor(tensor):
        return False
    return type(tensor) in (Tensor, nn.Parameter)


functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
is_functorch_wrapped_tensor: Callable[[Any], bool] = functorch.is_functorch_wrapped_tensor
compiling: Callable[[], bool] = getattr(getattr(torch, "compiler", None), "is_compiling", lambda: False)

# On a CPU, torch 2.0 runs all but float64 by an LSTM of oneDNN's that has no second derivative, no forward mode, and no
# bfloat16 where the processor has none. Later versions decompose it for a derivative.
LSTM_IS_ONE_PIECE = torch.__version__.startswith("2.0.")


def eye(size: int, like: Tensor) -> Tensor:
    """Return `torch.eye` in the dtype and on the device of a tensor: torch 2.0 has none in bfloat16 on a CPU."""
    return torch.ones(size, dtype=like.dtype, device=like.device).diag()


def bare(tensor: Tensor) -> Tensor:
    """Return the tensor within the wrappers of all transforms: a batched one does not show that it requires grad."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def pulled_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Call `torch.autograd.grad` and keep the graph; make a graph of the call where a cotangent requires grad."""
    keep = torch.is_grad_enabled() and any(bare(cotangent).requires_grad for cotangent in cotangents)
    return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, create_graph=keep, allow_unused=True)


# torch 2.0 shows the innermost transform alone. The others are reached by taking it off the stack, and put back.


@contextmanager
def _cleared() -> Iterator[list[Any]]:
    """Take all transforms off their stack for a while; yield them, innermost first."""
    taken, transforms = [], []
    while (transform := functorch.peek_interpreter_stack()) is not None:
        transforms.append(transform)
        taken.append(functorch.pop_dynamic_layer_stack())
    try:
        yield transforms
    finally:
        for layer in reversed(taken):
            functorch.push_dynamic_layer_stack(layer)


def _stack() -> list[Any]:
    with _cleared() as transforms:
        return transforms[::-1]


def _level() -> int | None:
    transform = functorch.peek_interpreter_stack()
    return None if transform is None else transform.level()


interpreter_stack: Callable[[], list[Any] | None] = getattr(functorch, "get_interpreter_stack", _stack)
current_level: Callable[[], int | None] = getattr(functorch, "maybe_current_level", _level)
outside_transforms: Callable[[], Any] = getattr(pyfunctorch, "temporarily_clear_interpreter_stack", _cleared)
