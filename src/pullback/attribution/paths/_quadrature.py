"""Sums over the points of a path: lines and other paths, quadratures, and the sum itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pullback._core.many.copies import copies
from pullback._core.types import ChunkSize, Progress
from pullback._torch.levels import jvp

Path: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"
Point: TypeAlias = "tuple[Sequence[Tensor], Sequence[Tensor]]"  # a point and the velocity there
Term: TypeAlias = "Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]"
Quadrature = Literal["gauss_legendre", "riemann_left", "riemann_right", "riemann_middle", "trapezoid"]


def integral(
    term: Term,
    point: Callable[[int], Point],
    weights: Sequence[float],
    chunk_size: ChunkSize,
    like: Sequence[Tensor],
    progress: Progress = None,
) -> list[Tensor]:
    """Sum weight times term over the points of a path.

    `point(k)` gives the k-th point and the velocity there, each as tensors ``[batch ...]``. `term` takes points and
    velocities ``[point batch ...]`` and gives such tensors; the sum is over their first axis, as large as `like`.
    """
    total: list[Tensor] = []
    for part in copies(len(weights), chunk_size, like, progress):
        points, velocities = stacked([point(k) for k in part])
        terms = term(points, velocities)
        weight = torch.tensor(weights[part.start : part.stop], dtype=terms[0].dtype, device=terms[0].device)
        summed = [torch.tensordot(weight.to(t.dtype), t, 1) for t in terms]
        total = [a + b for a, b in zip(total, summed, strict=True)] if total else summed
    return total


def stacked(points: Sequence[Point]) -> Point:
    """Stack points and velocities: ``[point batch ...]``."""
    places, velocities = zip(*points, strict=True)
    return [torch.stack(t) for t in zip(*places, strict=True)], [torch.stack(t) for t in zip(*velocities, strict=True)]


def straight(start: Tensor, end: Tensor, alpha: Tensor) -> Tensor:
    """The straight line."""
    return start + alpha * (end - start)


def on_path(path: Path, starts: Sequence[Tensor], ends: Sequence[Tensor], alpha: float) -> Point:
    """Give a path's point and velocity at `alpha`."""
    if path is straight:
        points = [start + alpha * (end - start) for start, end in zip(starts, ends, strict=True)]
        return points, [end - start for start, end in zip(starts, ends, strict=True)]
    at = torch.full((), alpha, dtype=ends[0].dtype, device=ends[0].device)

    def places(alpha: Tensor) -> tuple[Tensor, ...]:
        return tuple(path(start, end, alpha) for start, end in zip(starts, ends, strict=True))

    return jvp(places, (at,), (torch.ones_like(at),))  # pyright: ignore[reportReturnType]


def quadrature_of(name: str, steps: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Give nodes and weights on [0, 1], in float64."""
    if name not in ("gauss_legendre", "riemann_left", "riemann_right", "riemann_middle", "trapezoid"):
        raise ValueError(
            "`quadrature` must be 'gauss_legendre', 'riemann_left', 'riemann_right', 'riemann_middle' or 'trapezoid', "
            f"got {name!r}."
        )
    least = 2 if name == "trapezoid" else 1
    if steps < least:
        raise ValueError(f"`steps` must be at least {least}, got {steps}.")
    if name == "gauss_legendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return tuple(((1 + nodes) / 2).tolist()), tuple((weights / 2).tolist())
    if name == "trapezoid":
        ends = {0, steps - 1}
        return (
            tuple(k / (steps - 1) for k in range(steps)),
            tuple((0.5 if k in ends else 1.0) / (steps - 1) for k in range(steps)),
        )
    shift = {"riemann_left": 0.0, "riemann_middle": 0.5, "riemann_right": 1.0}[name]
    return tuple((k + shift) / steps for k in range(steps)), (1 / steps,) * steps


quadrature_of._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # not traced
