"""Smooth masks of a given area, found by gradient ascent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pullback._core.masked import MaskedModel
from pullback._core.targets import cotangent, score
from pullback._core.types import ChunkSize, Target
from pullback._torch.internals import readable
from pullback.masks import plain_smooth_masks, smooth_grid, smooth_masks

Reward = Callable[[Tensor, int], Tensor]
Judge = Callable[[Tensor, Any], Tensor]
PATIENCE_ITERATIONS = 20  # iterations over which a mask must rest to be done


def optimised_masks(
    reward: Reward,
    size: Sequence[int],
    areas: Tensor,
    *,
    step: int = 7,
    sigma: float = 21.0,
    iterations: int = 800,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    dampening: float = 0.9,
    weight: float = 300.0,
    growth: float = 1.0035,
    tolerance: float | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Climb a reward by smooth masks whose area is held to a fraction of the image.

    .. math:: \max_p \; r(m_p) - \lambda_t \, \tfrac{1}{M} \| \mathrm{sort}(m_p) - \rho_a \|^2, \qquad
              \lambda_t = \lambda_0 \, \gamma^t

    where :math:`\rho_a` holds zeros and then a fraction a of ones. Gradient ascent with momentum on the parameters p of
    `pullback.masks.smooth_masks`, which start at 1 and stay in [0, 1]:
    :math:`v_t = \mu v_{t-1} + (1 - d) g_t` with :math:`v_0 = g_0`. The rows are independent of one another.

    Args:
        reward: From masks ``[row 1 *size]`` and the iteration to rewards ``[row]``.
        size: Of the masks.
        areas: ``[row]``: the fraction that each mask may cover.
        step, sigma: See `pullback.masks.smooth_masks`.
        iterations: Steps of ascent. The masks returned are those that the last step was taken from.
        learning_rate, momentum, dampening: Of the ascent.
        weight, growth: Of the area's term: :math:`\lambda_0` and :math:`\gamma`.
        tolerance: A row is done, and rests, when no pixel of its mask moves by more than this in 20 iterations.
        progress: Called after each iteration with the number of those done.

    Returns:
        Masks ``[row 1 *size]``, and the history ``[row 2 iteration]`` of reward and area's term.
    """
    rows = areas.shape[0]
    dtype, device = areas.dtype, areas.device
    grid = smooth_grid(size, step)
    start = torch.ones(rows, 1, *grid, dtype=dtype, device=device)
    first = _ranks_at_start(tuple(size), step, float(sigma)).to(device)
    pixels = len(first)
    # computed with the rounding of double precision, as a caller would count pixels
    zeros = (pixels * (1 - areas.double())).floor() if device.type != "mps" else (pixels * (1 - areas)).floor()
    reference = (torch.arange(pixels, device=device) >= zeros[:, None]).to(dtype)

    def objective(parameters: Tensor, iteration: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        masks, whole = smooth_masks(parameters, size, step=step, sigma=sigma)
        rewards = reward(masks, iteration).to(dtype)
        ordered = whole.flatten(1)
        ordered = ordered[:, first] if iteration == 0 else ordered.sort(1).values
        term = -weight * growth**iteration * (ordered - reference).square().mean(1)
        return (rewards + term).sum(), (masks, rewards, term)

    parameters, velocity = start, torch.zeros_like(start)
    masks, before, history = start, None, []
    resting = torch.zeros(rows, dtype=torch.bool, device=device)
    for iteration in range(iterations):
        slope, (now, *terms) = torch.func.grad(objective, has_aux=True)(parameters, iteration)
        masks = now if tolerance is None or iteration == 0 else torch.where(_as_column(resting, now), masks, now)
        history.append(torch.stack(terms, 1))
        velocity = slope if iteration == 0 else momentum * velocity + (1 - dampening) * slope
        parameters = (parameters + learning_rate * velocity).clamp(0, 1)
        if progress is not None:
            progress(iteration + 1)
        if tolerance is not None and iteration % PATIENCE_ITERATIONS == 0:
            if before is not None:
                resting = resting | ((masks - before).abs().flatten(1).amax(1) <= tolerance)
            before = masks
            if readable(resting) and bool(resting.all()):
                break
    return masks, torch.stack(history, 2)


@lru_cache(maxsize=16)
def _ranks_at_start(size: tuple[int, ...], step: int, sigma: float) -> Tensor:
    """Order the pixels of the first mask by size.

    Nearly all of them are equal: they are ranked as the plain form rounds them, the same in any dtype.
    """
    start = torch.ones(1, 1, *smooth_grid(size, step))
    return plain_smooth_masks(start, size, step=step, sigma=sigma).clamp(0, 1).flatten().argsort()


def _as_column(flags: Tensor, like: Tensor) -> Tensor:
    return flags.reshape(-1, *[1] * (like.ndim - 1))


def contrast(output: Tensor, target: Target) -> Tensor:
    """Give the score less the highest among the other classes, ``[row]``."""
    if target is None or callable(target) or (isinstance(target, Tensor) and target.is_floating_point()):
        raise ValueError("`reward` 'contrastive' compares classes: `target` must be a class index.")
    hot = cotangent(output, target)
    others = torch.where(hot == 0, output, torch.full_like(output, -math.inf)).amax(1)
    return score(output, target) - others.flatten(1).sum(1) if others.ndim > 1 else score(output, target) - others


def in_parts(
    masked: MaskedModel,
    optimise: Callable[[range], tuple[Tensor, Tensor]],
    count: int,
    shown: int,
    iterations: int,
    chunk_size: ChunkSize,
) -> list[Tensor]:
    """Optimise `count` rows, of which the model sees each in so many copies: masks, and the history of them all."""
    if iterations < 1:
        raise ValueError(f"`iterations` must be at least 1, got {iterations}.")
    parts = masked.parts(count, chunk_size, rows=shown, repeats=2 * iterations)
    masks, histories = zip(*[optimise(rows) for rows in parts], strict=True)
    longest = max(history.shape[2] for history in histories)
    return [torch.cat(masks).to(masked.dtype), torch.cat([_held(history, longest) for history in histories])]


def _held(history: Tensor, length: int) -> Tensor:
    """Repeat the last column of a history that ended early."""
    return torch.cat([history, history[..., -1:].expand(*history.shape[:-1], length - history.shape[-1])], -1)
