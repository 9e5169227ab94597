"""Coalitions of features, and the least squares over them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pullback._torch.internals import eye
from pullback._torch.random import Seed, uniform


def random_ranks(seed: Seed, samples: Tensor, count: int, stream: int = 0) -> Tensor:
    """Give random orders as the rank of each feature, ``[sample feature]``."""
    return uniform(seed, samples, (count,), torch.float32, stream).argsort(dim=1, stable=True).argsort(1)


def every_coalition(numbers: range, count: int, device: torch.device) -> Tensor:
    """Give the coalitions whose features are the bits of numbers, ``[number feature]``."""
    number = torch.arange(numbers.start, numbers.stop, device=device)
    return (number[:, None] >> torch.arange(count, device=device)) & 1 == 1


def weighted_coalitions(count: int, samples: int, seed: Seed, device: torch.device) -> tuple[Tensor, Tensor]:
    """Give all coalitions but the first and the last with their weights, where they are few, or draw some by weight."""
    if count < 30 and 2**count - 2 <= samples:
        shown = every_coalition(range(1, 2**count - 1), count, device)
        kernel = [0.0, *((count - 1) / (math.comb(count, s) * s * (count - s)) for s in range(1, count))]
        return shown, torch.tensor(kernel, dtype=torch.float64, device=device)[shown.sum(1)]
    sizes = torch.tensor([1 / (s * (count - s)) for s in range(1, count)], dtype=torch.float64, device=device)
    sample = torch.arange(samples, device=device)
    draw = uniform(seed, sample // 2, (1,), torch.float64, stream=1)
    size = 1 + (draw > sizes.cumsum(0) / sizes.sum()).sum(1, keepdim=True).clamp(max=count - 2)
    shown = (random_ranks(seed, sample // 2, count) < size) ^ (sample[:, None] % 2 == 1)
    return shown, torch.ones(samples, dtype=torch.float64, device=device)


def least_squares(rows: Tensor, values: Tensor, weight: Tensor, ridge: float = 0.0) -> Tensor:
    """Solve weighted least squares ``[sample feature]``, ``[sample batch]`` -> ``[feature batch]``."""
    weighted = rows * weight[:, None]
    gram = weighted.T @ rows
    if ridge:
        gram = gram + ridge * eye(len(gram), gram)
    return torch.linalg.pinv(gram, hermitian=True) @ (weighted.T @ values)


def checked_coalitions(coalitions: Tensor, count: int, device: torch.device) -> Tensor:
    if coalitions.ndim != 2 or coalitions.shape[1] != count:
        raise ValueError(f"`coalitions` must be [sample {count}], a column a feature, got {list(coalitions.shape)}.")
    return coalitions.to(device) != 0
