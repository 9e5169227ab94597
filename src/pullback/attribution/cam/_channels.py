"""A layer's activation as channels over positions: how it is laid out, and sums over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pullback import maps
from pullback._core.call import Call
from pullback._core.types import Inputs, Layer, Model, Params

Tokens: TypeAlias = "Literal['channels_first', 'channels_last'] | tuple[int, int] | Callable[[Tensor], Tensor] | None"


def gridded(activation: Tensor, x: Any, tokens: Tokens = None) -> Tensor:
    """Lay an activation out as ``[batch channel ...]``: see the head of `pullback.cam`."""
    image = isinstance(x, Tensor) and x.ndim == 4
    if callable(tokens):
        activation = tokens(activation)
    elif tokens == "channels_last" or (tokens is None and image and _is_channels_last(activation, x)):
        activation = activation.movedim(-1, 1)
    elif tokens is None and image and activation.ndim == 3:
        return maps.token_grid(activation, x)
    elif isinstance(tokens, tuple):
        rows, columns = tokens
        if activation.ndim != 3 or activation.shape[1] < rows * columns:
            raise ValueError(f"`tokens` asks for a {rows} x {columns} grid of an activation {list(activation.shape)}.")
        activation = activation[:, activation.shape[1] - rows * columns :].transpose(1, 2).unflatten(2, tokens)
    elif tokens not in (None, "channels_first"):
        raise ValueError(
            f"`tokens` must be None, (rows, columns), 'channels_first', 'channels_last' or a function, got {tokens!r}."
        )
    if activation.ndim < 3:
        raise ValueError(
            f"`layer` must have spatial axes, [batch channel ...], or tokens of an image; its activation is "
            f"{list(activation.shape)}."
        )
    return activation


def _is_channels_last(activation: Tensor, x: Tensor) -> bool:
    """Say whether only the first two axes of an example have the image's aspect, up to a pixel."""
    if activation.ndim != 4:
        return False
    _, a, b, c = activation.shape
    height, width = x.shape[2:]
    first, last = (abs(rows * width - columns * height) <= max(height, width) for rows, columns in ((a, b), (b, c)))
    return first and not last


def over_positions(values: Tensor) -> Tensor:
    """Sum ``[batch channel ...]`` over positions, and keep the axes."""
    return values.sum(tuple(range(2, values.ndim)), keepdim=True)


def read_channels(params: Params, model: Model, x: Inputs, layer: str | Layer, tokens: Tokens) -> Tensor:
    """Read a layer's activation, ``[batch channel ...]``; the sum over calls."""
    calls = Call.bind(params, model, x, layer).activations()
    return gridded(sum(calls[1:], calls[0]), x, tokens)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """Divide, 0 where the divisor is 0."""
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, torch.ones_like(b), b))
