"""Call a model as a pure function, and pull cotangents back through the call.

`pullback` is the one wrapper on `torch.func.vjp`: every gradient-like method is `pull(cotangent(output, target))`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from torch import Tensor, nn

from pullback._core.layers import Layer

Model: TypeAlias = "nn.Module | Callable[[Any, Any], Any]"
Inputs: TypeAlias = "Tensor | tuple[Tensor, ...] | dict[str, Tensor]"
Target: TypeAlias = "int | Sequence[int] | np.ndarray | Tensor | Callable[[Tensor], Tensor] | None"
Select: TypeAlias = "str | int | Layer | Callable[[Any], Tensor] | None"


class PullbackWarning(UserWarning):
    """Something in the model is explained otherwise than the caller may expect."""

Tensors = tuple[Tensor, ...]
Back = Callable[[Sequence[Tensor | None]], Tensors]
Reduce = Callable[[Tensors], Tensors]


class Pull(Protocol):
    """Pull a cotangent back; what `reduce` makes of the gradients takes their place, chunk by chunk."""

    def __call__(self, cotangent: Tensor, reduce: Reduce | None = None) -> Tensors: ...
