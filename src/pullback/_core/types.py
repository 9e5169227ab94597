"""The types that every method speaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from torch import Tensor, nn

Params: TypeAlias = "Mapping[str, Tensor] | tuple[Mapping[str, Tensor], ...]"
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


@dataclass(frozen=True)
class Layer:
    """What a layer puts out (or takes in), where `output=` asks which output is explained.

    The attribution is then that of a neuron, which `target` chooses in the layer's activation.

    Example:
        >>> from pullback import gradient, params_of
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.randn(5, 3)
        >>> a = gradient(params, model, x, 2, output=Layer("0"))
        >>> torch.allclose(a, model[0].weight[2].expand(5, 3))
        True
    """

    name: str
    at: str = "output"
