"""Fill in missing pixels from their neighbours: one linear system for each image and channel, all solved together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback._core.batching import wide
from pullback._torch.internals import bare, compiling


def filled_in(images: Tensor, gone: Tensor, *, tolerance: float = 1e-4, iterations: int = 50) -> Tensor:
    r"""Make each missing pixel the weighted mean of its neighbours.

    .. math:: \sum_{q \in N(p)} w_{p q} \, (x_p - x_q) = 0 \quad \text{for each missing } p

    with N the up to 8 neighbours within the image, direct ones with weight 1/6 and diagonal ones with 1/12. The system
    is symmetric and positive definite: conjugate gradients, preconditioned by a multigrid cycle, take some 10 steps
    whatever the size.

    Args:
        images: ``[image channel height width]``. What is not gone is kept.
        gone: ``[image 1 height width]``, bool, not True everywhere.
        tolerance: Of the residual, relative to the right side.
        iterations: At most.

    Example:
        >>> ramp = torch.arange(7.0).expand(1, 1, 7, 7)
        >>> gone = torch.zeros(1, 1, 7, 7, dtype=torch.bool)
        >>> gone[..., 2:5, 2:5] = True
        >>> torch.allclose(filled_in(ramp, gone), ramp, atol=1e-3)
        True
    """
    shape = images.shape
    x = images.reshape(-1, 1, *shape[2:]).to(wide(images.dtype))
    open = gone.expand(shape).reshape(x.shape)
    grids = [open]
    while min(grids[-1].shape[2:]) >= 4:  # a block is missing where all of it is
        grids.append(F.max_pool2d((~grids[-1]).to(x.dtype), 2, ceil_mode=True) == 0)
    weights = [_around(torch.ones_like(grid, dtype=x.dtype)) for grid in grids]  # 1 but at the border

    known = torch.where(open, 0, x)
    right = torch.where(open, _around(known), 0)
    solution = torch.where(open, known.sum((2, 3), keepdim=True) / (~open).sum((2, 3), keepdim=True), 0)
    residual = right - _missed(solution, open, weights[0])
    direction = nearer = _cycle(residual, grids, weights)
    slope, enough = _dot(residual, nearer), tolerance**2 * _dot(right, right)
    for _ in range(iterations):
        going = _dot(residual, residual) > enough
        if not compiling() and not bool(bare(going).any()):
            break
        image = _missed(direction, open, weights[0])
        step = torch.where(going, slope / torch.where(going, _dot(direction, image), 1), 0)
        solution, before, residual = solution + step * direction, residual, residual - step * image
        nearer = _cycle(residual, grids, weights)
        turn = torch.where(going, _dot(nearer, residual - before) / torch.where(going, slope, 1), 0)
        slope, direction = torch.where(going, _dot(nearer, residual), slope), nearer + turn * direction
    return torch.where(open, solution, x).reshape(shape).to(images.dtype)


def _around(values: Tensor) -> Tensor:
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 0.0, 2.0], [1.0, 2.0, 1.0]], dtype=values.dtype, device=values.device)
    return F.conv2d(values, kernel[None, None] / 12, padding=1)


def _missed(values: Tensor, open: Tensor, weight: Tensor) -> Tensor:
    """Apply the matrix of the system: what missing pixels differ from the mean of their neighbours."""
    return torch.where(open, weight * values - _around(values), 0)


def _cycle(residual: Tensor, grids: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Solve roughly: smooth, correct by the same at half the size, smooth again."""
    open, weight = grids[0], weights[0]
    values = torch.where(open, 0.8 * residual / weight, 0)
    if len(grids) > 1:
        height, width = residual.shape[2:]
        left = F.pad(residual - _missed(values, open, weight), (0, width % 2, 0, height % 2))
        half = _cycle(torch.where(grids[1], 4 * F.avg_pool2d(left, 2), 0), grids[1:], weights[1:])
        whole = F.interpolate(half, scale_factor=2, mode="bilinear", align_corners=False)
        values = torch.where(open, values + whole[..., :height, :width], 0)
    return values + torch.where(open, 0.8 * (residual - _missed(values, open, weight)) / weight, 0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2, 3), keepdim=True)
