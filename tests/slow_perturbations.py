"""Perturbation methods as their papers define them: loops over pixels, windows, subsets and orders."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Game = Callable[[Sequence[int]], Tensor]


def occlusion(score: Callable[[Tensor], Tensor], x: Tensor, window: int, stride: int, baseline: float) -> Tensor:
    """The mean fall of the score over the windows that cover a pixel, window after window."""
    height, width = x.shape[2:]
    total, covered = torch.zeros(len(x), 1, height, width, dtype=x.dtype), torch.zeros(height, width, dtype=x.dtype)
    for top in range(0, max(height - window, 0) + stride, stride):
        for left in range(0, max(width - window, 0) + stride, stride):
            changed = x.clone()
            changed[:, :, top : top + window, left : left + window] = baseline
            total[:, 0, top : top + window, left : left + window] += (score(x) - score(changed))[:, None, None]
            covered[top : top + window, left : left + window] += 1
    return total / covered


def shapley(game: Game, count: int) -> list[Tensor]:
    """The mean gain over all orders."""
    gains = [torch.zeros_like(game([])) for _ in range(count)]
    for order in itertools.permutations(range(count)):
        for k, i in enumerate(order):
            gains[i] = gains[i] + game(order[: k + 1]) - game(order[:k])
    return [gain / math.factorial(count) for gain in gains]


def enlarged(grid: Tensor, row: float, column: float, scale: tuple[int, int]) -> float:
    """A grid that is reflected at its border, read linearly at a pixel of its enlargement."""
    rows, columns = grid.shape
    border = torch.zeros(rows + 2, columns + 2, dtype=grid.dtype)
    for i in range(rows + 2):
        for j in range(columns + 2):
            a = 1 if i == 0 else rows - 2 if i == rows + 1 else i - 1
            b = 1 if j == 0 else columns - 2 if j == columns + 1 else j - 1
            border[i, j] = grid[a, b]
    y, x = (row + 0.5) / scale[0] - 0.5, (column + 0.5) / scale[1] - 0.5
    top, left = math.floor(y), math.floor(x)
    value = 0.0
    for i, wy in ((top, 1 - (y - top)), (top + 1, y - top)):
        for j, wx in ((left, 1 - (x - left)), (left + 1, x - left)):
            if wy * wx:
                value += wy * wx * float(border[i, j])
    return value


def grid_mask(grid: Tensor, shift: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """One mask of RISE, pixel after pixel."""
    cells = grid.shape
    cell = [math.ceil(n / c) for n, c in zip(size, cells)]
    scale = tuple(math.ceil((n + k) / c) for n, k, c in zip(size, cell, cells))
    rows = [
        [enlarged(grid, scale[0] + shift[0] + i, scale[1] + shift[1] + j, scale) for j in range(size[1])]  # type: ignore[arg-type]
        for i in range(size[0])
    ]
    return torch.tensor(rows, dtype=grid.dtype)


def smooth_mask(parameters: Tensor, size: tuple[int, int], step: int, sigma: float, coldness: float) -> Tensor:
    """One mask of extremal perturbations: the softened maximum over the parameters around each pixel's block."""
    radius = 1 + math.ceil(sigma / step)
    padding = 1 + math.ceil(2 * sigma / step)
    mask = torch.zeros(size, dtype=parameters.dtype)
    for i, j in itertools.product(*map(range, size)):
        u = (i + round(sigma), j + round(sigma))
        values = []
        for a, b in itertools.product(range(2 * radius + 1), repeat=2):
            k, l = u[0] // step + a - padding, u[1] // step + b - padding
            inside = 0 <= k < parameters.shape[0] and 0 <= l < parameters.shape[1]
            distance = math.dist(u, (sigma + step * k, sigma + step * l))
            weight = math.exp(-2 * max(distance / sigma - 0.5, 0) ** 2)
            values.append(float(parameters[k, l]) * weight if inside else 0.0)
        heats = [math.exp(coldness * v) for v in values]
        mask[i, j] = sum(v * h for v, h in zip(values, heats)) / sum(heats)
    return mask


def ridge(rows: Tensor, values: Tensor, weight: Tensor, penalty: float) -> Tensor:
    """Weighted ridge regression with a free intercept, as one stacked least-squares problem."""
    count = rows.shape[1]
    design = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1) * weight.sqrt()[:, None]
    penalties = math.sqrt(penalty) * torch.eye(count, count + 1, dtype=rows.dtype)
    target = torch.cat([values * weight.sqrt(), torch.zeros(count, dtype=rows.dtype)])
    return torch.linalg.lstsq(torch.cat([design, penalties]), target[:, None]).solution[:count, 0]
