"""The types that every method speaks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from torch import Tensor, nn


class PullbackWarning(UserWarning):
    """Something in the model is explained otherwise than the caller may expect.

    ``warnings.simplefilter("error", pullback.PullbackWarning)`` makes it an error.
    """


_SPEC = re.compile(r"^(?P<name>[^:#]*)(?::(?P<part>[^#]+))?(?:#(?P<call>\d+))?$")


@dataclass(frozen=True)
class Layer:
    """A layer's output or input, where a method asks for a layer.

    As `output=` it explains a neuron: the one that `target` chooses in the layer's activation.

    Attributes:
        name: Dotted module name. ``"name:1"`` means the second tensor that the layer returns, ``"name#0"`` its first
            call.
        at: ``"output"`` or ``"input"``.
        part: Which tensor of a tuple or dict; the first one if omitted.
        call: Which call of a layer that is called several times; all of them if omitted.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.randn(5, 3)
        >>> a = gradient(params, model, x, 2, output=Layer("0"))
        >>> torch.allclose(a, model[0].weight[2].expand(5, 3))
        True
        >>> a = gradient(params, model, x, 0, layer=Layer("2", at="input"))
        >>> torch.allclose(a, model[2].weight[0].expand(5, 4))
        True
    """

    name: str
    at: Literal["output", "input"] = "output"
    part: int | str | None = None
    call: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"`layer` must be a dotted module name, got {type(self.name).__name__}.")
        if self.at not in ("output", "input"):
            raise ValueError(f"`at` must be 'output' or 'input', got {self.at!r}.")
        if ":" not in self.name and "#" not in self.name:
            return
        match = _SPEC.match(self.name)
        if match is None:
            raise ValueError(f"`layer` must read 'name', 'name:part' or 'name#call', got {self.name!r}.")
        part, call = match["part"], match["call"]
        object.__setattr__(self, "name", match["name"])
        if part is not None:
            object.__setattr__(self, "part", int(part) if part.lstrip("-").isdigit() else part)
        if call is not None:
            object.__setattr__(self, "call", int(call))

    @staticmethod
    def of(layer: str | Layer) -> Layer | None:
        """Return the layer that is named; `None` for ``""``, the model's input."""
        found = layer if isinstance(layer, Layer) else Layer(layer)
        return found if found.name else None

    def __str__(self) -> str:
        part = "" if self.part is None else f":{self.part}"
        call = "" if self.call is None else f"#{self.call}"
        return f"{self.name}{part}{call}"


# What methods take. They are real types, for annotations of one's own.
Params: TypeAlias = Mapping[str, Tensor] | tuple[Mapping[str, Tensor], ...]
Model: TypeAlias = nn.Module | Callable[[Any, Any], Any]
Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
Target: TypeAlias = int | Sequence[int] | np.ndarray | Tensor | Callable[[Tensor], Tensor] | None
Output: TypeAlias = str | int | Layer | Callable[[Any], Tensor] | None
ChunkSize: TypeAlias = int | Literal["auto"] | None  # how many run together; None for all
Progress: TypeAlias = Callable[[int, int], object] | None
X = TypeVar("X", bound=Inputs)  # a result has the structure of `x`

Tensors: TypeAlias = tuple[Tensor, ...]
Reduce: TypeAlias = Callable[[Tensors], Tensors]
Back: TypeAlias = Callable[[Sequence[Tensor | None]], Tensors]  # from cotangents of all outputs to those of all inputs


class Pull(Protocol):
    """Pull a cotangent back. `reduce` turns the gradients of each chunk of targets into what is kept of them."""

    def __call__(self, cotangent: Tensor, reduce: Reduce | None = None) -> Tensors: ...
