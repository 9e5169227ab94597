"""Path methods as their papers define them: loops, full Jacobians, one example at a time. Shares no code with src."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import slow
import torch
from torch import Tensor

Call = Callable[[Tensor], Tensor]


def gauss(steps: int) -> list[tuple[float, float]]:
    """Nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return [(float(n + 1) / 2, float(w) / 2) for n, w in zip(nodes, weights, strict=True)]


def rule(name: str, steps: int) -> list[tuple[float, float]]:
    """Nodes and weights of the named rule."""
    if name == "gauss_legendre":
        return gauss(steps)
    if name == "trapezoid":
        return [(k / (steps - 1), (0.5 if k in (0, steps - 1) else 1) / (steps - 1)) for k in range(steps)]
    return [((k + {"riemann_left": 0, "riemann_middle": 0.5, "riemann_right": 1}[name]) / steps, 1 / steps) for k in
            range(steps)]  # fmt: skip


def along_path(
    call: Call, path: Callable[[float], Tensor], target: object, nodes: Sequence[tuple[float, float]]
) -> Tensor:
    """Any path: weight times gradient times velocity, the velocity by differences."""
    total = torch.zeros_like(path(0.0))
    for alpha, weight in nodes:
        velocity = slow.derivative(lambda t: path(float(t)), torch.tensor(alpha, dtype=torch.float64), 1e-3)
        total += weight * velocity * slow.gradient(call, path(alpha), target)
    return total


def blur(image: Tensor, sigma: float, reach: int) -> Tensor:
    """Gaussian of sigma pixels over an image whose border is repeated, by one matrix for each side."""
    if sigma == 0:
        return image

    def matrix(size: int) -> Tensor:
        result = torch.zeros(size, size, dtype=torch.float64)
        weights = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(-reach, reach + 1)]
        for i in range(size):
            for k, weight in zip(range(-reach, reach + 1), weights, strict=True):
                result[i, min(max(i + k, 0), size - 1)] += weight / sum(weights)
        return result

    return matrix(image.shape[-2]) @ image @ matrix(image.shape[-1]).T


def idgi(call: Call, points: Sequence[Tensor], target: object) -> Tensor:
    """Yang, Wang & Bilgic 2023: each step's change of the score, shared out by the squared gradient at its start."""
    total = torch.zeros_like(points[0])
    for here, there in itertools.pairwise(points):
        g = slow.gradient(call, here, target)
        before, after = (slow.scores(call(p), target) for p in (here, there))
        for i in range(len(g)):
            norm = float((g[i] ** 2).sum())
            if norm > 0:
                total[i] += (g[i] ** 2) / norm * (after[i] - before[i]).item()
    return total


def guided(
    call: Call, x: Tensor, baseline: Tensor, target: int, steps: int, fraction: float, max_distance: float
) -> Tensor:
    """Kapishnikov et al. 2021, algorithm 1, one example at a time and one group of features after the other."""
    rows = []
    for end, start in zip(x, baseline, strict=True):
        shape, end, start = end.shape, end.flatten(), start.flatten()
        point, total, way = start.clone(), torch.zeros_like(start), end - start
        whole = float(way.abs().sum())
        size = math.floor(fraction * (len(end) - 1)) + 1
        for k in range(1, steps + 1):
            slope = slow.gradient(call, point.reshape(1, *shape), target).flatten()
            behind = start + max(k / steps - max_distance, 0) * way
            ahead = start + min(k / steps + max_distance, 1) * way
            moved = point.clone()
            for i in range(len(end)):
                if way[i] != 0 and (point[i] - start[i]) / way[i] < max(k / steps - max_distance, 0):
                    moved[i] = behind[i]
            due = float((end - moved).abs().sum()) - whole * (1 - k / steps)
            free = sorted(
                (i for i in range(len(end)) if (ahead[i] - moved[i]) * way[i] > 0), key=lambda i: float(slope[i].abs())
            )
            while due > 1e-12 and free:
                group, free = free[:size], free[size:]
                while free and abs(float(slope[free[0]].abs() - slope[group[-1]].abs())) < 1e-12:
                    group.append(free.pop(0))
                room = sum(float((ahead[i] - moved[i]).abs()) for i in group)
                share = min(due / room, 1.0)
                for i in group:
                    moved[i] = moved[i] + share * (ahead[i] - moved[i])
                due -= share * room
            total += (moved - point) * slope
            point = moved
        rows.append(total.reshape(shape))
    return torch.stack(rows)


def conductance(
    lower: Callable[[Tensor], Tensor], upper: Call, x: Tensor, baseline: Tensor, target: int, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Dhamdhere et al. 2019 by full Jacobians, for one example: influence, conductance of neurons, and of pairs."""
    influence = pairs = torch.zeros(())
    for alpha, weight in gauss(steps):
        place = baseline + alpha * (x - baseline)
        jacobian = torch.autograd.functional.jacobian(lambda v: lower(v[None])[0].flatten(), place).flatten(1)
        slope = slow.gradient(upper, lower(place[None]).detach(), target)[0].flatten()
        influence = influence + weight * slope
        pairs = pairs + weight * slope[:, None] * jacobian * (x - baseline).flatten()
    return influence, pairs.sum(1), pairs


def word_path(x: Tensor, baseline: Tensor, words: Tensor, steps: int, neighbours: int, strategy: str) -> list[Tensor]:
    """Sanyal & Ren 2021 for one token: at each step to the best neighbour of the word before, made monotonic."""
    points, anchor = [x], x
    for left in range(steps, 1, -1):
        here = points[-1]
        order = sorted(range(len(words)), key=lambda w: float((words[w] - anchor).norm()))[1 : neighbours + 1]
        best = None
        for w in order:
            form, count = words[w].clone(), 0
            for c in range(len(form)):
                low, high = sorted((float(here[c]), float(baseline[c])))
                if low <= form[c] <= high:
                    count += 1
                else:
                    form[c] = here[c] + (baseline[c] - here[c]) / left
            cost = float((form - words[w]).norm()) if strategy == "greedy" else -count
            if best is None or cost < best[0]:
                best = (cost, form, words[w])
        assert best is not None
        points.append(best[1])
        anchor = best[2]
    return [*points, baseline]


def trapezoid_over(call: Call, points: Sequence[Tensor], target: object) -> Tensor:
    """From the first point to the last: half the gradients at both ends of each step, times the step back."""
    total = torch.zeros_like(points[0])
    slopes = [slow.gradient(call, point, target) for point in points]
    for k in range(len(points) - 1):
        total += (slopes[k] + slopes[k + 1]) / 2 * (points[k] - points[k + 1])
    return total


def integrated_hessians(score: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, steps: int) -> Tensor:
    """Janizek, Sturmfels & Lee 2021, eqs. 6 and 7, for one example: second and, on the diagonal, first derivatives."""
    way = x - baseline
    total = torch.zeros(x.numel(), x.numel(), dtype=x.dtype)
    for alpha, weight_a in gauss(steps):
        for beta, weight_b in gauss(steps):
            place = baseline + alpha * beta * way
            hessian = torch.autograd.functional.hessian(score, place).reshape(x.numel(), x.numel())
            slope = torch.autograd.functional.jacobian(score, place).flatten()
            total += weight_a * weight_b * alpha * beta * hessian * way.flatten()[:, None] * way.flatten()
            total += weight_a * weight_b * torch.diag(slope * way.flatten())
    return total
