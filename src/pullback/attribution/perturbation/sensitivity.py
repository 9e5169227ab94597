"""Explain by covering: run the model on many perturbed inputs, and account for the change of its score.

Costs are quoted in forwards. The perturbations do not depend on the target, so that under `vmap` over targets one
forward of each perturbed input serves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pullback import maps
from pullback import masks as drawn
from pullback._call import Params
from pullback._core.batching import Progress, Together, report, wide
from pullback._core.checks import _positive
from pullback._core.entry import public
from pullback._core.masked import Scene, axis_sizes, canvas_of
from pullback._core.types import Inputs, Model, Select, Target
from pullback._torch.random import Seed, uniform


def _cell_maps(values: Tensor, cells: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Enlarge ``[batch cell]`` to maps ``[batch 1 *size]``."""
    return maps.resize(values.unflatten(1, (1, *cells)), sizes)


def _on_cells(
    scene: Scene,
    tokens: bool,
    cells: int | Sequence[int],
    baseline: drawn.Cover,
    draw: Callable[[int], tuple[int, Callable[[Tensor], Tensor]]],
    chunk_size: Together,
    progress: Progress,
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Score the input blended with its cover by masks on a grid: ``[mask batch]``.

    `draw` gives, for a number of cells, how many masks there are and the function from indices to ``[mask cell]``.
    """
    canvas = canvas_of(scene, tokens)
    cells = tuple(
        min(c, n) for c, n in zip(axis_sizes("cells", cells, canvas.sizes, lambda n: n), canvas.sizes, strict=True)
    )
    count, masks_at = draw(math.prod(cells))
    found = []
    for part in scene.parts(count, chunk_size):
        small = masks_at(torch.arange(part.start, part.stop, device=scene.device)).to(wide(scene.dtype))
        masks = _cell_maps(small, cells, canvas.sizes).unsqueeze(1)

        def cover(_: int, values: Tensor) -> Tensor:
            shown, masks_ = canvas.lay(values), masks.to(values.dtype)  # noqa: B023
            under = drawn.covering(shown[0], baseline)
            return canvas.restore(under + masks_ * (shown - under))

        found.append(scene.scores(len(part), cover).to(wide(scene.dtype)))
        report(progress, part.stop, count)
    return torch.cat(found), cells, canvas.sizes


@public
def sobol_attribution(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    samples: int = 32,
    cells: int | Sequence[int] = 8,
    baseline: drawn.Cover = None,
    seed: Seed = 0,
    tokens: bool = False,
    layer: str = "",
    at: str = "output",
    output: Select = None,
    strict: bool = False,
    chunk_size: Together = "auto",
    progress: Progress = None,
) -> Tensor:
    r"""Ascribe the variance of the score under random masks to the cells of the mask, interactions included.

    .. math:: m_i = \frac{\tfrac{1}{2 n} \sum_s \big( f_t(A_s) - f_t(A_s^{(i)}) \big)^2}{\operatorname{Var} f_t}

    the total Sobol index by Jansen's estimator: :math:`A^{(i)}` has cell i from a second draw B. The draws are a
    Latin hypercube (in the paper a quasi-random sequence). Costs ``samples (cells + 2)`` forwards, shared by all
    targets under `vmap`.

    Args:
        params, model, x, target, layer, at, output, strict: See `gradient`.
        samples: Number of draws.
        cells: Of the grid of the mask, along each axis.
        baseline: What masks blend into: see `pullback.masks.covering`. Zeros if omitted.
        seed, tokens, chunk_size, progress: See `rise`.

    Returns:
        Map ``[batch 1 height width]``, not negative: the share of the variance that is lost with a cell's value. Shares
        add up to more than 1 where cells interact.

    Raises:
        ValueError: If `samples` is less than 2.

    Example:
        >>> model = lambda params, x: x[:, 0, :4, :4].sum((1, 2))
        >>> m = sobol_attribution({}, model, torch.ones(1, 1, 8, 8), None, cells=2, samples=16)
        >>> bool(m[0, 0, 0, 0] > m[0, 0, -1, -1])
        True

    Reference:
        Fel, Cadène, Chalvidal, Cord, Vigouroux & Serre, Look at the Variance!, 2021, sec. 3.
    """
    _positive("samples", samples, 2)
    scene = Scene(params, model, x, target, layer=layer, at=at, output=output, strict=strict)

    def draw(count: int) -> tuple[int, Callable[[Tensor], Tensor]]:
        index = torch.arange(samples, device=scene.device)
        drawn_ = uniform(seed, index, (2 * count,), wide(scene.dtype))
        stratum = uniform(seed, index, (2 * count,), torch.float32, stream=1).argsort(0)
        a, b = ((stratum + drawn_) / samples).chunk(2, 1)

        def masks_at(index: Tensor) -> Tensor:
            sample, which = index % samples, index // samples  # A, B, then A with each cell from B
            fresh = (which[:, None] - 2 == torch.arange(count, device=scene.device)) | (which[:, None] == 1)
            return torch.where(fresh, b[sample], a[sample])

        return samples * (count + 2), masks_at

    scores, cells, sizes = _on_cells(scene, tokens, cells, baseline, draw, chunk_size, progress)
    scores = scores.unflatten(0, (-1, samples))  # [draw sample batch]
    variance = scores[:2].flatten(0, 1).var(0, unbiased=False)
    unexplained = (scores[2:] - scores[0]).square().mean(1) / 2  # [cell batch]
    shares = torch.where(variance == 0, torch.zeros_like(unexplained), unexplained / variance)
    return _cell_maps(shares.T, cells, sizes).to(scene.dtype)


@public
def hsic_attribution(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    samples: int = 500,
    cells: int | Sequence[int] = 7,
    p: float = 0.5,
    baseline: drawn.Cover = None,
    seed: Seed = 0,
    tokens: bool = False,
    layer: str = "",
    at: str = "output",
    output: Select = None,
    strict: bool = False,
    chunk_size: Together = "auto",
    progress: Progress = None,
) -> Tensor:
    r"""Measure how far the score depends on whether a cell is shown, by the Hilbert-Schmidt independence criterion.

    .. math:: m_i = \frac{\operatorname{tr}(K_i H L H)}{(n - 1)^2}

    with the kernels :math:`K_i` (1 where cell i is shown or covered in both samples) and L (a Gaussian of the score,
    as wide as the median distance), and H that centres. Catches any dependence, and costs `samples` forwards for all
    cells, shared by all targets under `vmap`.

    Args:
        params, model, x, target, layer, at, output, strict: See `gradient`.
        samples: Number of random masks.
        cells: Of the grid of the mask, along each axis.
        p: Probability that a cell is shown.
        baseline: What covered cells show: see `pullback.masks.covering`. Zeros if omitted.
        seed, tokens, chunk_size, progress: See `rise`.

    Returns:
        Map ``[batch 1 height width]``, not negative; 0 where the score does not depend on the cell.

    Raises:
        ValueError: If `samples` is less than 2.

    Example:
        >>> model = lambda params, x: x[:, 0, :4, :4].sum((1, 2))
        >>> m = hsic_attribution({}, model, torch.ones(1, 1, 8, 8), None, cells=2, samples=64)
        >>> bool(m[0, 0, 0, 0] > m[0, 0, -1, -1])
        True

    Reference:
        Novello, Fel & Vigouroux, Making Sense of Dependence, 2022, sec. 3.
    """
    _positive("samples", samples, 2)
    scene = Scene(params, model, x, target, layer=layer, at=at, output=output, strict=strict)

    def draw(count: int) -> tuple[int, Callable[[Tensor], Tensor]]:
        return samples, lambda index: uniform(seed, index, (count,), torch.float32) < p

    scores, cells, sizes = _on_cells(scene, tokens, cells, baseline, draw, chunk_size, progress)
    shown = draw(math.prod(cells))[1](torch.arange(samples, device=scene.device)).to(scores.dtype)
    square = (scores.T[:, :, None] - scores.T[:, None]).square()  # [batch sample sample]
    width = square.flatten(1).median(1).values[:, None, None]
    like = torch.exp(-square / (2 * torch.where(width == 0, torch.ones_like(width), width)))
    centred = like - like.mean(1, keepdim=True)
    centred = centred - centred.mean(2, keepdim=True)
    dependence = 2 * ((centred @ shown) * shown).sum(1) / (samples - 1) ** 2  # K = z z' + (1 - z)(1 - z)', H 1 = 0
    return _cell_maps(dependence, cells, sizes).to(scene.dtype)
