"""How much of an image must be shown before the model knows it? Performance information curves.

From a blurred image on, the highest pixels of a map come into view. Each image in between has a score, and an
information content: how well it compresses, relative to the whole image. The curve of one over the other is judged by
the area under it. Unlike a share of pixels, information counts a pixel by what it adds to what is already seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback._core.batching import wide
from pullback._core.entry import public
from pullback._core.masked import Link
from pullback._core.types import Inputs, Model, Output, Params, Progress, Target
from pullback._torch.random import Seed
from pullback.masks import Fill
from pullback.metrics._curve import RemovalCurve, area
from pullback.metrics._ranks import voided

Information = Callable[[Tensor], Tensor]
SHARES = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.13, 0.21, 0.34, 0.5, 0.75)


def residual_entropy(images: Tensor, like: Tensor | None = None) -> Tensor:
    r"""Estimate how many bits an image takes when it is compressed without loss.

    .. math:: \text{pixels} \cdot \sum_{\text{channel}} H(v - \hat v), \qquad
              \hat v = \operatorname{median}(w, n, w + n - c)

    The 8-bit values v are predicted from their neighbours to the west, the north and the corner between, as JPEG-LS
    does, and H is the entropy of the residuals, modulo 256, in bits. Runs on any device and under `vmap`.

    Args:
        images: ``[image channel height width]``.
        like: What the 256 levels span, from its least to its greatest value, one for each image; `images` if omitted.

    Returns:
        ``[image]``, in bits, in [0, 8 channels pixels]; near 0 for a constant image.

    Example:
        >>> x = torch.rand(1, 3, 16, 16)
        >>> flat = x.mean((2, 3), keepdim=True).expand_as(x)
        >>> bool(residual_entropy(flat, like=x) < residual_entropy(x))
        True

    Reference:
        Weinberger, Seroussi & Sapiro, The LOCO-I Lossless Image Compression Algorithm, 2000, sec. III.
    """
    like = images if like is None else like
    low, high = like.amin((1, 2, 3), keepdim=True), like.amax((1, 2, 3), keepdim=True)
    span = torch.where(high > low, high - low, 1)
    levels = ((images - low) / span * 255).round().clamp(0, 255).nan_to_num().long()
    around = F.pad(levels, (1, 0, 1, 0))
    west, north, corner = around[..., 1:, :-1], around[..., :-1, 1:], around[..., :-1, :-1]
    least, most = torch.minimum(west, north), torch.maximum(west, north)
    predicted = torch.minimum(torch.maximum(west + north - corner, least), most)
    residual = ((levels - predicted) % 256).flatten(2)
    counts = torch.zeros(*residual.shape[:2], 256, dtype=wide(images.dtype), device=images.device)
    counts = counts.scatter_add(2, residual, torch.ones_like(residual, dtype=counts.dtype))
    shares = counts / residual.shape[2]
    return -torch.special.xlogy(shares, shares).sum((1, 2)) / math.log(2) * residual.shape[2]


def _curve(
    way: RemovalCurve,
    shares: Sequence[float],
    baseline: Fill,
    seed: Seed,
    information: Information | None,
    chunk_size: int | None,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """Give information and score, ``[batch step]``, from the hidden image to the whole one."""
    if len(way.sizes) != 2:
        raise ValueError(f"`x` must be [batch channel height width], got {list(way.image.shape)}.")
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(f"`shares` must be numbers above 0 and below 1, got {list(shares)}.")
    under = way.under(baseline, seed)
    counts = [0, *(round(share * way.count) for share in sorted(shares)), way.count]
    contents: list[Tensor] = []

    def images(shown: Tensor) -> Tensor:
        seen = torch.where(shown, way.image, under)
        if information is None:
            like = way.image.expand_as(seen).flatten(0, 1)
            content = residual_entropy(seen.flatten(0, 1), like)
        else:
            content = information(seen.flatten(0, 1))
        contents.append(content.unflatten(0, seen.shape[:2]))
        return seen

    steps = torch.tensor(counts, device=way.image.device)
    scores = way.scores(way.ranks, steps, images, chunk_size, progress)
    content = torch.cat(contents).to(scores.dtype).T
    hidden, whole = content[:, :1], content[:, -1:]
    return ((content - hidden) / (whole - hidden)).clamp(0, 1), scores


def _judged(way: RemovalCurve, content: Tensor, performance: Tensor, return_info: bool) -> Any:
    content, order = torch.sort(content, dim=1, stable=True)
    performance = performance.gather(1, order).cummax(1).values
    result = voided(area(performance, content), way.map)
    return (result, {"information": content, "performance": performance}) if return_info else result


@public
def softmax_information(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    map: Tensor,
    *,
    shares: Sequence[float] = SHARES,
    baseline: Fill = "blur",
    information: Information | None = None,
    link: Link = "softmax",
    seed: Seed = 0,
    output: Output = None,
    chunk_size: int | None = 32,
    progress: Progress = None,
    return_info: bool = False,
) -> Any:
    r"""Measure the area under the score over the information that the top of the map brings into view (SIC).

    .. math:: \int_0^1 \min\Big(1, \frac{f_t(x_s)}{f_t(x)}\Big) \, d i(s), \qquad
              i(s) = \frac{\mathrm{bits}(x_s) - \mathrm{bits}(x_0)}{\mathrm{bits}(x) - \mathrm{bits}(x_0)}

    with :math:`x_s` the blurred image :math:`x_0` with the top share s of the map in view; points are put in order of
    information, and the score is the highest so far. In [0, 1], higher is better. Reads the map's order alone. What a
    random map gets is chance. Costs a forward for each share, and two.

    The paper estimates bits by the size of a WebP file, and draws one curve for all images, through medians of bins of
    information: its points are in the info. Its authors' code subtracts the score of the blurred image as well.

    Args:
        params, model, x, target, link, seed, output, progress: See `pullback.metrics.deletion`.
        map: ``[batch 1 height width]``. Equal values go in reading order.
        shares: Of the pixels, each above 0 and below 1; by default those of the authors' code. The blurred and the
            whole image join them.
        baseline: What is seen of a pixel that is not in view: the blurred image if omitted; others as in `deletion`.
        information: A function of images ``[image channel height width]`` that gives ``[image]``, in any unit;
            `residual_entropy` on the levels of `x` if omitted.
        chunk_size: Shares evaluated together. `None` for all of them.
        return_info: Give also ``{"information": [batch step], "performance": [batch step]}``, the points of the curve.

    Returns:
        ``[batch]``; NaN where the map holds NaN, or the baseline has as many bits as `x`.

    Raises:
        ValueError: If `x` is no batch of images, the map does not fit it, or a share is out of range.

    Example:
        >>> model = lambda params, x: x[:, 0, :2, :2].mean((1, 2))
        >>> x = torch.rand(1, 1, 8, 8)
        >>> where = torch.zeros(1, 1, 8, 8)
        >>> where[:, :, :2, :2] = 1
        >>> how = {"baseline": None, "link": None}
        >>> right, wrong = (softmax_information({}, model, x, None, map, **how) for map in (where, -where))
        >>> bool(right > wrong)
        True

    Reference:
        Kapishnikov, Bolukbasi, Viégas & Terry, XRAI: Better Attributions Through Regions, 2019, sec. 4.2.
    """
    way = RemovalCurve(params, model, x, target, map, tokens=False, output=output, link=link)
    content, scores = _curve(way, shares, baseline, seed, information, chunk_size, progress)
    return _judged(way, content, (scores / scores[:, -1:]).clamp(0, 1), return_info)


@public
def accuracy_information(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    map: Tensor,
    *,
    shares: Sequence[float] = SHARES,
    baseline: Fill = "blur",
    information: Information | None = None,
    seed: Seed = 0,
    output: Output = None,
    chunk_size: int | None = 32,
    progress: Progress = None,
    return_info: bool = False,
) -> Any:
    r"""Measure the area under the accuracy over the information that the top of the map brings into view (AIC).

    As `softmax_information`, with 1 where the target is the class of the highest score and 0 elsewhere. In [0, 1],
    higher is better. What a random map gets is chance.

    Args:
        params, model, x, seed, output, progress: See `pullback.metrics.deletion`.
        target: A class index, or one for each example.
        map, shares, baseline, information, chunk_size, return_info: See `softmax_information`.

    Returns:
        ``[batch]``; NaN where the map holds NaN, or the baseline has as many bits as `x`.

    Raises:
        ValueError: If `x` is no batch of images, the map does not fit it, or a share is out of range.
        TypeError: If `target` is no class index.

    Example:
        >>> model = lambda params, x: torch.stack((x[:, 0, :2, :2].mean((1, 2)), x.new_full(x.shape[:1], 0.3)), 1)
        >>> x, map = torch.rand(1, 1, 8, 8) + 0.5, torch.zeros(1, 1, 8, 8)
        >>> map[:, :, :2, :2] = 1
        >>> right, wrong = (accuracy_information({}, model, x, 0, m, baseline=None) for m in (map, -map))
        >>> bool(right > wrong)
        True

    Reference:
        Kapishnikov, Bolukbasi, Viégas & Terry, XRAI: Better Attributions Through Regions, 2019, sec. 4.2.
    """
    if callable(target) or target is None or (isinstance(target, Tensor) and target.is_floating_point()):
        raise TypeError("`target` must be a class index, or one for each example: accuracy is of a class.")

    def highest(scores: Tensor) -> Tensor:
        return F.one_hot(scores.argmax(1), scores.shape[1]).to(scores.dtype)

    way = RemovalCurve(params, model, x, target, map, tokens=False, output=output, link=highest)
    content, hits = _curve(way, shares, baseline, seed, information, chunk_size, progress)
    return _judged(way, content, hits, return_info)
