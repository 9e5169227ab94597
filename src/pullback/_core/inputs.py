"""Copies of a batch, folded into the batch axis, and selections of examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pullback._core.types import Inputs


def each(function: Callable[..., Any], *trees: Any) -> Any:
    """Apply a function to the tensors of one or several equal structures (tensor, tuple, dict; `None` stays)."""
    first = trees[0]
    if isinstance(first, Mapping):
        return {key: each(function, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, tuple | list):
        return tuple(each(function, *parts) for parts in zip(*trees, strict=True))
    return None if first is None else function(*trees)


def folded(copies: Tensor) -> Tensor:
    """Fold ``[copy batch ...]`` into ``[(copy batch) ...]``."""
    return copies.flatten(0, 1)


def unfolded(values: Tensor, copies: int) -> Tensor:
    """Unfold ``[(copy batch) ...]`` into ``[copy batch ...]``."""
    return values.unflatten(0, (copies, values.shape[0] // copies))


def repeated(value: Any, copies: int, batch: int) -> Any:
    """Repeat a value that has one entry for each example (a target, an integer input) for each copy; keep others."""
    if isinstance(value, list | tuple) and len(value) == batch:
        return list(value) * copies
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value) if hasattr(value, "__array__") else value
        except (TypeError, ValueError):
            return value
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch:
        return value.repeat(copies, *[1] * (value.ndim - 1))
    return value


def picked(value: Any, indices: Tensor, batch: int) -> Any:
    """Select examples of a value that has one entry for each (a target, a tensor of `x`); keep others."""
    whole = repeated(value, 1, batch)
    if isinstance(whole, list) and len(whole) == batch:
        return [whole[i] for i in indices.tolist()]
    if isinstance(whole, Tensor) and whole.ndim > 0 and whole.shape[0] == batch:
        return whole.index_select(0, indices)
    return value


def picked_inputs(x: Inputs, indices: Tensor, batch: int) -> Any:
    return each(lambda v: picked(v, indices, batch), x)
