"""LIME: a sparse linear model of the score around the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pullback._core.checks import at_least
from pullback._core.entry import method
from pullback._core.masked import MaskedModel
from pullback._core.types import ChunkSize, Inputs, Layer, Model, Output, Params, Progress, Target
from pullback._torch.random import Seed, uniform
from pullback.attribution.perturbation._coalitions import checked_coalitions, least_squares
from pullback.attribution.perturbation._features import FeatureGroups


@method("perturbation", small={"samples": 5}, forwards=lambda o: o["samples"])
def lime(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    feature_mask: Any = None,
    baseline: Any = None,
    samples: int = 200,
    width: float = 0.25,
    ridge: float = 1.0,
    coalitions: Tensor | None = None,
    seed: Seed = 0,
    layer: str | Layer = "",
    output: Output = None,
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
    return_info: bool = False,
) -> Any:
    r"""Fit a linear model to the score over coalitions of features, those near the whole input counting most.

    .. math:: \min_{a, c} \sum_s w_s \Big( v(z_s) - c - z_s \cdot a \Big)^2 + \lambda \|a\|^2, \quad
              w_s = e^{-d(z_s)^2 / 2 \omega^2}

    where each feature is shown with probability 1/2, and d is the cosine distance between z and the coalition of all,
    :math:`1 - \sqrt{|z| / n}`. Costs `samples` forwards, shared by all targets under `vmap`.

    Args:
        params, model, x, target, features, baseline, layer, output: See `feature_ablation`.
        samples: Number of coalitions.
        width: Of the kernel :math:`\omega`; infinite for equal weights.
        ridge: Weight of the penalty :math:`\lambda`; 0 for least squares.
        coalitions: ``[sample feature]``, boolean, to be used instead of random ones.
        seed: Integer, or an integer tensor ``[]`` (for `vmap` over seeds).
        chunk_size: Coalitions evaluated together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (coalitions done, coalitions in all).
        return_info: Return ``(attribution, info)``; ``info["intercept"]`` and ``info["fit"]``, the weighted share of
            variance explained, are ``[batch]``.

    Returns:
        The coefficient of each feature, with the structure and shape of `x` or of the layer's activation, in units of
        the score.

    Raises:
        ValueError: If `samples` is less than 1, `width` not positive, `ridge` negative, or `coalitions` do not fit.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> x = torch.rand(4, 3)
        >>> torch.allclose(lime({}, model, x, 0, ridge=0.0), x * model.weight[0], atol=1e-5)
        True

    Reference:
        Ribeiro, Singh & Guestrin, "Why Should I Trust You?", 2016, sec. 3. The width and the penalty are those of the
        authors' code for images.
    """
    at_least("samples", samples)
    if not width > 0:
        raise ValueError(f"`width` must be positive, got {width}.")
    if not ridge >= 0:
        raise ValueError(f"`ridge` must be at least 0, got {ridge}.")
    masked = MaskedModel(params, model, x, target, layer=layer, output=output)
    groups = FeatureGroups(masked, feature_mask, baseline)
    n = groups.count
    if coalitions is None:
        sample = torch.arange(samples, device=masked.device)
        shown = uniform(seed, sample, (n,), torch.float32) < 0.5
    else:
        shown = checked_coalitions(coalitions, n, masked.device)
    values = groups.scores(len(shown), lambda part: groups.kept(shown[part.start : part.stop]), chunk_size, progress)
    z, v = shown.double(), values.double()
    weight = torch.exp(-((1 - (z.sum(1) / n).sqrt()) ** 2) / (2 * width**2))
    share = weight / weight.sum()
    middle, mean = share @ z, share @ v
    a = least_squares(z - middle, v - mean, weight, ridge)  # [feature batch]
    attribution = groups.laid_out(a.to(values.dtype).T)
    if not return_info:
        return attribution
    left = share @ (v - mean - (z - middle) @ a).square()
    spread = share @ (v - mean).square()
    fit = 1 - left / torch.where(spread == 0, torch.ones_like(spread), spread)
    return attribution, {"intercept": (mean - middle @ a).to(masked.dtype), "fit": fit.to(masked.dtype)}
