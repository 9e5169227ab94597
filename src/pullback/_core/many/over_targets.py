"""The public entry: explain many targets at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pullback._core.many.state import TargetRun, local
from pullback._torch.internals import compiling, current_level


def over_targets(
    method: Callable[..., Any], *, chunk_size: int | Literal["auto"] | None = "auto"
) -> Callable[..., Any]:
    """Explain many targets at once: one forward shared by all, one backward a target, some of them at a time.

    ``over_targets(method)(params, model, x, targets, **options)`` gives what
    ``torch.vmap(method, (None, None, None, 0))(params, model, x, targets)`` gives, with memory kept to a budget.

    Args:
        method: Any method ``method(params, model, x, target, **options)``.
        chunk_size: Targets pulled back together, at most; `None` for all of them. ``"auto"`` takes as many as keep to a
            memory budget for their cotangents, 24 MB on a CPU and 512 MB elsewhere. On a CPU the budget cuts larger
            chunks too, which would not be faster; through late layers, whose activations are small and weights many,
            it lets more targets go together than through early ones.

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
        before = getattr(local, "many", None)
        running = TargetRun(targets, chunk_size)

        def one(target: Tensor) -> Any:
            running.level = current_level() or 0
            return method(params, model, x, target, **options)

        if not compiling():
            local.many = running
        try:
            return torch.vmap(one, randomness="same")(targets)
        finally:
            if not compiling():
                local.many = before

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
