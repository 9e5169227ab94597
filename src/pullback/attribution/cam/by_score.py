"""Weights from forwards alone: the score of the input behind a channel's mask, or without the channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from pullback import maps
from pullback._core.batching import chunks, report
from pullback._core.call import Call
from pullback._core.entry import method
from pullback._core.inputs import folded, repeated, unfolded
from pullback._core.targets import score
from pullback._core.types import Inputs, Layer, Model, Output, Params, Progress, Target
from pullback._torch.random import Seed, normal
from pullback.attribution.cam._channels import Tokens, gridded, ratio, read_channels
from pullback.rules._table import Rules, table_of


def _scores_of(
    batch: int,
    target: Target,
    count: int,
    chunk_size: int | None,
    progress: Progress,
    scored: Callable[[Sequence[int], Target], Tensor],
) -> Tensor:
    """Score variations of the model or its input, `chunk_size` at a time, ``[variation batch]``.

    `scored(indices, target)` gives scores ``[(variation batch)]`` for the target of each copy.
    """
    parts = []
    for part in chunks(count, chunk_size):
        parts.append(unfolded(scored(part, repeated(target, len(part), batch)), len(part)))
        report(progress, part.stop, count)
    return torch.cat(parts)


def _channel_masks(activation: Tensor, x: Tensor) -> Tensor:
    """Scale each channel to [0, 1] and to the size of `x`, ``[batch channel ...]``."""
    flat = activation.flatten(0, 1).unsqueeze(1)
    masks = maps.normalise(maps.resize(flat, x.shape[2:]) if flat.shape[2:] != x.shape[2:] else flat)
    return masks.squeeze(1).unflatten(0, activation.shape[:2])


def _scored_masks(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    layer: str | Layer,
    tokens: Tokens,
    output: Output,
    samples: int,
    chunk_size: int | None,
    progress: Progress,
    vary: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Weight channels by the softmax of the mean score of the input behind variations of their masks.

    `vary(x, masks, sample)` gives inputs ``[variation batch ...]`` for masks ``[variation batch 1 ...]`` and sample
    indices ``[variation]``.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"`x` must be one tensor, which masks can cover, got {type(x).__name__}.")
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1, got {samples}.")
    activation = read_channels(params, model, x, layer, tokens)
    if activation.ndim != x.ndim:
        raise ValueError(
            f"`layer` must have the spatial axes of `x`, {list(x.shape)}, to mask it; its activation is "
            f"{list(activation.shape)}."
        )

    def scored(indices: Sequence[int], targets: Target) -> Tensor:
        index = torch.tensor(list(indices), device=x.device)
        masks = _channel_masks(activation[:, index // samples], x).movedim(1, 0).unsqueeze(2)
        varied = Call.bind(params, model, folded(vary(x, masks, index % samples)), output=output)
        return score(varied.forward(), targets)

    scores = _scores_of(x.shape[0], target, activation.shape[1] * samples, chunk_size, progress, scored)
    weights = scores.unflatten(0, (-1, samples)).mean(1).softmax(0)
    return maps.weighted_sum(activation, weights.mT).clamp(min=0)


@method("cam", "map", "positions at the layer", "one tensor", forwards=lambda o: 1 + o["channels"], mechanism="formula")
def score_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    tokens: Tokens = None,
    chunk_size: int | None = 32,
    progress: Progress = None,
    output: Output = None,
) -> Tensor:
    r"""Weight a layer's channels by the score of the input as each of them masks it.

    .. math:: m = \max\Big(0, \sum_c w_c A_c\Big), \quad
              w = \operatorname{softmax}_c f_t(x \odot \operatorname{norm}(A_c))

    with each channel scaled to the input's size, then to [0, 1]. The paper takes off the score of a baseline, which the
    softmax does not see. No gradient, but as many forwards as the layer has channels; all targets share them under
    `vmap`.

    Args:
        params, model, x, target, layer, tokens, output: See `grad_cam`; `x` is one tensor.
        chunk_size: Masks scored together; `None` means all.
        progress: Called with (masks done, masks in all).

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, not negative.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> m = score_cam(params, model, x, 0, layer="0")  # a single channel has all the weight
        >>> torch.allclose(m, model[0](x).clamp(min=0), atol=1e-6)
        True

    Reference:
        Wang et al., Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks, 2020, alg. 1.
    """

    def vary(x: Tensor, masks: Tensor, sample: Tensor) -> Tensor:
        return masks * x

    return _scored_masks(params, model, x, target, layer, tokens, output, 1, chunk_size, progress, vary)


@method(
    "cam",
    "map",
    "positions at the layer",
    "one tensor",
    small={"samples": 2, "noise": 0.5},
    forwards=lambda o: 1 + o["samples"] * o["channels"],
    mechanism="formula",
)
def ss_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    tokens: Tokens = None,
    samples: int = 10,
    noise: float = 2.0,
    place: Literal["mask", "input"] = "mask",
    seed: Seed = 0,
    chunk_size: int | None = 32,
    progress: Progress = None,
    output: Output = None,
) -> Tensor:
    r"""Weight a layer's channels as Score-CAM does, by the mean score over noisy masks.

    .. math:: w = \operatorname{softmax}_c \tfrac{1}{n} \sum_s f_t\big(x \odot (\operatorname{norm}(A_c) + \sigma
              \epsilon_s)\big)

    The paper's other form adds the noise to the masked input: ``place="input"``. All channels see the same noise. Costs
    as many forwards as the layer has channels, times `samples`.

    Args:
        params, model, x, target, layer, tokens, chunk_size, progress, output: See `score_cam`.
        samples: Noisy masks a channel.
        noise: Standard deviation, in units of the mask, or of the input.
        place: ``"mask"`` or ``"input"``.
        seed: See `smooth_grad`.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, not negative.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> m = ss_cam(params, model, x, 0, layer="0", noise=0.0)
        >>> torch.allclose(m, score_cam(params, model, x, 0, layer="0"), atol=1e-5)
        True

    Reference:
        Wang, Naidu, Michael & Kundu, SS-CAM: Smoothed Score-CAM for Sharper Visual Feature Localization, 2020, sec. 3.
    """
    if place not in ("mask", "input"):
        raise ValueError(f"`place` must be 'mask' or 'input', got {place!r}.")

    def vary(x: Tensor, masks: Tensor, sample: Tensor) -> Tensor:
        if place == "mask":
            return (masks + noise * normal(seed, sample, masks.shape[2:], masks.dtype).unsqueeze(1)) * x
        covered = masks * x
        return covered + noise * normal(seed, sample, covered.shape[2:], covered.dtype).unsqueeze(1)

    return _scored_masks(params, model, x, target, layer, tokens, output, samples, chunk_size, progress, vary)


@method(
    "cam",
    "map",
    "positions at the layer",
    "one tensor",
    small={"samples": 2},
    forwards=lambda o: 1 + o["samples"] * o["channels"],
    mechanism="formula",
)
def is_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    tokens: Tokens = None,
    samples: int = 10,
    chunk_size: int | None = 32,
    progress: Progress = None,
    output: Output = None,
) -> Tensor:
    r"""Weight a layer's channels as Score-CAM does, by the mean score over masks of growing strength.

    .. math:: w = \operatorname{softmax}_c \tfrac{1}{n} \sum_{i=1}^n
              f_t\Big(\sum_{j=1}^i \tfrac{j}{n} \, x \odot \operatorname{norm}(A_c)\Big)

    The steps add up, as in the paper, so that late masks exceed 1. Costs as many forwards as the layer has channels,
    times `samples`.

    Args:
        params, model, x, target, layer, tokens, chunk_size, progress, output: See `score_cam`.
        samples: Strengths of each mask.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, not negative.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> m = is_cam(params, model, x, 0, layer="0", samples=1)  # one strength, which is 1
        >>> torch.allclose(m, score_cam(params, model, x, 0, layer="0"), atol=1e-5)
        True

    Reference:
        Naidu, Ghosh, Maurya, Nayak & Kundu, IS-CAM: Integrated Score-CAM for Axiomatic-based Explanations, 2020.
    """

    def vary(x: Tensor, masks: Tensor, sample: Tensor) -> Tensor:
        strength = ((sample + 1) * (sample + 2) / (2 * samples)).to(masks.dtype)
        return strength.reshape(-1, *[1] * (masks.ndim - 1)) * masks * x

    return _scored_masks(params, model, x, target, layer, tokens, output, samples, chunk_size, progress, vary)


@method("cam", "map", "positions at the layer", forwards=lambda o: 1 + o["channels"], mechanism="formula")
def ablation_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    tokens: Tokens = None,
    chunk_size: int | None = 32,
    progress: Progress = None,
    rules: Rules = None,
    output: Output = None,
) -> Tensor:
    r"""Weight a layer's channels by how much the score falls without them.

    .. math:: m = \max\Big(0, \sum_c \frac{f_t(A) - f_t(A \text{ without } A_c)}{f_t(A)} A_c\Big)

    The divisor is the score of the input, which turns the sign where that is negative; a score of 0 gives no weight.
    As many forwards as the layer has channels, and one; all targets share them under `vmap`.

    Args:
        params, model, x, target, layer, tokens, rules, output: See `grad_cam`.
        chunk_size: Channels left out together; `None` means all.
        progress: Called with (channels done, channels in all).

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, not negative.

    Raises:
        ValueError: If the layer is called several times.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> share = model[0](x).mean((2, 3)) * model[3].weight[0] / model(x)[:, :1]  # of each channel in the score
        >>> m = torch.einsum("bc,bchw->bhw", share, model[0](x)).clamp(min=0)
        >>> torch.allclose(ablation_cam(params, model, x, 0, layer="0")[:, 0], m, atol=1e-4)
        True

    Reference:
        Desai & Ramaswamy, Ablation-CAM: Visual Explanations for Deep Convolutional Network via Gradient-free
        Localization, 2020, eq. 3.
    """
    call = Call.bind(params, model, x, layer, table_of(rules), output)
    whole = call.pullback()
    activation, *more = whole.activations
    if more:
        raise ValueError(f"`layer` names `{layer}`, called {1 + len(more)} times: choose a call, such as `{layer}#0`.")
    laid_out, batch = gridded(activation, x, tokens), activation.shape[0]
    axis = 1 if laid_out is activation else activation.ndim - 1  # tokens have their channels last

    def scored(indices: Sequence[int], targets: Target) -> Tensor:
        index = torch.tensor(list(indices), device=activation.device)
        kept = (torch.arange(activation.shape[axis], device=index.device) != index[:, None]).to(activation.dtype)
        kept = kept.reshape(len(index), 1, *[-1 if k == axis else 1 for k in range(1, activation.ndim)])
        return score(call.at([kept * activation]).pullback().output, targets)

    without = _scores_of(batch, target, laid_out.shape[1], chunk_size, progress, scored)
    before = score(whole.output, target)
    weights = ratio(before - without, before.expand_as(without))
    return maps.weighted_sum(laid_out, weights.mT).clamp(min=0)
