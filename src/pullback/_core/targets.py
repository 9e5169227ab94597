"""From a target to the cotangent of the output, and to scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vjp

from pullback._core.many.state import check_indices, check_range, clean
from pullback._core.types import Target
from pullback._torch.internals import (
    compiling,
    readable,
)


def cotangent(output: Tensor, target: Target) -> Tensor:
    """Return the cotangent of `output` for a target: the derivative of the sum of all scores.

    An index that cannot be read (under `vmap` or `torch.compile`) and is out of range gives NaN.
    """
    if callable(target):
        scores, back = vjp(lambda y: _checked_scores(target(y), output), output)  # pyright: ignore[reportAssignmentType]
        return back(torch.ones_like(scores))[0]
    if target is None:
        _checked_scores(output.reshape(output.shape[:1]) if output.shape[1:] == (1,) else output, output, given=False)
        return torch.ones_like(output)
    if type(target) is int and output.ndim > 1:  # the general case below gives the same, by more operations
        if not 0 <= target < output.shape[1]:
            raise ValueError(f"`target` must lie in 0 ... {output.shape[1] - 1}, got {target}.")
        hot = torch.zeros(output.shape, dtype=output.dtype, device=output.device)
        hot.select(1, target).fill_(1)
        return hot
    target = _as_tensor(target, output)
    if target.is_floating_point() or target.is_complex():
        return target.to(output.dtype).expand_as(output)
    return _one_hot(target, output).expand_as(output)


def score(output: Tensor, target: Target) -> Tensor:
    """Return the score of each example, ``[batch]``: at spatial outputs the sum over positions."""
    if callable(target):
        return _checked_scores(target(output), output)
    if target is None:
        scores = output.reshape(output.shape[:1]) if output.shape[1:] == (1,) else output
        return _checked_scores(scores, output, given=False)
    target = _as_tensor(target, output)
    if target.is_floating_point() or target.is_complex():
        weighted = target.to(output.dtype) * output
        return weighted.flatten(1).sum(1) if weighted.ndim > 1 else weighted
    index = target.long().reshape(-1, 1, *[1] * (output.ndim - 2)).expand(output.shape[0], 1, *output.shape[2:])
    known = (index >= 0) & (index < output.shape[1])
    picked = output.gather(1, index.clamp(0, output.shape[1] - 1))
    # a product, so that the derivative is NaN as well
    return (picked * torch.ones_like(picked).masked_fill(~known, float("nan"))).flatten(1).sum(1)


def _checked_scores(scores: Tensor, output: Tensor, given: bool = True) -> Tensor:
    if isinstance(scores, Tensor) and scores.shape == output.shape[:1]:
        return scores
    shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if given:
        raise ValueError(f"`target` must give one score per example, shape {list(output.shape[:1])}, got {shape}.")
    raise ValueError(
        f"`target` may be None only where the output is one score per example, [batch] or [batch 1], got {shape}. "
        "Give a class index."
    )


def _as_tensor(target: Any, output: Tensor) -> Tensor:
    if isinstance(target, bool):
        raise TypeError("`target` must be a class index, got a bool.")
    given = target  # a tensor made of it under a transform cannot be read
    if not isinstance(target, Tensor):
        try:
            target = torch.as_tensor(np.asarray(target) if isinstance(target, list | tuple) else target)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                "`target` must be an index, one index per example, a cotangent shaped like the output, a function of "
                f"the output, or None, got {type(target).__name__}."
            ) from error
    if target.device != output.device:  # under a transform `to` returns a tensor that cannot be read
        target = target.to(output.device)
    if target.is_floating_point() or target.is_complex():
        if target.shape != output.shape:
            raise ValueError(
                f"`target` of floating point is a cotangent and must have the shape of the output, "
                f"{list(output.shape)}, got {list(target.shape)}. For class indices give integers."
            )
        return target
    if target.dtype == torch.bool:
        raise TypeError("`target` must be integer indices or a floating-point cotangent, got bool.")
    if output.ndim < 2:
        raise ValueError(
            f"`target` is a class index, but the output {list(output.shape)} has no class axis. Give `target=None`."
        )
    if target.ndim > 1 or (target.ndim == 1 and target.shape[0] != output.shape[0]):
        raise ValueError(
            f"`target` must be one index, or one per example, shape [{output.shape[0]}], got {list(target.shape)}. "
            "For many targets of each example: `torch.vmap` over `target`, or `over_targets`."
        )
    if not isinstance(given, Tensor) and not compiling():
        check_range(np.asarray(given), output.shape[1])
    elif isinstance(given, Tensor) and readable(given):
        check_range(given, output.shape[1])
    else:
        check_indices(given, output.shape[1])
    return target


def _one_hot(index: Tensor, output: Tensor) -> Tensor:
    """Return ``[batch class 1 ...]``, or ``[1 class 1 ...]`` for one index: 1 at the index, NaN if it is no class."""
    classes, rest = output.shape[1], [1] * (output.ndim - 2)
    index = index.long().reshape(-1, 1)
    hot = (torch.arange(classes, device=output.device) == index).to(output.dtype)
    if clean():
        return hot.reshape(*hot.shape, *rest)
    hot = torch.where((index < 0) | (index >= classes), torch.full_like(hot, float("nan")), hot)
    return hot.reshape(*hot.shape, *rest)


def poisoned(gradient: Tensor, cotangent: Tensor) -> Tensor:
    """Make the gradient NaN where the cotangent is: a rectifier that is off would turn the NaN to 0 on its way."""
    bad = (cotangent - cotangent).to(gradient.dtype)
    bad = bad.reshape(bad.shape[0], -1).sum(1) if bad.ndim else bad
    if gradient.ndim and gradient.shape[:1] == bad.shape:
        return gradient + bad.reshape(-1, *[1] * (gradient.ndim - 1))
    return gradient + bad.sum()
