"""Is a map where the object is? Maps against masks of objects.

The functions take maps, ``[batch 1 height width]``, and masks, ``[batch height width]``, of any number of spatial axes
from 1 to 3, and know no method and no model. The mean over the examples of a class is what papers report for the class.
Where an object is absent (its mask is empty) and where a map holds NaN there is nothing to measure: the result is NaN,
or False for the pointing game.

Chance, where it is quoted, is the expectation for a map of independent random values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pullback._core.batching import wide
from pullback.metrics._ranks import pixels, ranks, voided


def peak(map: Tensor) -> Tensor:
    """Give the place of the largest value of each map, (column, row), ``[batch 2]``; the first of several.

    Example:
        >>> peak(torch.arange(6.0).reshape(1, 1, 2, 3))
        tensor([[2, 1]])
    """
    place = map.flatten(1).argmax(1)
    width = map.shape[-1]
    return torch.stack((place % width, torch.div(place, width, rounding_mode="floor")), -1)


def pointing_hits(points: Tensor, masks: Tensor, *, tolerance: float = 15.0) -> Tensor:
    r"""Tell which points lie on their object, or close to it.

    .. math:: \min_{p \in \text{object}} \lVert p - \text{point} \rVert < \text{tolerance}

    The comparison is strict: a tolerance of 0 never hits.

    Args:
        points: (column, row), ``[batch 2]``.
        masks: The objects, ``[batch height width]``, bool.
        tolerance: In pixels.

    Returns:
        ``[batch]``, bool; False where the mask is empty.

    Raises:
        ValueError: If `masks` are not of one size for each point.

    Example:
        >>> masks = torch.zeros(2, 5, 5, dtype=torch.bool)
        >>> masks[:, 0, 0] = True
        >>> pointing_hits(torch.tensor([[3, 0], [4, 0]]), masks, tolerance=4)
        tensor([ True, False])

    Reference:
        Zhang, Bargal, Lin, Brandt, Shen & Sclaroff, Top-down Neural Attention by Excitation Backprop, 2018, sec. 4.1.
    """
    if masks.ndim != 3 or points.shape != (masks.shape[0], 2):
        raise ValueError(
            "`points` must be [batch 2] and `masks` [batch height width], got "
            f"{list(points.shape)} and {list(masks.shape)}."
        )
    points = points.to(masks.device, torch.float64 if masks.device.type != "mps" else torch.float32)
    columns, rows = (torch.arange(n, device=masks.device) for n in (masks.shape[2], masks.shape[1]))
    across, down = columns - points[:, :1], rows - points[:, 1:]  # [batch width], [batch height]
    near = down[:, :, None] ** 2 + across[:, None, :] ** 2 < tolerance**2
    return (near & masks.bool()).flatten(1).any(1)


def pointing_game(map: Tensor, masks: Tensor, *, tolerance: float = 15.0) -> Tensor:
    r"""Tell whether the peak of each map lies on its object, or within `tolerance` pixels of it.

    Higher is better. By chance: the share of the image that is closer than `tolerance` to the object. The comparison is
    strict, see `pointing_hits`.

    Args:
        map: ``[batch 1 height width]``. Of several highest values the first in reading order is the peak.
        masks: The objects, ``[batch height width]``, bool, of the map's size.
        tolerance: See `pointing_hits`.

    Returns:
        ``[batch]``, bool; False where the mask is empty or the map holds NaN. Its mean over the examples of a class is
        the class's accuracy.

    Raises:
        ValueError: If `masks` have another size than `map`.

    Example:
        >>> map = torch.eye(4)[None, None] * torch.arange(4.0)
        >>> masks = torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> masks[0, 3, 3] = True
        >>> pointing_game(map, masks, tolerance=1)
        tensor([True])

    Reference:
        Zhang, Bargal, Lin, Brandt, Shen & Sclaroff, Top-down Neural Attention by Excitation Backprop, 2018, sec. 4.1.
    """
    _check(map, masks)
    return voided(pointing_hits(peak(map), masks, tolerance=tolerance), map)


def _check(map: Tensor, masks: Tensor) -> None:
    if not isinstance(masks, Tensor) or masks.is_floating_point() or masks.is_complex():
        got = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"`masks` must be a bool tensor, got {got}. Choose a threshold: `masks > 0.5`.")
    if map.ndim < 3 or map.shape[1] != 1 or masks.shape != (map.shape[0], *map.shape[2:]):
        raise ValueError(
            "`masks` must be [batch height width] of the maps' size, and maps [batch 1 height width], got "
            f"{list(masks.shape)} and {list(map.shape)}. Resize the maps, or the masks."
        )


def _laid(map: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Give the values of maps, and which of them are on the object, ``[batch pixel]``."""
    _check(map, masks)
    values = pixels(map, map.shape[0], map.shape[2:])
    return values.to(wide(values.dtype)), masks.bool().flatten(1)


