"""Does the score fall as the pixels that a map ranks highest are removed?

Costs are in forwards of the batch. `chunk_size` of them are run together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pullback._core.batching import wide
from pullback._core.entry import public
from pullback._core.masked import Link
from pullback._core.types import Inputs, Model, Output, Params, Progress, Target
from pullback._torch.random import Seed, normal
from pullback.masks import Fill, superpixels
from pullback.metrics._curve import Images, RemovalCurve, area
from pullback.metrics._inpainting import filled_in
from pullback.metrics._ranks import ranks, voided

# -- pixels that come and go


def _curve(
    way: RemovalCurve, steps: int, images: Images, chunk_size: int | None, progress: Progress, return_info: bool
) -> Any:
    counts, shares = way.steps(steps)
    curve = way.scores(way.ranks, counts, images, chunk_size, progress)
    result = voided(area(curve, shares), way.map)
    return (result, {"curve": curve, "share": shares}) if return_info else result


@public
def deletion(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    map: Tensor,
    *,
    steps: int = 100,
    baseline: Fill = None,
    link: Link = "softmax",
    seed: Seed = 0,
    tokens: bool = False,
    output: Output = None,
    chunk_size: int | None = 32,
    progress: Progress = None,
    return_info: bool = False,
) -> Any:
    r"""Take pixels away from the highest of the map on, and measure the area under the score.

    .. math:: \int_0^1 f_t(x \text{ without its top } s) \, ds

    by trapezoids over `steps` equal groups of pixels. In [0, 1] where the score is a probability; lower is better.
    Reads nothing but the map's order. What a random map gets is chance. Costs ``steps + 1`` forwards.

    Args:
        params, model, x, target, output: See `gradient`.
        map: ``[batch 1 height width]``. Equal values go in reading order.
        steps: Groups of pixels. No more than there are pixels.
        baseline: What a pixel that is taken away shows: zero if omitted, ``"mean"`` of its channel, ``"blur"``,
            ``"noise"`` with the mean and spread of its channel, a number, a tensor or a function: see
            `pullback.masks.fill`.
        link: What the output goes through before it is scored: ``"softmax"``, ``"sigmoid"``, a function, or `None`.
        seed: Of the noise; an integer, or an integer tensor ``[]`` (for `vmap` over seeds).
        tokens: `x` is ``[batch token channel]``, and the map ``[batch 1 token]``.
        chunk_size: Steps evaluated together. `None` for all of them.
        progress: Called with (steps done, steps in all).
        return_info: Give also ``{"curve": [batch step], "share": [step]}``, the scores and the shares taken away.

    Returns:
        ``[batch]``; NaN where the map holds NaN.

    Raises:
        ValueError: If the map does not fit `x`, `steps` is less than 1 or `baseline` unknown.

    Example:
        >>> model = lambda params, x: x.sum((1, 2, 3))
        >>> x = torch.rand(2, 1, 4, 4)
        >>> best, worst = (deletion({}, model, x, None, sign * x, link=None) for sign in (1, -1))
        >>> bool((best <= worst).all()) and torch.allclose(best + worst, x.sum((1, 2, 3)), atol=1e-5)
        True

    Reference:
        Petsiuk, Das & Saenko, RISE: Randomized Input Sampling for Explanation of Black-box Models, 2018, sec. 4.2.
    """
    way = RemovalCurve(params, model, x, target, map, tokens=tokens, output=output, link=link)
    under = way.under(baseline, seed)
    return _curve(way, steps, lambda gone: torch.where(gone, under, way.image), chunk_size, progress, return_info)


@public
def insertion(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    map: Tensor,
    *,
    steps: int = 100,
    baseline: Fill = "blur",
    link: Link = "softmax",
    seed: Seed = 0,
    tokens: bool = False,
    output: Output = None,
    chunk_size: int | None = 32,
    progress: Progress = None,
    return_info: bool = False,
) -> Any:
    r"""Put pixels into an empty image from the highest of the map on, and measure the area under the score.

    .. math:: \int_0^1 f_t(x \text{ with its top } s \text{ alone}) \, ds

    by trapezoids over `steps` equal groups of pixels. In [0, 1] where the score is a probability; higher is better.
    Reads nothing but the map's order. What a random map gets is chance. Costs ``steps + 1`` forwards.

    Args:
        params, model, x, target, steps, link, seed, tokens, output, chunk_size, progress: See `deletion`.
        map: ``[batch 1 height width]``. Equal values go in reading order.
        baseline: What the empty image shows: the blurred image if omitted, as in the paper; others as in `deletion`.
        return_info: Give also ``{"curve": [batch step], "share": [step]}``, the scores and the shares put in.

    Returns:
        ``[batch]``; NaN where the map holds NaN.

    Raises:
        ValueError: If the map does not fit `x`, `steps` is less than 1 or `baseline` unknown.

    Example:
        >>> model = lambda params, x: x.mean((2, 3))
        >>> x, map = torch.rand(2, 3, 4, 4), torch.rand(2, 1, 4, 4)
        >>> i = insertion({}, model, x, 0, map, baseline=None)
        >>> torch.allclose(i, deletion({}, model, x, 0, -map))  # what comes last is taken away first
        True

    Reference:
        Petsiuk, Das & Saenko, RISE: Randomized Input Sampling for Explanation of Black-box Models, 2018, sec. 4.2.
    """
    way = RemovalCurve(params, model, x, target, map, tokens=tokens, output=output, link=link)
    under = way.under(baseline, seed)
    return _curve(way, steps, lambda shown: torch.where(shown, way.image, under), chunk_size, progress, return_info)


@public
def irof(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    map: Tensor,
    *,
    segments: Tensor | None = None,
    baseline: Fill = "mean",
    link: Link = "softmax",
    seed: Seed = 0,
    output: Output = None,
    chunk_size: int | None = 32,
    progress: Progress = None,
    return_info: bool = False,
) -> Any:
    r"""Take segments away from the one with the highest mean on, and measure the area over the score.

    .. math:: \int_0^1 \Big( 1 - \frac{f_t(x \text{ without its top } s)}{f_t(x)} \Big) ds

    by trapezoids over the segments of each image (iterative removal of features). At most 1 where the score is a
    probability; higher is better. What a random map gets is chance. Costs a forward for each segment, and one.

    Args:
        params, model, x, target, link, seed, output, chunk_size, progress: See `deletion`.
        map: ``[batch 1 height width]``.
        segments: ``[batch 1 height width]`` (or 1 for batch), numbered from 0. Superpixels of `x` if omitted, see
            `pullback.masks.superpixels`, which needs scikit-image and cannot run under a transform of `x`.
        baseline: What a segment that is taken away shows: the mean of each channel if omitted, as in the paper; others
            as in `deletion`.
        return_info: Give also ``{"curve": [batch step]}``, the scores relative to that of `x`. Where an image has
            fewer segments than others, its last value is repeated.

    Returns:
        ``[batch]``; NaN where the map holds NaN.

    Raises:
        ValueError: If map or segments do not fit `x`, or `baseline` is unknown.
        ImportError: If `segments` are omitted and scikit-image is not installed.

    Example:
        >>> model = lambda params, x: x.sum((1, 2, 3))
        >>> x, one_each = torch.rand(2, 1, 3, 3), torch.arange(9).reshape(1, 1, 3, 3)
        >>> i = irof({}, model, x, None, x, segments=one_each, baseline=None, link=None)
        >>> d = deletion({}, model, x, None, x, link=None)
        >>> torch.allclose(i, 1 - d / x.sum((1, 2, 3)))
        True

    Reference:
        Rieger & Hansen, IROF: A Low Resource Evaluation Metric for Explanation Methods, 2020, sec. 3.
    """
    way = RemovalCurve(params, model, x, target, map, tokens=False, output=output, link=link)
    segments = superpixels(way.image) if segments is None else segments
    if segments.is_floating_point() or segments.shape[1:] != (1, *way.sizes) or len(segments) not in (1, len(way.map)):
        raise ValueError(
            f"`segments` must be integers {[len(way.map), 1, *way.sizes]}, got {segments.dtype} {list(segments.shape)}."
        )
    segment = segments.flatten(1).to(way.map.device).long().expand_as(way.map)
    count = int(segment.max()) + 1
    empty = torch.zeros(len(segment), count, dtype=wide(way.map.dtype), device=segment.device)
    size = empty.scatter_add(1, segment, torch.ones_like(way.map, dtype=empty.dtype))
    mean = empty.scatter_add(1, segment, way.map.to(empty.dtype)) / size
    place = ranks(torch.where(size > 0, mean, -math.inf))
    until = torch.arange(count + 1, device=segment.device)
    under = way.under(baseline, seed)

    def images(gone: Tensor) -> Tensor:
        return torch.where(gone, under, way.image)

    curve = way.scores(way.laid(place.gather(1, segment)), until, images, chunk_size, progress)
    curve = curve / curve[:, :1]
    own = (size > 0).sum(1, keepdim=True)  # numbers of segments of each image
    between = (curve[:, 1:] + curve[:, :-1]) / 2
    over = 1 - torch.where(until[:-1] < own, between, 0).sum(1) / own.squeeze(1)
    result = voided(over, way.map)
    return (result, {"curve": curve}) if return_info else result


@public
def road(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    map: Tensor,
    *,
    shares: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    least_first: bool = False,
    noise: float = 0.01,
    link: Link = "softmax",
    seed: Seed = 0,
    output: Output = None,
    chunk_size: int | None = 32,
    progress: Progress = None,
    return_info: bool = False,
) -> Any:
    r"""Take the highest pixels of the map away by filling them in from their neighbours, and average the score.

    .. math:: \frac{1}{|S|} \sum_{s \in S} f_t(x \text{ with its top } s \text{ filled in})

    Filled in is what is missing by solving, for all of it at once,

    .. math:: x_p = \sum_q w_{p q} \, x_q

    over the 8 neighbours q, direct ones with weight 1/6 and diagonal ones with 1/12, in proportion at the border, and
    adding noise. So the place of what is gone shows less than with a constant (remove and debias). In [0, 1] where
    the score is a probability; lower is better, and higher with `least_first`. The paper reports the accuracy instead:
    ``link=lambda y: (y == y.amax(1, keepdim=True)).float()``. What a random map gets is chance. Costs a forward for
    each share, and the filling in.

    Args:
        params, model, x, target, link, seed, output, progress: See `deletion`.
        map: ``[batch 1 height width]``. Equal values go in reading order.
        shares: Of the pixels, each above 0 and below 1.
        least_first: Take the lowest pixels away instead.
        noise: Standard deviation of what is added to filled-in pixels, in units of `x`.
        chunk_size: Shares evaluated together. `None` for all of them.
        return_info: Give also ``{"curve": [batch share]}``.

    Returns:
        ``[batch]``; NaN where the map holds NaN.

    Raises:
        ValueError: If `x` is no batch of images, the map does not fit it, or a share is out of range.

    Example:
        >>> model = lambda params, x: x.mean((1, 2, 3))
        >>> x = torch.full((1, 3, 8, 8), 0.7)  # what is filled in looks like what was there
        >>> r = road({}, model, x, None, torch.rand(1, 1, 8, 8), noise=0.0, link=None)
        >>> torch.allclose(r, torch.tensor([0.7]), atol=1e-4)
        True

    Reference:
        Rong, Leemann, Borisov, Kasneci & Kasneci, A Consistent and Efficient Evaluation Strategy for Attribution
        Methods, 2022, sec. 4.
    """
    way = RemovalCurve(params, model, x, target, map, tokens=False, output=output, link=link)
    if len(way.sizes) != 2:
        raise ValueError(f"`x` must be [batch channel height width], got {list(way.image.shape)}.")
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(f"`shares` must be numbers above 0 and below 1, got {list(shares)}.")
    order = ranks(-way.map if least_first else way.map)
    counts = torch.tensor([min(int(share * way.count), way.count - 1) for share in shares], device=order.device)
    first = torch.zeros(1, dtype=torch.long, device=order.device)
    added = noise * normal(seed, first, way.image.shape[1:], way.image.dtype)

    def images(gone: Tensor) -> Tensor:
        filled = filled_in(way.image.expand(len(gone), *way.image.shape).flatten(0, 1), gone.flatten(0, 1))
        return torch.where(gone, filled.unflatten(0, gone.shape[:2]) + added, way.image)

    curve = way.scores(way.laid(order), counts, images, chunk_size, progress)
    result = voided(curve.mean(1), way.map)
    return (result, {"curve": curve}) if return_info else result
