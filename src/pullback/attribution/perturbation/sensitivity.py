"""Sensitivity analysis of the score under random masks: Sobol indices, and HSIC."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pullback import maps
from pullback._core.batching import report, wide
from pullback._core.checks import at_least
from pullback._core.entry import method
from pullback._core.masked import MaskedModel, axis_sizes, mask_axes_of
from pullback._core.types import ChunkSize, Inputs, Layer, Model, Output, Params, Progress, Target
from pullback._torch.random import Seed, uniform
from pullback.masks import Fill, fill


def _cell_maps(values: Tensor, grid: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Enlarge ``[batch cell]`` to maps ``[batch 1 *size]``."""
    return maps.resize(values.unflatten(1, (1, *grid)), sizes)


def _on_cells(
    masked: MaskedModel,
    tokens: bool,
    grid: int | Sequence[int],
    baseline: Fill,
    draw: Callable[[int], tuple[int, Callable[[Tensor], Tensor]]],
    chunk_size: ChunkSize,
    progress: Progress,
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Score the input blended with its cover by masks on a grid: ``[mask batch]``.

    `draw` gives, for a number of cells, how many masks there are and the function from indices to ``[mask cell]``.
    """
    mask_axes = mask_axes_of(masked, tokens)
    grid = tuple(
        min(c, n) for c, n in zip(axis_sizes("grid", grid, mask_axes.sizes, lambda n: n), mask_axes.sizes, strict=True)
    )
    count, masks_at = draw(math.prod(grid))
    found = []
    for part in masked.parts(count, chunk_size):
        small = masks_at(torch.arange(part.start, part.stop, device=masked.device)).to(wide(masked.dtype))
        masks = _cell_maps(small, grid, mask_axes.sizes).unsqueeze(1)

        def cover(_: int, values: Tensor) -> Tensor:
            shown, masks_ = mask_axes.to_channels_first(values), masks.to(values.dtype)  # noqa: B023
            under = fill(shown[0], baseline)
            return mask_axes.undo(under + masks_ * (shown - under))

        found.append(masked.scores(len(part), cover).to(wide(masked.dtype)))
        report(progress, part.stop, count)
    return torch.cat(found), grid, mask_axes.sizes


@method(
    "perturbation",
    "map",
    "one map",
    small={"samples": 3, "grid": 1},
    forwards=lambda o: o["samples"] * (o["cells"] + 2),
)
def sobol_attribution(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    samples: int = 32,
    grid: int | Sequence[int] = 8,
    baseline: Fill = None,
    seed: Seed = 0,
    tokens: bool = False,
    layer: str | Layer = "",
    output: Output = None,
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
) -> Tensor:
    r"""Ascribe the variance of the score under random masks to the cells of the mask, interactions included.

    .. math:: m_i = \frac{\tfrac{1}{2 n} \sum_s \big( f_t(A_s) - f_t(A_s^{(i)}) \big)^2}{\operatorname{Var} f_t}

    the total Sobol index by Jansen's estimator: :math:`A^{(i)}` has cell i from a second draw B. The draws are a
    Latin hypercube (in the paper a quasi-random sequence). Costs ``samples (cells + 2)`` forwards, shared by all
    targets under `vmap`.

    Args:
        params, model, x, target, layer, output: See `gradient`.
        samples: Number of draws.
        grid: Of the grid of the mask, along each axis.
        baseline: What masks blend into: see `pullback.masks.fill`. Zeros if omitted.
        seed, tokens, chunk_size, progress: See `rise`.

    Returns:
        Map ``[batch 1 height width]``, not negative: the share of the variance that is lost with a cell's value. Shares
        add up to more than 1 where cells interact.

    Raises:
        ValueError: If `samples` is less than 2.

    Example:
        >>> model = lambda params, x: x[:, 0, :4, :4].sum((1, 2))
        >>> m = sobol_attribution({}, model, torch.ones(1, 1, 8, 8), None, grid=2, samples=16)
        >>> bool(m[0, 0, 0, 0] > m[0, 0, -1, -1])
        True

    Reference:
        Fel, Cadène, Chalvidal, Cord, Vigouroux & Serre, Look at the Variance!, 2021, sec. 3.
    """
    at_least("samples", samples, 2)
    masked = MaskedModel(params, model, x, target, layer=layer, output=output)

    def draw(count: int) -> tuple[int, Callable[[Tensor], Tensor]]:
        index = torch.arange(samples, device=masked.device)
        draws = uniform(seed, index, (2 * count,), wide(masked.dtype))
        stratum = uniform(seed, index, (2 * count,), torch.float32, stream=1).argsort(0)
        a, b = ((stratum + draws) / samples).chunk(2, 1)

        def masks_at(index: Tensor) -> Tensor:
            sample, which = index % samples, index // samples  # A, B, then A with each cell from B
            fresh = (which[:, None] - 2 == torch.arange(count, device=masked.device)) | (which[:, None] == 1)
            return torch.where(fresh, b[sample], a[sample])

        return samples * (count + 2), masks_at

    scores, grid, sizes = _on_cells(masked, tokens, grid, baseline, draw, chunk_size, progress)
    scores = scores.unflatten(0, (-1, samples))  # [draw sample batch]
    variance = scores[:2].flatten(0, 1).var(0, unbiased=False)
    unexplained = (scores[2:] - scores[0]).square().mean(1) / 2  # [cell batch]
    shares = torch.where(variance == 0, torch.zeros_like(unexplained), unexplained / variance)
    return _cell_maps(shares.T, grid, sizes).to(masked.dtype)


@method("perturbation", "map", "one map", small={"samples": 5, "grid": 2}, forwards=lambda o: o["samples"])
def hsic_attribution(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    samples: int = 500,
    grid: int | Sequence[int] = 7,
    p: float = 0.5,
    baseline: Fill = None,
    seed: Seed = 0,
    tokens: bool = False,
    layer: str | Layer = "",
    output: Output = None,
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
) -> Tensor:
    r"""Measure how far the score depends on whether a cell is shown, by the Hilbert-Schmidt independence criterion.

    .. math:: m_i = \frac{\operatorname{tr}(K_i H L H)}{(n - 1)^2}

    with the kernels :math:`K_i` (1 where cell i is shown or covered in both samples) and L (a Gaussian of the score,
    as wide as the median distance), and H that centres. Catches any dependence, and costs `samples` forwards for all
    cells, shared by all targets under `vmap`.

    Args:
        params, model, x, target, layer, output: See `gradient`.
        samples: Number of random masks.
        grid: Of the grid of the mask, along each axis.
        p: Probability that a cell is shown.
        baseline: What covered cells show: see `pullback.masks.fill`. Zeros if omitted.
        seed, tokens, chunk_size, progress: See `rise`.

    Returns:
        Map ``[batch 1 height width]``, not negative; 0 where the score does not depend on the cell.

    Raises:
        ValueError: If `samples` is less than 2.

    Example:
        >>> model = lambda params, x: x[:, 0, :4, :4].sum((1, 2))
        >>> m = hsic_attribution({}, model, torch.ones(1, 1, 8, 8), None, grid=2, samples=64)
        >>> bool(m[0, 0, 0, 0] > m[0, 0, -1, -1])
        True

    Reference:
        Novello, Fel & Vigouroux, Making Sense of Dependence, 2022, sec. 3.
    """
    at_least("samples", samples, 2)
    masked = MaskedModel(params, model, x, target, layer=layer, output=output)

    def draw(count: int) -> tuple[int, Callable[[Tensor], Tensor]]:
        return samples, lambda index: uniform(seed, index, (count,), torch.float32) < p

    scores, grid, sizes = _on_cells(masked, tokens, grid, baseline, draw, chunk_size, progress)
    shown = draw(math.prod(grid))[1](torch.arange(samples, device=masked.device)).to(scores.dtype)
    square = (scores.T[:, :, None] - scores.T[:, None]).square()  # [batch sample sample]
    width = square.flatten(1).median(1).values[:, None, None]
    like = torch.exp(-square / (2 * torch.where(width == 0, torch.ones_like(width), width)))
    centred = like - like.mean(1, keepdim=True)
    centred = centred - centred.mean(2, keepdim=True)
    dependence = 2 * ((centred @ shown) * shown).sum(1) / (samples - 1) ** 2  # K = z z' + (1 - z)(1 - z)', H 1 = 0
    return _cell_maps(dependence, grid, sizes).to(masked.dtype)