def _share(amount: Tensor, whole: Tensor, map: Tensor, inside: Tensor) -> Tensor:
    """Divide, and give NaN where there is no object or the map holds NaN."""
    return voided(amount / whole, map).masked_fill(~inside.any(1), float("nan"))


def energy_pointing_game(map: Tensor, masks: Tensor) -> Tensor:
    r"""Measure how much of a map's positive part lies on the object.

    .. math:: e = \frac{\sum_{p \in \text{object}} \max(m_p, 0)}{\sum_p \max(m_p, 0)}

    In [0, 1], higher is better. By chance: the object's share of the image.

    Args:
        map: ``[batch 1 height width]``. What is negative counts as 0.
        masks: The objects, ``[batch height width]``, bool, of the map's size.

    Returns:
        ``[batch]``; NaN where the mask is empty, nothing of the map is positive, or it holds NaN.

    Raises:
        ValueError: If `masks` have another size than `map`.

    Example:
        >>> map, masks = torch.rand(2, 1, 5, 5), torch.rand(2, 5, 5) < 0.5
        >>> e, rest = energy_pointing_game(map, masks), energy_pointing_game(map, ~masks)
        >>> torch.allclose(e + rest, torch.ones(2))
        True

    Reference:
        Wang, Wang, Du, Yang, Zhang, Ding, Mardziel & Hu, Score-CAM, 2020, sec. 4.3. There the object is a box.
    """
    values, inside = _laid(map, masks)
    positive = values.clamp(min=0)
    return _share((positive * inside).sum(1), positive.sum(1), map, inside)


def relevance_mass(map: Tensor, masks: Tensor) -> Tensor:
    r"""Measure how much of the relevance lies on the object: relevance mass accuracy.

    .. math:: a = \frac{\sum_{p \in \text{object}} m_p}{\sum_p m_p}

    In [0, 1] for maps without negative values, which is what the paper measures; higher is better. Signed maps may
    leave this range: take `energy_pointing_game`, or the map's magnitude. By chance: the object's share of the image.

    Args:
        map: ``[batch 1 height width]``.
        masks: The objects, ``[batch height width]``, bool, of the map's size.

    Returns:
        ``[batch]``; NaN where the mask is empty, the map sums to 0 or holds NaN.

    Raises:
        ValueError: If `masks` have another size than `map`.

    Example:
        >>> map, masks = torch.rand(2, 1, 5, 5), torch.rand(2, 5, 5) < 0.5
        >>> torch.allclose(relevance_mass(map, masks), energy_pointing_game(map, masks))
        True

    Reference:
        Arras, Osman & Samek, CLEVR-XAI: A Benchmark Dataset for the Ground Truth Evaluation of Neural Network
        Explanations, 2022, sec. 3.3.
    """
    values, inside = _laid(map, masks)
    return _share((values * inside).sum(1), values.sum(1), map, inside)


