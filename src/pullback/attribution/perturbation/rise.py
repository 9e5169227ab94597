"""Show random parts of the input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback._core.batching import report, wide
from pullback._core.checks import at_least
from pullback._core.entry import method
from pullback._core.masked import Link, MaskedModel, axis_sizes, mask_axes_of
from pullback._core.types import ChunkSize, Inputs, Layer, Model, Output, Params, Progress, Target
from pullback._torch.random import Seed, uniform
from pullback.masks import grid_masks


@method("perturbation", "map", "one map", small={"samples": 4, "grid": 2}, forwards=lambda o: o["samples"])
def rise(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    samples: int = 4000,
    grid: int | Sequence[int] = 7,
    p: float = 0.5,
    link: Link = "softmax",
    normalise: bool = True,
    seed: Seed = 0,
    tokens: bool = False,
    layer: str | Layer = "",
    output: Output = None,
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
) -> Tensor:
    r"""Show the model random parts of the input, and average the masks by the scores that they reach.

    .. math:: m = \frac{1}{p \, n} \sum_{s=1}^n f_t(x \odot M_s) \, M_s

    The masks are grids of cells, each shown with probability p, enlarged linearly and shifted: see
    `pullback.masks.grid_masks`. They are the same for all examples. Costs `samples` forwards, shared by all targets
    under `vmap`.

    Args:
        params, model, x, target, layer, output: See `gradient`.
        samples: Number of masks.
        grid: Of the grid, along each axis.
        p: Probability that a cell is shown.
        link: What the output goes through before it is scored: ``"softmax"`` over classes, as in the paper (an
            output of one number, and a function as target, is taken as it is); ``"sigmoid"``, as TorchRay does; a
            function; `None` for the score itself.
        normalise: Divide by p, as the paper does and TorchRay does not.
        seed: Integer, or an integer tensor ``[]`` (for `vmap` over seeds).
        tokens: What is covered is ``[batch token channel]``.
        chunk_size: Masks evaluated together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (masks done, masks in all).

    Returns:
        Map ``[batch 1 height width]``, in units of the score.

    Raises:
        ValueError: If `samples` is less than 1, or p not a probability above 0.

    Example:
        >>> model = lambda params, x: x.mean((2, 3))
        >>> m = rise({}, model, torch.rand(2, 3, 16, 16), 0, samples=8)
        >>> m.shape == (2, 1, 16, 16) and bool((m >= 0).all())
        True

    Reference:
        Petsiuk, Das & Saenko, RISE: Randomized Input Sampling for Explanation of Black-box Models, 2018, sec. 3.
    """
    at_least("samples", samples)
    if not 0 < p <= 1:
        raise ValueError(f"`p` must be a probability above 0, got {p}.")
    masked = MaskedModel(params, model, x, target, layer=layer, output=output, link=link)
    mask_axes = mask_axes_of(masked, tokens)
    grid = axis_sizes("grid", grid, mask_axes.sizes, lambda n: n)
    cell = torch.tensor([math.ceil(n / c) for n, c in zip(mask_axes.sizes, grid, strict=True)], device=masked.device)
    dtype = wide(masked.dtype)

    def scored() -> Iterator[tuple[Tensor, Tensor]]:
        for part in masked.parts(samples, chunk_size):
            index = torch.arange(part.start, part.stop, device=masked.device)
            grids = (uniform(seed, index, grid, dtype) < p).to(dtype)
            shifts = (uniform(seed, index, (len(grid),), torch.float32, stream=1) * cell).long()
            masks = grid_masks(grids, shifts, mask_axes.sizes)  # [mask 1 *size]

            def cover(_: int, values: Tensor) -> Tensor:
                return mask_axes.undo(mask_axes.to_channels_first(values) * masks.unsqueeze(1).to(values.dtype))  # noqa: B023

            yield masked.scores(len(part), cover).to(dtype), masks.flatten(1)
            report(progress, part.stop, samples)

    total = _weighted_sum(scored())
    return (total / (samples * (p if normalise else 1))).unflatten(1, (1, *mask_axes.sizes)).to(masked.dtype)


HELD_MASK_BYTES = 32 * 2**20  # bytes of masks that wait to be summed


def _weighted_sum(pairs: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum masks ``[mask pixel]`` by scores ``[mask batch]``: ``[batch pixel]``.

    Many at once: for many targets a sum is larger than all that is summed.
    """
    total: Any = 0
    held: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        held.append(pair)
        if sum(masks.numel() * masks.element_size() for _, masks in held) >= HELD_MASK_BYTES:
            total, held = total + _product(held), []
    return total + _product(held) if held else total


def _product(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    scores, masks = (torch.cat(column) for column in zip(*pairs, strict=True))
    return torch.matmul(scores.T, masks)
