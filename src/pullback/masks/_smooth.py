"""Smooth masks drawn from a coarse grid of parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback._core.batching import chunks
from pullback._torch.internals import compiling
from pullback.masks._grids import reach, smooth_grid, whole_size


def smooth_masks(
    parameters: Tensor,
    size: Sequence[int],
    *,
    step: int = 7,
    sigma: float = 21.0,
    pooling: str = "softmax",
    coldness: float = 20.0,
    clamp: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Draw smooth masks from a coarse grid of parameters.

    .. math:: m(u) = \mathrm{smax}_j \, p_j \, k\big(\|u - u_j\| / \sigma\big), \qquad
              k(z) = e^{-2 \max(z - 1/2, \, 0)^2}

    with parameters every `step` pixels and the maximum softened, :math:`\mathrm{smax}_j v_j = \sum_j v_j e^{c v_j} /
    \sum_j e^{c v_j}`, over the parameters near u (zeros beyond the grid). A mask is as smooth as the kernel, and yet
    can be 1 over any area.

    Args:
        parameters: ``[mask 1 *grid]`` in [0, 1], the grid as `smooth_grid` gives it.
        size: Of the masks, one number an axis.
        step: Pixels from parameter to parameter.
        sigma: Width of the kernel in pixels.
        pooling: ``"softmax"``, as above; ``"sum"``; ``"sigmoid"``, :math:`1 / (1 + e^{-(c \sum_j v_j - 3)})`.
        coldness: The c of the softened maximum; infinite for the maximum itself.
        clamp: To [0, 1].

    Returns:
        The masks, ``[mask 1 *size]``, and the larger ones that they are cut from, with a margin of about `sigma`.

    Raises:
        ValueError: If `step` or `sigma` is not positive, the grid does not fit, or `pooling` is unknown.

    Example:
        >>> p = torch.rand(2, 1, 4, 5)
        >>> m, whole = smooth_masks(p, (28, 35))
        >>> m.shape == (2, 1, 28, 35) and bool((m <= p.amax((1, 2, 3), keepdim=True)).all())
        True

    Reference:
        Fong, Patrick & Vedaldi, Understanding Deep Networks via Extremal Perturbations, 2019, sec. 3.2.
    """
    if not sigma > 0:
        raise ValueError(f"`sigma` must be positive, got {sigma}.")
    if pooling not in ("softmax", "sum", "sigmoid"):
        raise ValueError(f"`pooling` must be 'softmax', 'sum' or 'sigmoid', got {pooling!r}.")
    grid = smooth_grid(size, step)
    if parameters.shape[2:] != grid:
        raise ValueError(
            f"`parameters` must be a grid of {list(grid)} for masks of {list(size)}, got {list(parameters.shape[2:])}."
        )
    padding, radius, weights, which, fold = reach(step, float(sigma), len(grid))
    drawn = whole_size(size, step, sigma)
    how = (grid, drawn, step, padding, radius, weights.to(parameters), which.to(parameters.device), fold)
    # what a parameter adds to each pixel in its reach is laid out for a few masks at a time
    together = max(1, 2**23 // (len(which) * math.prod(grid)))
    parts = [
        _drawn(parameters[k.start : k.stop].flatten(1), *how, pooling, coldness)
        for k in chunks(len(parameters), together)
    ]
    whole = torch.cat(parts).unsqueeze(1)
    whole = whole.clamp(0, 1) if clamp else whole
    margin = round(sigma)
    return whole[(..., *(slice(margin, margin + n) for n in size))], whole


def _drawn(
    parameters: Tensor,
    grid: tuple[int, ...],
    whole: tuple[int, ...],
    step: int,
    padding: int,
    radius: int,
    weights: Tensor,
    which: Tensor,
    fold: tuple[int, ...],
    pooling: str,
    coldness: float,
) -> Tensor:
    """Pool what the parameters ``[mask parameter]`` put at each pixel, ``[mask *whole]``."""
    taps = 2 * radius + 1
    values = weights[:, None] * parameters[:, None]  # [mask distance parameter]

    def spread(values: Tensor, highest: bool = False) -> Tensor:
        return _laid_out(values.index_select(1, which), fold, grid, whole, step, taps, padding - 2 * radius, highest)

    if pooling == "sum":
        return spread(values)
    if pooling == "sigmoid":
        return torch.sigmoid(coldness * spread(values) - 3)
    if math.isinf(coldness):
        return spread(values, highest=True).clamp(min=0)
    heat = torch.exp(coldness * values)
    # a parameter of zero counts 1 below, and so does each of those that are beyond the grid
    return spread(values * heat) / (taps ** len(grid) + spread(heat - 1))


def plain_smooth_masks(
    parameters: Tensor, size: Sequence[int], *, step: int = 7, sigma: float = 21.0, coldness: float = 20.0
) -> Tensor:
    """Draw the larger masks of `smooth_masks` as the formula reads, pixel by pixel: ``[mask *whole]``.

    Slow, and holds what each parameter in reach says of each pixel. Where many pixels are equal, their order by size is
    that of the rounding of this form.
    """
    grid = smooth_grid(size, step)
    padding, radius, *_ = reach(step, float(sigma), len(grid))
    whole = whole_size(size, step, sigma)
    pixels = [torch.arange(n, device=parameters.device) for n in whole]
    behind = [
        max(padding, (n - 1) // step + 2 * radius + 1 - padding - cells) for n, cells in zip(whole, grid, strict=True)
    ]
    padded = F.pad(parameters[:, 0], [n for end in reversed(behind) for n in (padding, end)])
    values = []
    for tap in itertools.product(range(2 * radius + 1), repeat=len(grid)):
        blocks = [pixel // step + t for pixel, t in zip(pixels, tap, strict=True)]
        aside = [
            (pixel - sigma - step * (block - padding)).to(parameters.dtype)
            for pixel, block in zip(pixels, blocks, strict=True)
        ]
        square = sum(part**2 for part in torch.meshgrid(*aside, indexing="ij"))
        weight = torch.exp(-2 * (torch.sqrt(square) / sigma - 0.5).clamp(min=0) ** 2)  # pyright: ignore[reportArgumentType]
        values.append(weight * padded[(slice(None), *torch.meshgrid(*blocks, indexing="ij"))])
    stacked = torch.stack(values, 1)
    return (stacked * torch.softmax(coldness * stacked, 1)).sum(1)


class _Overlapped(torch.autograd.Function):
    """Sum over the axis `taps`, each entry laid down one place further along the axis `cells`, counted from the end.

    What a sum of padded tensors gives, in one pass over memory.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(patches: Tensor, taps: int, cells: int) -> Tensor:
        parts = patches.unbind(taps)
        shape = list(parts[0].shape)
        shape[cells] += len(parts) - 1
        total = patches.new_zeros(shape)
        for tap, part in enumerate(parts):
            total.narrow(cells, tap, part.shape[cells]).add_(part)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        patches, ctx.taps, ctx.cells = inputs
        ctx.count, ctx.length = patches.shape[ctx.taps], patches.shape[ctx.cells]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        parts = [slope.narrow(ctx.cells, tap, ctx.length) for tap in range(ctx.count)]
        return torch.stack(parts, ctx.taps), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Overlapped.apply(tangent, ctx.taps, ctx.cells)


def _laid_out(
    patches: Tensor,
    fold: tuple[int, ...],
    grid: tuple[int, ...],
    whole: tuple[int, ...],
    step: int,
    taps: int,
    beyond: int,
    highest: bool = False,
) -> Tensor:
    """Sum patches ``[mask offset parameter]``, each laid down at its parameter's place, or take the highest.

    Along each axis an offset is ``step * tap + phase``, and lies in the block ``parameter + tap``. Along all but the
    first axis patches come folded: offsets of one size are one until their axis is summed.
    """
    axes = len(grid)
    patches = patches.unflatten(1, [taps * step] + [-1] * (axes > 1) + [max(fold) + 1] * (axes - 2))
    patches = patches.unflatten(-1, grid)
    places = torch.tensor(fold, device=patches.device)
    for axis in range(axes):
        patches = patches if axis == 0 else patches.index_select(1 + axis, places)
        patches = patches.unflatten(1 + axis, (taps, step))
        if highest or compiling():  # dynamo does not trace a function that has a derivative of its own in forward mode
            around = [0, 0] * (axes - 1 - axis)
            laid = [
                F.pad(patch, (*around, tap, taps - 1 - tap), value=-math.inf if highest else 0.0)
                for tap, patch in enumerate(patches.unbind(1 + axis))
            ]
            patches = torch.stack(laid).amax(0) if highest else sum(laid[1:], laid[0])
        else:
            patches = _Overlapped.apply(patches, 1 + axis, axis - axes)
    # [mask *phase *block] -> [mask *(block phase)]
    order = [0, *(k for axis in range(axes) for k in (1 + axes + axis, 1 + axis))]
    image = patches.permute(order).reshape(len(patches), *(step * (n + taps - 1) for n in grid))
    blank = [(step * beyond, n - step * beyond - laid) for n, laid in zip(whole, image.shape[1:], strict=True)]
    return F.pad(image, [n for pair in reversed(blank) for n in pair], value=-math.inf if highest else 0.0)
