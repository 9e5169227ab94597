"""Windows, groups of pixels, and random grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

from pullback import maps

# -- windows


def windows(size: int, window: int, stride: int, device: torch.device | None = None) -> Tensor:
    """Give the places of a window that slides along one axis, ``[place size]``, True where it covers.

    The last window reaches the end of the axis, and is cut there.

    Example:
        >>> windows(5, 2, 2).int().tolist()
        [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    """
    count = min(1 + max(0, math.ceil((size - window) / stride)), math.ceil(size / stride))
    start = torch.arange(count, device=device)[:, None] * stride
    place = torch.arange(size, device=device)
    return (place >= start) & (place < start + window)


# -- groups of pixels


def cells(size: Sequence[int], count: Sequence[int]) -> Tensor:
    """Number the cells of a regular grid, ``[1 *size]``: features that cover all channels.

    Example:
        >>> cells((2, 4), (1, 2)).tolist()
        [[[0, 0, 1, 1], [0, 0, 1, 1]]]
    """
    number = torch.zeros(tuple(size), dtype=torch.long)
    for axis, (length, parts) in enumerate(zip(size, count, strict=True)):
        along = torch.arange(length) * parts // length
        number = number * parts + along.reshape([-1 if k == axis else 1 for k in range(len(size))])
    return number.unsqueeze(0)


def superpixels(image: Tensor, segments: int = 50, compactness: float = 10.0) -> Tensor:
    """Number the superpixels of images, ``[batch 1 height width]``, by SLIC; needs scikit-image.

    Args:
        image: ``[batch channel height width]``, any range.
        segments: How many, about.
        compactness: How much nearness counts against likeness.

    Raises:
        ImportError: If scikit-image is not installed.
    """
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise ImportError("`superpixels` needs scikit-image: `pip install scikit-image`.") from error
    found = []
    for one in maps.normalise(image.detach()).cpu().double():
        pixels = one.movedim(0, -1).numpy()
        found.append(torch.as_tensor(slic(pixels, segments, compactness, start_label=0, channel_axis=-1)))
    return torch.stack(found).unsqueeze(1).long().to(image.device)


# -- random grids


def grid_masks(grids: Tensor, shifts: Tensor, size: Sequence[int]) -> Tensor:
    r"""Enlarge grids of cells linearly to more than `size`, and cut `size` out at a shift: the masks of RISE.

    .. math:: m_{n} = U(s_n) \, g_n \, U'(s'_n)^\top

    A grid is reflected by one cell at its border. With ``cell = ceil(size / cells)`` and shifts in ``[0, cell)`` no
    pixel is favoured.

    Args:
        grids: ``[mask *cells]``, one number a cell.
        shifts: ``[mask axis]``, integers.
        size: Of the masks, one number an axis.

    Returns:
        ``[mask 1 *size]``.

    Example:
        >>> m = grid_masks(torch.ones(2, 7, 7), torch.tensor([[0, 0], [3, 2]]), (28, 32))
        >>> m.shape == (2, 1, 28, 32) and torch.allclose(m, torch.ones_like(m))
        True
    """
    masks = grids
    for axis, (length, cells) in enumerate(zip(size, grids.shape[1:], strict=True)):
        if cells < 2:
            raise ValueError(f"`cells` must be at least 2 along each axis, got {cells}.")
        cell = math.ceil(length / cells)
        scale = math.ceil((length + cell) / cells)
        row = scale + shifts[:, axis, None] + torch.arange(length, device=grids.device)
        place = ((row.to(grids.dtype) + 0.5) / scale - 0.5).clamp(0, cells + 1)  # in cells of the reflected grid
        weight = (1 - (place[..., None] - torch.arange(cells + 2, device=grids.device)).abs()).clamp(min=0)
        reflected = masks.index_select(1 + axis, torch.tensor([1, *range(cells), cells - 2], device=grids.device))
        lines = rearrange(reflected.movedim(1 + axis, 1).unsqueeze(-1), "mask cell ... -> mask cell (...)")
        enlarged = torch.matmul(weight, lines)
        others = [n for k, n in enumerate(masks.shape[1:]) if k != axis]
        masks = enlarged.reshape(len(shifts), length, *others).movedim(1, 1 + axis)
    return masks.unsqueeze(1)


# -- smooth masks


@lru_cache(maxsize=16)
def reach(step: int, sigma: float, axes: int) -> tuple[int, int, Tensor, Tensor, tuple[int, ...]]:
    """Give padding and radius in steps, the distinct weights of a parameter, and where they are.

    A parameter reaches ``(2 radius + 1) step`` pixels along each axis. Its weight at an offset depends on the distance
    alone, and so on the offset's size along each axis: `which` names the weight for each offset along the first axis
    and each size along the others, and `fold` the size for each offset.
    """
    padding, radius = 1 + math.ceil(2 * sigma / step), 1 + math.ceil(sigma / step)
    # a pixel is seen as (step * block + phase); the parameter at the margin's start sits at pixel `sigma`
    first = (padding - 2 * radius) * step - sigma
    offset = [first + place for place in range((2 * radius + 1) * step)]
    sizes = sorted({round(abs(o), 6) for o in offset})
    fold = tuple(sizes.index(round(abs(o), 6)) for o in offset)
    square = torch.zeros([len(offset)] + [len(sizes)] * (axes - 1), dtype=torch.float64)
    for axis, along in enumerate([offset] + [sizes] * (axes - 1)):
        distance = torch.tensor(along, dtype=torch.float64)
        square = square + distance.reshape([-1 if k == axis else 1 for k in range(axes)]) ** 2
    squares, which = torch.unique((square * 4096).round() / 4096, return_inverse=True)
    weights = torch.exp(-2 * (squares.sqrt() / sigma - 0.5).clamp(min=0) ** 2)
    return padding, radius, weights, which.flatten(), fold


def smooth_grid(size: Sequence[int], step: int) -> tuple[int, ...]:
    """Give how many parameters draw a smooth mask of `size`, along each axis."""
    if step < 1:
        raise ValueError(f"`step` must be at least 1, got {step}.")
    return tuple(math.ceil(n / step) for n in size)


def whole_size(size: Sequence[int], step: int, sigma: float) -> tuple[int, ...]:
    """Give the size of the mask with its margin: as far as blocks of pixels are drawn, and enough to cut `size` out."""
    margin = round(sigma)
    blocks = [n + 2 * (math.ceil(2 * sigma / step) - math.ceil(sigma / step)) for n in smooth_grid(size, step)]
    return tuple(max(step * n - step + 1, margin + length) for n, length in zip(blocks, size, strict=True))
