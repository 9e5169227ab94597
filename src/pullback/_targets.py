"""Many targets of one input: one forward, and pulls in chunks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pullback._batch import each
from pullback._ops import compiling, swapped

functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
Pull = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass
class _Many:
    """The run of a method over targets that is under way in this thread."""

    targets: Tensor
    chunk_size: int | Literal["auto"] | None
    level: int = 0
    largest: int = 0  # bytes that the largest operation of the forward put out
    total: int = 0  # bytes that all of them put out


_local = threading.local()


def _running() -> _Many | None:
    return None if compiling() else getattr(_local, "many", None)


def over_targets(
    method: Callable[..., Any], *, chunk_size: int | Literal["auto"] | None = "auto"
) -> Callable[..., Any]:
    """Explain many targets at once: one forward shared by all, one backward a target, some of them at a time.

    ``over_targets(method)(params, model, x, targets, **options)`` gives what
    ``torch.vmap(method, (None, None, None, 0))(params, model, x, targets)`` gives, with memory kept to a budget.

    Args:
        method: Any method ``method(params, model, x, target, **options)``.
        chunk_size: Targets pulled back together. ``"auto"`` takes as many as need about the memory that the forward
            needed; `None` all of them.

    Returns:
        A function whose `targets` are class indices ``[target]`` or ``[target batch]``, or floating-point cotangents
        ``[target *output]``, and whose result is ``[target ...]``.

    Raises:
        ValueError: If `chunk_size` is less than 1, or an index is no class.

    Example:
        >>> model = torch.nn.Linear(3, 5)
        >>> params, x = params_of(model), torch.randn(1, 3)
        >>> a = over_targets(gradient)(params, model, x, range(5))
        >>> torch.allclose(a[:, 0], model.weight)
        True
    """
    if chunk_size not in ("auto", None) and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"`chunk_size` must be at least 1, 'auto' or None, got {chunk_size!r}.")

    @wraps(method)
    def many(params: Any, model: Any, x: Any, targets: Any, **options: Any) -> Any:
        targets = _stacked(targets)
        before = getattr(_local, "many", None)
        running = _Many(targets, chunk_size)

        def one(target: Tensor) -> Any:
            running.level = functorch.maybe_current_level() or 0
            return method(params, model, x, target, **options)

        if not compiling():
            _local.many = running
        try:
            return torch.vmap(one, randomness="same")(targets)
        finally:
            if not compiling():
                _local.many = before

    return many


def _stacked(targets: Any) -> Tensor:
    if not isinstance(targets, Tensor):
        try:
            targets = torch.as_tensor(np.asarray(list(targets) if isinstance(targets, range) else targets))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"`targets` must be one tensor of integers or cotangents, targets first, got {type(targets).__name__}."
            ) from error
    if targets.ndim == 0 or not len(targets):
        raise ValueError(f"`targets` must be a list of at least one target, got shape {list(targets.shape)}.")
    return targets


def readable(tensor: Tensor) -> bool:
    """Say whether the values of a tensor can be looked at: not under a transform, nor while a graph is traced."""
    if compiling() or tensor.is_meta or functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return type(tensor) in (Tensor, nn.Parameter)


def check_range(target: Tensor, classes: int) -> None:
    if target.numel():
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= classes:
            raise ValueError(f"`target` must lie in 0 ... {classes - 1}, got {low if low < 0 else high}.")


def check_indices(classes: int) -> None:
    """Check the targets that are run together: one by one they cannot be read."""
    running = _running()
    if running is not None and readable(running.targets) and not running.targets.is_floating_point():
        check_range(running.targets, classes)


def note_forward(mode: swapped) -> None:
    running = _running()
    if running is not None:
        running.largest, running.total = max(running.largest, mode.largest), max(running.total, mode.total)


def measuring() -> bool:
    running = _running()
    return running is not None and running.chunk_size == "auto"


def shared_pull(pull: Pull) -> Pull:
    """Pull the targets that are run together in chunks, through the one forward."""
    running = _running()
    if running is None:
        return pull

    def chunked(cotangent: Tensor) -> tuple[Tensor, ...]:
        level = running.level
        at_level = functorch.is_batchedtensor(cotangent) and functorch.maybe_get_level(cotangent) == level
        if not at_level or functorch.maybe_current_level() != level:
            return pull(cotangent)
        count = len(running.targets)
        size = _chunk_size(running)
        if size >= count:
            return pull(cotangent)
        whole = functorch._remove_batch_dim(cotangent, level, count, 0)
        parts = [
            each(lambda g: g.unsqueeze(0), pull(part[0])) if len(part) == 1 else torch.vmap(pull)(part)
            for part in whole.split(size)
        ]
        return tuple(functorch._add_batch_dim(torch.cat(gradients), 0, level) for gradients in zip(*parts, strict=True))

    return chunked


def _chunk_size(running: _Many) -> int:
    count = len(running.targets)
    if running.chunk_size is None:
        return count
    if running.chunk_size == "auto":
        # a pull holds about the cotangents of two operations, and what the largest of them works in
        return max(1, min(count, running.total // max(1, 3 * running.largest)))
    return running.chunk_size
