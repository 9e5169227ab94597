"""Class activation maps as their papers define them, one channel at a time. Shares no code with src."""

import math
from collections.abc import Callable

import slow
import torch
from torch import Tensor, nn


def _weighted(weights: list[float], activation: Tensor) -> Tensor:
    return sum((w * a for w, a in zip(weights, activation, strict=True)), torch.zeros_like(activation[0]))


def xgrad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    weights = [float((a * g).sum() / a.sum()) for a, g in zip(activation, gradient, strict=True)]
    return _weighted(weights, activation).clamp(min=0)


def plus_plus_weight(activation: Tensor, first: Tensor, second: Tensor, third: Tensor) -> float:
    """One channel's weight from the derivatives at its positions."""
    total = 0.0
    mass = float(activation.sum())
    for g1, g2, g3 in zip(first.flatten(), second.flatten(), third.flatten(), strict=True):
        below = 2 * float(g2) + mass * float(g3)
        total += (float(g2) / below if below else 0.0) * max(float(g1), 0.0)
    return total


def grad_cam_plus_plus(activation: Tensor, gradient: Tensor) -> Tensor:
    weights = [plus_plus_weight(a, g, g**2, g**3) for a, g in zip(activation, gradient, strict=True)]
    return _weighted(weights, activation).clamp(min=0)


def hires_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    return sum(a * g for a, g in zip(activation, gradient, strict=True)).clamp(min=0)  # type: ignore[union-attr]


def elementwise_grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    return sum((a * g).clamp(min=0) for a, g in zip(activation, gradient, strict=True))  # type: ignore[return-value]


def layer_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    parts = [torch.where(g > 0, g, 0) * a for a, g in zip(activation, gradient, strict=True)]
    return sum(parts).clamp(min=0)  # type: ignore[union-attr]


def eigen(features: Tensor) -> Tensor:
    """The projection on the first principal component over positions, its largest entry positive."""
    rows = features.flatten(1).T
    rows = rows - rows.mean(0)
    projected = rows @ torch.linalg.svd(rows, full_matrices=False).Vh[0]
    projected = projected * projected[projected.abs().argmax()].sign()
    return projected.reshape(features.shape[1:])


def masked_scores(
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    activation: Tensor,
    target: int,
    variations: list[Callable[[Tensor, Tensor], Tensor]],
) -> Tensor:
    """Score-CAM and its kin, for one example: the softmax over channels of the mean score behind varied masks."""
    scores = []
    for a in activation:
        mask = slow.resize(a, tuple(x.shape[1:])) if a.shape != x.shape[1:] else a  # type: ignore[arg-type]
        mask = (mask - mask.min()) / (mask.max() - mask.min())
        seen = [call(vary(x, mask)[None])[0, target].item() for vary in variations]
        scores.append(sum(seen) / len(seen))
    top = sum(math.exp(s) for s in scores)
    return _weighted([math.exp(s) / top for s in scores], activation).clamp(min=0)


def ablation_cam(
    model: nn.Module,
    call: Callable[[nn.Module, Tensor], Tensor],
    x: Tensor,
    activation: Tensor,
    target: int,
    layer: str,
) -> Tensor:
    """For one example: how much the score falls when a hook puts one channel to 0."""
    whole = call(model, x[None])[0, target].item()
    weights = []
    for c in range(len(activation)):

        def without(module: nn.Module, args: object, out: Tensor, c: int = c) -> Tensor:
            out = out.clone()
            out[:, c] = 0
            return out

        handle = model.get_submodule(layer).register_forward_hook(without)
        weights.append((whole - call(model, x[None])[0, target].item()) / whole)
        handle.remove()
    return _weighted(weights, activation).clamp(min=0)
