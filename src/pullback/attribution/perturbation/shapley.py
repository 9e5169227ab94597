"""Shapley values: exact, by random orders, and by weighted least squares."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pullback._core.checks import at_least
from pullback._core.entry import method
from pullback._core.masked import MaskedModel
from pullback._core.types import ChunkSize, Inputs, Layer, Model, Output, Params, Progress, Target
from pullback._torch.random import Seed
from pullback.attribution.perturbation._coalitions import (
    checked_coalitions,
    every_coalition,
    least_squares,
    random_ranks,
    weighted_coalitions,
)
from pullback.attribution.perturbation._features import FeatureGroups


@method("perturbation", forwards=lambda o: 2 ** o["features"])
def shapley_values(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    feature_mask: Any = None,
    baseline: Any = None,
    layer: str | Layer = "",
    output: Output = None,
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
) -> Any:
    r"""Give Shapley values exactly, by all coalitions of features.

    .. math:: a_i = \sum_{S \not\ni i} \frac{|S|! \, (n - |S| - 1)!}{n!} \big( v(S \cup i) - v(S) \big)

    with v(S) the score of x where all but the features in S are covered. Attributions add up to the difference in score
    between x and the baseline. Costs :math:`2^n` forwards for n features, shared by all targets under `vmap`.

    Args:
        params, model, x, target, features, baseline, layer, output: See `feature_ablation`.
        chunk_size: Coalitions evaluated together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (coalitions done, coalitions in all).

    Returns:
        Signed, with the structure and shape of `x` or of the layer's activation, in units of the score: each number has
        what its group has.

    Raises:
        ValueError: If there are more than 20 features.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> x = torch.rand(4, 3)
        >>> a = shapley_values({}, model, x, 0)
        >>> torch.allclose(a.sum(1), model(x)[:, 0] - model(0 * x)[:, 0], atol=1e-5)
        True

    Reference:
        Shapley, A Value for n-Person Games, 1953.
    """
    masked = MaskedModel(params, model, x, target, layer=layer, output=output)
    groups = FeatureGroups(masked, feature_mask, baseline)
    n = groups.count
    if n > 20:
        raise ValueError(
            f"`shapley_values` runs 2^n coalitions of n features, at most 20, got {n}. Group them by `feature_mask`, "
            "or use `shapley_sampling`."
        )
    every = every_coalition(range(2**n), n, masked.device)
    values = groups.scores(2**n, lambda part: groups.kept(every[part.start : part.stop]), chunk_size, progress)
    size = every.sum(1)
    share = torch.tensor([1 / (n * math.comb(n - 1, s)) if s < n else 0.0 for s in range(n + 1)], dtype=torch.float64)
    weight = share.to(values)[size]
    found = []
    for i in range(n):
        without, with_ = (k.flatten() for k in torch.arange(2**n, device=masked.device).reshape(-1, 2, 2**i).unbind(1))
        found.append(((values[with_] - values[without]) * weight[without, None]).sum(0))
    return groups.laid_out(torch.stack(found, 1))


@method("perturbation", small={"samples": 2}, forwards=lambda o: o["samples"] * (o["features"] - 1) + 2)
def shapley_sampling(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    feature_mask: Any = None,
    baseline: Any = None,
    samples: int = 25,
    antithetic: bool = False,
    seed: Seed = 0,
    layer: str | Layer = "",
    output: Output = None,
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
    return_info: bool = False,
) -> Any:
    r"""Estimate Shapley values by showing the features one after another, in random orders.

    .. math:: a_i = \tfrac{1}{m} \sum_{\pi} \big( v(\pi_{<i} \cup i) - v(\pi_{<i}) \big)

    Unbiased; in any number of orders attributions add up to the difference in score between x and the baseline. The
    orders are the same for all examples. Costs ``samples (features - 1) + 2`` forwards, shared by all targets under
    `vmap`.

    Args:
        params, model, x, target, features, baseline, layer, output: See `feature_ablation`.
        samples: Number of orders.
        antithetic: Make every second order the reverse of the one before, which cancels much of the error.
        seed: Integer, or an integer tensor ``[]`` (for `vmap` over seeds).
        chunk_size: Coalitions evaluated together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (coalitions done, coalitions in all).
        return_info: Return ``(attribution, info)``; ``info["error"]``, shaped like the attribution, is its standard
            error, estimated from the orders (or pairs of them).

    Returns:
        Signed, with the structure and shape of `x` or of the layer's activation, in units of the score.

    Raises:
        ValueError: If `samples` is less than 1.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> x = torch.rand(4, 3)
        >>> a = shapley_sampling({}, model, x, 0, samples=2)
        >>> torch.allclose(a.sum(1), model(x)[:, 0] - model(0 * x)[:, 0], atol=1e-5)
        True

    Reference:
        Castro, Gómez & Tejada, Polynomial Calculation of the Shapley Value Based on Sampling, 2009.
    """
    at_least("samples", samples)
    masked = MaskedModel(params, model, x, target, layer=layer, output=output)
    groups = FeatureGroups(masked, feature_mask, baseline)
    n = groups.count
    sample = torch.arange(samples, device=masked.device)
    ranks = random_ranks(seed, sample // 2 if antithetic else sample, n)  # [sample group]
    if antithetic:
        ranks = torch.where(sample[:, None] % 2 == 1, n - 1 - ranks, ranks)

    def keep(part: range) -> list[Tensor]:
        index = torch.arange(part.start, part.stop, device=masked.device)
        inner = (index - 2).clamp(min=0)  # none, all, then all proper prefixes of each order
        prefix = ranks[inner // max(1, n - 1)] <= (inner % max(1, n - 1))[:, None]
        return groups.kept(torch.where(index[:, None] < 2, index[:, None] == 1, prefix))

    values = groups.scores(2 + samples * (n - 1), keep, chunk_size, progress)  # [coalition batch]
    ends = values[:2].unsqueeze(0).expand(samples, 2, -1)
    steps = torch.cat([ends[:, :1], values[2:].unflatten(0, (samples, n - 1)), ends[:, 1:]], 1).diff(dim=1)
    gains = torch.gather(steps, 1, ranks.unsqueeze(-1).expand(-1, -1, steps.shape[-1]))  # [sample group batch]
    attribution = groups.laid_out(gains.mean(0).T)
    if not return_info:
        return attribution
    if antithetic:
        gains = gains[: samples // 2 * 2].unflatten(0, (-1, 2)).mean(1)
    error = gains.std(0) / math.sqrt(len(gains)) if len(gains) > 1 else torch.full_like(gains[0], math.nan)
    return attribution, {"error": groups.laid_out(error.T)}


@method("perturbation", small={"samples": 4}, forwards=lambda o: o["samples"] + 2)
def kernel_shap(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    feature_mask: Any = None,
    baseline: Any = None,
    samples: int = 200,
    coalitions: Tensor | None = None,
    seed: Seed = 0,
    layer: str | Layer = "",
    output: Output = None,
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
) -> Any:
    r"""Estimate Shapley values as the best additive model of the score over coalitions.

    .. math:: \min_a \sum_S \pi(S) \Big( v(S) - v(\emptyset) - \sum_{i \in S} a_i \Big)^2, \quad
              \pi(S) = \frac{n - 1}{\binom{n}{|S|} |S| (n - |S|)}

    under the condition that attributions add up to the difference in score between x and the baseline. With as many
    samples as there are coalitions, all are run, and the values are exact; otherwise coalitions are drawn by
    :math:`\pi`, each with its complement, and count alike. Costs `samples` forwards at most, and two.

    Args:
        params, model, x, target, features, baseline, layer, output: See `feature_ablation`.
        samples: Number of coalitions.
        coalitions: ``[sample feature]``, boolean, to be used instead: drawn by :math:`\pi`.
        seed: Integer, or an integer tensor ``[]`` (for `vmap` over seeds).
        chunk_size: Coalitions evaluated together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (coalitions done, coalitions in all).

    Returns:
        Signed, with the structure and shape of `x` or of the layer's activation, in units of the score.

    Raises:
        ValueError: If `samples` is less than 1, or `coalitions` do not fit the features.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> x = torch.rand(4, 3)
        >>> torch.allclose(kernel_shap({}, model, x, 0), shapley_values({}, model, x, 0), atol=1e-5)
        True

    Reference:
        Lundberg & Lee, A Unified Approach to Interpreting Model Predictions, 2017, sec. 4.1. Covert & Lee, Improving
        KernelSHAP, 2021, for the complements.
    """
    at_least("samples", samples)
    masked = MaskedModel(params, model, x, target, layer=layer, output=output)
    groups = FeatureGroups(masked, feature_mask, baseline)
    n = groups.count
    if coalitions is None:
        shown, weight = weighted_coalitions(n, samples, seed, masked.device)
    else:
        shown = checked_coalitions(coalitions, n, masked.device)
        weight = torch.ones(len(shown), dtype=torch.float64, device=masked.device)
    ends = torch.tensor([[False], [True]], device=masked.device).expand(2, n)
    run = torch.cat([ends, shown])
    values = groups.scores(len(run), lambda part: groups.kept(run[part.start : part.stop]), chunk_size, progress)
    none, whole, v, z = values[0].double(), values[1].double(), values[2:].double(), shown.double()
    # the last feature has what the others leave of the difference
    rows = z[:, :-1] - z[:, -1:]
    first = least_squares(rows, v - none - z[:, -1:] * (whole - none), weight)  # [feature batch]
    last = whole - none - first.sum(0)
    return groups.laid_out(torch.cat([first, last[None]]).to(values.dtype).T)
