"""Metrics as their papers define them: loops over examples, pixels, steps, segments and draws, in float64.

`score` takes ``[1 channel height width]`` and gives a number; maps are ``[height width]``, masks lists of pixels.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Score = Callable[[Tensor], float]
Pixel = tuple[int, ...]


def in_order(map: Tensor) -> list[Pixel]:
    """The pixels from the highest on; equal ones in reading order."""
    places = [tuple(place) for place in torch.ones_like(map).nonzero().tolist()]
    return sorted(places, key=lambda place: (-float(map[place]), place))


def on_object(mask: Tensor) -> set[Pixel]:
    return {tuple(place) for place in mask.nonzero().tolist()}


def energy(map: Tensor, mask: Tensor) -> float:
    inside = sum(max(float(map[p]), 0.0) for p in on_object(mask))
    total = sum(max(float(v), 0.0) for v in map.flatten())
    return inside / total if on_object(mask) and total else math.nan


def mass(map: Tensor, mask: Tensor) -> float:
    total = sum(float(v) for v in map.flatten())
    return sum(float(map[p]) for p in on_object(mask)) / total if on_object(mask) and total else math.nan


def rank(map: Tensor, mask: Tensor) -> float:
    target = on_object(mask)
    return len(target & set(in_order(map)[: len(target)])) / len(target) if target else math.nan


def top_k(map: Tensor, mask: Tensor, k: int) -> float:
    return len(on_object(mask) & set(in_order(map)[:k])) / k if on_object(mask) else math.nan


def iou(map: Tensor, mask: Tensor, area: float | None) -> float:
    target = on_object(mask)
    size = len(target) if area is None else max(1, round(area * map.numel()))
    top = set(in_order(map)[:size])
    return len(target & top) / len(target | top) if target else math.nan


def trapezoids(places: Sequence[float], values: Sequence[float]) -> float:
    return sum((b - a) * (u + v) / 2 for a, b, u, v in zip(places, places[1:], values, values[1:]))


def painted(mask_axes: Tensor, paint: Tensor, pixels: Sequence[Pixel]) -> Tensor:
    """The canvas ``[1 channel height width]`` with some pixels of the paint."""
    image = mask_axes.clone()
    for place in pixels:
        image[(0, slice(None), *place)] = paint[(0, slice(None), *place)]
    return image


def way(score: Score, start: Tensor, end: Tensor, map: Tensor, steps: int) -> tuple[list[float], list[float]]:
    """Shares and scores from one image to the other, from the highest pixel on."""
    order, count = in_order(map), map.numel()
    steps = min(steps, count)
    sizes = [step * count // steps for step in range(steps + 1)]
    return [n / count for n in sizes], [score(painted(start, end, order[:n])) for n in sizes]


def irof(score: Score, x: Tensor, paint: Tensor, map: Tensor, segments: Tensor) -> float:
    names = sorted(set(segments.flatten().tolist()))
    means = {name: float(map[segments == name].mean()) for name in names}
    image, curve = x.clone(), [1.0]
    for name in sorted(names, key=lambda name: (-means[name], name)):
        image = painted(image, paint, [tuple(p) for p in (segments == name).nonzero().tolist()])
        curve.append(score(image) / score(x))
    return 1 - trapezoids([n / len(names) for n in range(len(names) + 1)], curve)


def filled_in(image: Tensor, gone: set[Pixel]) -> Tensor:
    """Each missing pixel the weighted mean of its neighbours, as one dense system a channel."""
    channels, height, width = image.shape
    places = sorted(gone)
    matrix, right = np.zeros((len(places),) * 2), np.zeros((len(places), channels))
    for n, (i, j) in enumerate(places):
        for di in (-1, 0, 1):
            for dj in (-1, 0, 1):
                q = (i + di, j + dj)
                if (di, dj) == (0, 0) or not (0 <= q[0] < height and 0 <= q[1] < width):
                    continue
                weight = 1 / 12 if di and dj else 1 / 6
                matrix[n, n] += weight
                if q in gone:
                    matrix[n, places.index(q)] -= weight
                else:
                    right[n] += weight * image[(slice(None), *q)].numpy()
    whole = image.clone()
    for place, value in zip(places, np.linalg.solve(matrix, right)):
        whole[(slice(None), *place)] = torch.from_numpy(value)
    return whole


def road(score: Score, x: Tensor, map: Tensor, shares: Sequence[float], least_first: bool) -> float:
    order = in_order(-map if least_first else map)
    return sum(score(filled_in(x[0], set(order[: int(s * len(order))]))[None]) for s in shares) / len(shares)


def bits(image: Tensor, low: float, high: float) -> float:
    """The entropy of what the median predictor misses, pixel by pixel."""
    total = 0.0
    for channel in image:
        levels = [[min(max(round((float(v) - low) / (high - low) * 255), 0), 255) for v in row] for row in channel]
        missed: Counter[int] = Counter()
        for i, row in enumerate(levels):
            for j, value in enumerate(row):
                west = levels[i][j - 1] if j else 0
                north = levels[i - 1][j] if i else 0
                corner = levels[i - 1][j - 1] if i and j else 0
                predicted = sorted((west, north, west + north - corner))[1]
                missed[(value - predicted) % 256] += 1
        count = channel.numel()
        total += count * -sum(n / count * math.log2(n / count) for n in missed.values())
    return total


def information(performance: Score, x: Tensor, blurred: Tensor, map: Tensor, shares: Sequence[float]) -> float:
    """The area under the performance over the information, points in order of it, the highest performance so far."""
    low, high = float(x.min()), float(x.max())
    order, points = in_order(map), []
    hidden, whole = bits(blurred[0], low, high), bits(x[0], low, high)
    for share in (0.0, *shares, 1.0):
        image = painted(blurred, x, order[: round(share * map.numel())])
        content = (bits(image[0], low, high) - hidden) / (whole - hidden)
        points.append((min(max(content, 0.0), 1.0), performance(image)))
    points.sort(key=lambda point: point[0])
    best = [max(value for _, value in points[: n + 1]) for n in range(len(points))]
    return trapezoids([content for content, _ in points], best)


def gini(values: Sequence[float]) -> float:
    """By the mean absolute difference of all pairs."""
    sizes = [abs(v) for v in values]
    return sum(abs(u - v) for u in sizes for v in sizes) / (2 * len(sizes) * sum(sizes))


def entropy(values: Sequence[float]) -> float:
    total = sum(abs(v) for v in values)
    return -sum(abs(v) / total * math.log(abs(v) / total) for v in values if v)


def mean_ranks(values: Sequence[float]) -> list[float]:
    return [sum(u < v for u in values) + (sum(u == v for u in values) - 1) / 2 for v in values]


def pearson(a: Sequence[float], b: Sequence[float]) -> float:
    if len(set(a)) == 1 or len(set(b)) == 1:
        return 0.0
    u, v = ([value - sum(values) / len(values) for value in values] for values in (a, b))
    product = sum(p * q for p, q in zip(u, v))
    return product / math.sqrt(sum(p * p for p in u) * sum(q * q for q in v))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    return pearson(mean_ranks(a), mean_ranks(b))