def relevance_rank(map: Tensor, masks: Tensor) -> Tensor:
    r"""Measure how many of the highest values lie on the object, as many as it has pixels: relevance rank accuracy.

    .. math:: a = \frac{|\text{top}_K(m) \cap \text{object}|}{K}, \qquad K = |\text{object}|

    In [0, 1], higher is better; depends on the order of the values alone. By chance: the object's share of the image.

    Args:
        map: ``[batch 1 height width]``. Equal values keep reading order.
        masks: The objects, ``[batch height width]``, bool, of the map's size.

    Returns:
        ``[batch]``; NaN where the mask is empty or the map holds NaN.

    Raises:
        ValueError: If `masks` have another size than `map`.

    Example:
        >>> map, masks = torch.randn(2, 1, 5, 5), torch.rand(2, 5, 5) < 0.5
        >>> torch.equal(relevance_rank(map, masks), relevance_rank(map.exp(), masks))
        True

    Reference:
        Arras, Osman & Samek, CLEVR-XAI: A Benchmark Dataset for the Ground Truth Evaluation of Neural Network
        Explanations, 2022, sec. 3.3.
    """
    values, inside = _laid(map, masks)
    size = inside.sum(1)
    return _share(((ranks(values) < size[:, None]) & inside).sum(1), size, map, inside)


def top_k_intersection(map: Tensor, masks: Tensor, *, k: int = 1000) -> Tensor:
    r"""Measure how many of the k highest values lie on the object.

    .. math:: i = \frac{|\text{top}_k(m) \cap \text{object}|}{k}

    In [0, 1], higher is better; at most ``|object| / k``. By chance: the object's share of the image.

    Args:
        map: ``[batch 1 height width]``. Equal values keep reading order.
        masks: The objects, ``[batch height width]``, bool, of the map's size.
        k: How many, from 1 to the number of pixels.

    Returns:
        ``[batch]``; NaN where the mask is empty or the map holds NaN.

    Raises:
        ValueError: If `masks` have another size than `map`, or `k` is out of range.

    Example:
        >>> map, masks = torch.randn(2, 1, 5, 5), torch.rand(2, 5, 5) < 0.5
        >>> share = masks.flatten(1).float().mean(1)
        >>> torch.allclose(top_k_intersection(map, masks, k=25), share)
        True

    Reference:
        Theiner, Müller-Budack & Ewerth, Interpretable Semantic Photo Geolocation, 2022, sec. 4.3.
    """
    values, inside = _laid(map, masks)
    if not 1 <= k <= values.shape[1]:
        raise ValueError(f"`k` must lie in 1 ... {values.shape[1]}, the number of pixels, got {k}.")
    count = ((ranks(values) < k) & inside).sum(1)
    return _share(count, torch.full_like(count, k), map, inside)


def iou_at_area(map: Tensor, masks: Tensor, *, area: float | None = None) -> Tensor:
    r"""Cut a map where its highest values fill an area, and measure how well that part and the object overlap.

    .. math:: \frac{|\text{top}_K(m) \cap \text{object}|}{|\text{top}_K(m) \cup \text{object}|}, \qquad
              K = \text{area} \cdot \text{pixels}

    In [0, 1], higher is better; depends on the order of the values alone, so that maps of any scale compare. By chance,
    for an area a and an object of share s: about :math:`a s / (a + s - a s)`.

    Args:
        map: ``[batch 1 height width]``. Equal values keep reading order.
        masks: The objects, ``[batch height width]``, bool, of the map's size.
        area: Share of the image, above 0 and at most 1. That of the object itself if omitted: the result is then r / (2
            - r), with r the `relevance_rank`.

    Returns:
        ``[batch]``; NaN where the mask is empty or the map holds NaN.

    Raises:
        ValueError: If `masks` have another size than `map`, or `area` is out of range.

    Example:
        >>> map, masks = torch.randn(2, 1, 5, 5), torch.rand(2, 5, 5) < 0.5
        >>> rank = relevance_rank(map, masks)
        >>> torch.allclose(iou_at_area(map, masks), rank / (2 - rank))
        True

    Reference:
        The intersection over union is Jaccard's index. Choe, Oh, Lee, Chun, Akata & Shim, Evaluating Weakly Supervised
        Object Localization Methods Right, 2020, sec. 3, on why the threshold must not depend on the map's scale.
    """
    values, inside = _laid(map, masks)
    if area is None:
        size = inside.sum(1)
    elif 0 < area <= 1:
        size = torch.full_like(inside[:, 0], max(1, round(area * values.shape[1])), dtype=torch.long)
    else:
        raise ValueError(f"`area` must be a share of the image, above 0 and at most 1, got {area}.")
    top = ranks(values) < size[:, None]
    return _share((top & inside).sum(1), (top | inside).sum(1), map, inside)
