"""Masks: where to cover an input, and with what. 1 keeps, 0 covers.

*Where*: windows that slide (`windows`), random grids that are shifted (`grid_masks`), smooth masks that few parameters
draw (`smooth_masks`), superpixels (`superpixels`, `cells`). *With what*: a constant, the mean of each channel, a blur
(`covering`), or a pyramid from the blurred or faded image to the image itself (`pyramid`, `blended`).

Masks over images ``[batch channel height width]`` are ``[mask 1 height width]``; one and three spatial axes likewise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pullback import maps
from pullback._batch import chunks
from pullback._torch import compiling

Cover: TypeAlias = "str | float | Tensor | Callable[[Tensor], Tensor] | None"


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
def _reach(step: int, sigma: float, axes: int) -> tuple[int, int, Tensor, Tensor, tuple[int, ...]]:
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


def _whole_size(size: Sequence[int], step: int, sigma: float) -> tuple[int, ...]:
    """Give the size of the mask with its margin: as far as blocks of pixels are drawn, and enough to cut `size` out."""
    margin = round(sigma)
    blocks = [n + 2 * (math.ceil(2 * sigma / step) - math.ceil(sigma / step)) for n in smooth_grid(size, step)]
    return tuple(max(step * n - step + 1, margin + length) for n, length in zip(blocks, size, strict=True))


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
    padding, radius, weights, which, fold = _reach(step, float(sigma), len(grid))
    drawn = _whole_size(size, step, sigma)
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
    padding, radius, *_ = _reach(step, float(sigma), len(grid))
    whole = _whole_size(size, step, sigma)
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


# -- what covers


def pyramid(x: Tensor, kind: str = "blur", *, levels: int = 8, max_blur: float = 20.0) -> Tensor:
    r"""Give steps from a perturbed input to the input itself, ``[level *x.shape]``; level l is strongest at 0.

    ``"blur"`` smooths with :math:`\sigma_l = \sigma_{\max} (1 - l / (L - 1))` pixels, zeros beyond the border;
    ``"fade"`` multiplies by :math:`l / (L - 1)`.

    Raises:
        ValueError: If the kind is unknown, or there are less than 2 levels.

    Example:
        >>> x = torch.rand(2, 3, 8, 8)
        >>> p = pyramid(x, "fade", levels=3)
        >>> torch.equal(p[2], x) and torch.equal(p[1], x / 2) and not p[0].any()
        True
    """
    if levels < 2:
        raise ValueError(f"`levels` must be at least 2, got {levels}.")
    strengths = [1 - level / (levels - 1) for level in range(levels)]
    if kind == "blur":
        return torch.stack([maps.smooth(x, max_blur * strength, padding="zeros") for strength in strengths])
    if kind == "fade":
        return torch.stack([x * (1 - strength) for strength in strengths])
    raise ValueError(f"`perturbation` must be 'blur' or 'fade', got {kind!r}.")


def blended(levels: Tensor, masks: Tensor) -> Tensor:
    """Choose a level at each pixel: 1 the last, 0 the first, linear between neighbours.

    Args:
        levels: ``[level mask channel ...]`` as `pyramid` gives it, or 1 for mask or channel.
        masks: ``[mask 1 ...]`` in [0, 1].

    Example:
        >>> x, m = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8)
        >>> torch.allclose(blended(pyramid(x, "fade", levels=5), m), m * x, atol=1e-6)
        True
    """
    last = len(levels) - 1
    height = masks * last
    floor = height.detach().floor()
    shape = torch.broadcast_shapes(levels.shape[1:], masks.shape)
    levels = levels.expand(len(levels), *shape)

    def at(level: Tensor) -> Tensor:
        index = level.long().clamp(0, last)  # also where a mask is NaN
        return torch.gather(levels, 0, index.expand(shape).unsqueeze(0)).squeeze(0)

    below = at(floor)
    return below + (height - floor).to(below.dtype) * (at(floor + 1) - below)


def covering(x: Tensor, cover: Cover, sigma: float = 10.0) -> Tensor:
    """Give what lies under the masks, broadcastable to `x`.

    Args:
        x: ``[batch channel ...]``.
        cover: `None` for zeros, a number, a tensor that broadcasts to `x`, ``"mean"`` of each channel, ``"blur"``
            by `sigma` pixels, or a function of `x`.
        sigma: Standard deviation of the blur.

    Raises:
        ValueError: If the name is unknown, or the tensor does not broadcast to `x`.

    Example:
        >>> x = torch.rand(2, 3, 8, 8)
        >>> torch.allclose(covering(x, "mean")[:, :, 0, 0], x.mean((2, 3)))
        True
    """
    if cover is None:
        cover = 0.0
    if isinstance(cover, str):
        if cover == "mean":
            return x.mean(tuple(range(2, x.ndim)) or 1, keepdim=True)
        if cover == "blur":
            return maps.smooth(x, sigma)
        raise ValueError(f"`baseline` must be 'mean', 'blur', a number, a tensor or a function, got {cover!r}.")
    if callable(cover) and not isinstance(cover, Tensor):
        cover = cover(x)
    under = torch.as_tensor(cover, dtype=x.dtype, device=x.device)
    try:
        torch.broadcast_shapes(under.shape, x.shape)
        under.expand_as(x)
    except RuntimeError:
        raise ValueError(f"`baseline` must broadcast to {list(x.shape)}, got {list(under.shape)}.") from None
    return under
