"""Does the score fall when only what a map points to is shown? Average drop and increase."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pullback import maps
from pullback._core.batching import wide
from pullback._core.entry import public
from pullback._core.masked import Link
from pullback._core.types import Inputs, Model, Output, Params, Target
from pullback._torch.random import Seed
from pullback.masks import Fill
from pullback.metrics._curve import RemovalCurve
from pullback.metrics._ranks import voided

# -- maps as masks


def _through(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    map: Tensor,
    baseline: Fill,
    seed: Seed,
    **how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score the image, and what shows through the map, scaled to [0, 1]; and give the map."""
    way = RemovalCurve(params, model, x, target, map, **how)
    mask = way.laid(maps.normalise(way.map)).to(way.image.dtype)
    under = way.under(baseline, seed)
    seen = torch.stack((way.image, under + mask * (way.image - under)))
    whole, through = way.masked.scores(2, lambda _, __: way.mask_axes.undo(seen)).to(wide(way.masked.dtype))
    return whole, through, way.map


@public
def average_drop(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    map: Tensor,
    *,
    baseline: Fill = None,
    link: Link = "softmax",
    seed: Seed = 0,
    tokens: bool = False,
    output: Output = None,
) -> Tensor:
    r"""Measure by what share the score falls when the image is seen through the map.

    .. math:: \frac{\max\big(0, f_t(x) - f_t(x \odot m)\big)}{f_t(x)}, \qquad m \in [0, 1]

    with m the map scaled by its least and greatest value. In [0, 1] where the score is a probability; lower is better.
    The paper's average drop is the mean over images, in per cent. A map of ones, which explains nothing, is perfect;
    what a random map gets is chance. Costs 2 forwards, in one batch.

    Args:
        params, model, x, target, link, seed, tokens, output: See `deletion`.
        map: ``[batch 1 height width]``.
        baseline: What is seen where the map is 0: zeros if omitted, as in the paper; others as in `deletion`.

    Returns:
        ``[batch]``; NaN where the map holds NaN.

    Raises:
        ValueError: If the map does not fit `x`, or `baseline` is unknown.

    Example:
        >>> model = lambda params, x: x.mean((1, 2, 3))
        >>> x, map = torch.ones(1, 1, 2, 2), torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])
        >>> average_drop({}, model, x, None, map, link=None)  # half the image is gone
        tensor([0.5000])

    Reference:
        Chattopadhyay, Sarkar, Howlader & Balasubramanian, Grad-CAM++, 2018, sec. 4.1.
    """
    how = {"tokens": tokens, "output": output, "link": link}
    whole, through, map = _through(params, model, x, target, map, baseline, seed, **how)
    return voided((whole - through).clamp(min=0) / whole, map)


@public
def average_increase(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    map: Tensor,
    *,
    baseline: Fill = None,
    link: Link = "softmax",
    seed: Seed = 0,
    tokens: bool = False,
    output: Output = None,
) -> Tensor:
    r"""Tell whether the score rises when the image is seen through the map.

    .. math:: f_t(x \odot m) > f_t(x), \qquad m \in [0, 1]

    with m the map scaled by its least and greatest value. Higher is better: the paper's increase in confidence is the
    mean over images, in per cent. What a random map gets is chance. Costs 2 forwards, in one batch.

    Args:
        params, model, x, target, link, seed, tokens, output: See `deletion`.
        map, baseline: See `average_drop`.

    Returns:
        ``[batch]``, bool; False where the map holds NaN.

    Raises:
        ValueError: If the map does not fit `x`, or `baseline` is unknown.

    Example:
        >>> model = lambda params, x: -x[:, 0, 0, 0]
        >>> x, map = torch.ones(1, 1, 2, 2), torch.tensor([[[[0.0, 1.0], [1.0, 1.0]]]])
        >>> average_increase({}, model, x, None, map, link=None)  # what spoke against it is gone
        tensor([True])

    Reference:
        Chattopadhyay, Sarkar, Howlader & Balasubramanian, Grad-CAM++, 2018, sec. 4.1.
    """
    how = {"tokens": tokens, "output": output, "link": link}
    whole, through, map = _through(params, model, x, target, map, baseline, seed, **how)
    return voided(through > whole, map)
