"""Meaningful perturbation: the smallest deletion that lowers the score most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback import maps
from pullback._core.batching import report, wide
from pullback._core.entry import method
from pullback._core.masked import Link, MaskedModel, axis_sizes, mask_axes_of
from pullback._core.types import ChunkSize, Inputs, Layer, Model, Output, Params, Progress, Target
from pullback._torch.random import Seed, uniform
from pullback.attribution.perturbation._optimise import in_parts
from pullback.masks import Fill, fill


@method(
    "perturbation",
    "map",
    "one map",
    small={"iterations": 3, "grid": 3, "jitter": 3, "baseline": 0.0, "start": 0.5},
    forwards=lambda o: o["iterations"],
    adaptive=lambda o: o["iterations"] - 1,
)
def meaningful_perturbation(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    iterations: int = 300,
    grid: int | Sequence[int] = 28,
    baseline: Fill = "blur",
    link: Link = "softmax",
    area: float = 1e-4,
    variation: float = 1e-2,
    beta: float = 3.0,
    start: float = 1.0,
    jitter: int = 4,
    learning_rate: float = 0.1,
    seed: Seed = 0,
    layer: str | Layer = "",
    tokens: bool = False,
    output: Output = None,
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
    return_info: bool = False,
) -> Any:
    r"""Find a small, smooth part without which the score is low.

    .. math:: \min_m \; f_t\big(m x + (1 - m) b\big) + \lambda_1 \sum_u |1 - m_u| +
              \lambda_2 \sum_u \|\nabla m_u\|_\beta^\beta

    over a coarse mask m in [0, 1], enlarged linearly; b is a blur of x. Adam, from a constant mask.
    Costs `iterations` gradients; images and, under `vmap`, targets run as one batch.

    Args:
        params, model, x, target, layer, output: See `gradient`.
        iterations: Steps of Adam.
        grid: Of the mask, along each axis; at most the size of the image.
        baseline: What the mask blends into: see `pullback.masks.fill`. A blur by 10 pixels if omitted.
        link: What the output goes through before it is scored: see `rise`.
        area, variation, beta: The weights :math:`\lambda_1` and :math:`\lambda_2` and the exponent.
        start: The mask to begin with, 1 keeping everything.
        jitter: The input is shifted at random by fewer pixels than this, around its border. Not at layers.
        learning_rate: Of Adam.
        seed: Of the shifts: an integer, or an integer tensor ``[]``.
        tokens: What is covered is ``[batch token channel]``.
        chunk_size: Images optimised together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (iterations done, iterations in all).
        return_info: Return ``(map, info)``; ``info["history"]``, ``[batch 3 iteration]``, holds the three terms.

    Returns:
        Map ``[batch 1 height width]`` in [0, 1]: one minus the mask, 1 on the part that is deleted.

    Raises:
        ValueError: If `iterations` is less than 1.

    Example:
        >>> model = lambda params, x: x[:, :, :4].sum((1, 2, 3))
        >>> m = meaningful_perturbation({}, model, torch.ones(1, 1, 8, 8), None, baseline=0.0, grid=4, iterations=9)
        >>> bool(m[0, 0, 0, 0] > m[0, 0, -1, -1])
        True

    Reference:
        Fong & Vedaldi, Interpretable Explanations of Black Boxes by Meaningful Perturbation, 2017, sec. 4.
    """
    masked = MaskedModel(params, model, x, target, layer=layer, output=output, link=link)
    mask_axes = mask_axes_of(masked, tokens)
    sides = [min(c, n) for c, n in zip(axis_sizes("grid", grid, mask_axes.sizes, int), mask_axes.sizes, strict=True)]
    dtype = wide(masked.dtype)

    def optimise(rows: range) -> tuple[Tensor, Tensor]:
        part = masked.of_rows(rows)
        part.targets(1)  # before the derivative is taken: what is repeated can be checked

        def terms(mask: Tensor, iteration: int) -> Tensor:
            large = maps.resize(mask, mask_axes.sizes)
            at_t = torch.full((1,), iteration, device=masked.device)
            shift = (uniform(seed, at_t, (len(sides),), torch.float32)[0] * max(1, jitter)).long()

            def cover(_: int, values: Tensor) -> Tensor:
                shown = mask_axes.to_channels_first(values[0])
                under = fill(shown, baseline)
                blend = under + large.to(shown.dtype) * (shown - under)
                return mask_axes.undo(_rolled(blend, shift) if jitter and not layer else blend).unsqueeze(0)

            steps = [mask.diff(dim=axis).abs().pow(beta).flatten(1).sum(1) for axis in range(2, mask.ndim)]
            small, even = area * (1 - mask).abs().flatten(1).sum(1), variation * sum(steps[1:], steps[0])
            return torch.stack([part.scores(1, cover)[0].to(dtype), small, even], 1)

        mask, history = _descended(
            terms,
            torch.full((len(rows), 1, *sides), start, dtype=dtype, device=masked.device),
            iterations,
            learning_rate,
            lambda done: report(progress, rows.start * iterations + done * len(rows), masked.batch * iterations),
        )
        return 1 - maps.resize(mask, mask_axes.sizes), history

    map, history = in_parts(masked, optimise, masked.batch, 1, iterations, chunk_size)
    return (map, {"history": history}) if return_info else map


def _descended(
    terms: Callable[[Tensor, int], Tensor],
    mask: Tensor,
    iterations: int,
    learning_rate: float,
    progress: Callable[[int], object],
) -> tuple[Tensor, Tensor]:
    """Minimise a sum of terms ``[row term]`` by Adam, the mask held in [0, 1]; the history ``[row term iteration]``."""

    def total(mask: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        found = terms(mask, iteration)
        return found.sum(), found

    mean, square, history = torch.zeros_like(mask), torch.zeros_like(mask), []
    for t in range(1, iterations + 1):
        slope, found = torch.func.grad(total, has_aux=True)(mask, t - 1)
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        move = mean / (1 - 0.9**t) / (square / (1 - 0.999**t) + 1e-16).sqrt()
        mask = (mask - learning_rate * move).clamp(0, 1)
        history.append(found)
        progress(t)
    return mask, torch.stack(history, 2)


def _rolled(values: Tensor, shift: Tensor) -> Tensor:
    """Shift the trailing axes by as many pixels as `shift`, ``[axis]``, says, around the border."""
    axes = shift.shape[0]
    for k in range(axes):
        axis = values.ndim - axes + k
        length = values.shape[axis]
        places = (torch.arange(length, device=values.device) - shift[k]) % length
        shape = [1] * values.ndim
        shape[axis] = length
        values = torch.gather(values, axis, places.reshape(shape).expand(values.shape))
    return values
