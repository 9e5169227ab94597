"""Judge maps: what a map says about where an object is, against where it is.

The functions take maps, ``[batch 1 height width]``, and know no method.
"""

from __future__ import annotations

import torch
from torch import Tensor


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

    Args:
        map: ``[batch 1 height width]``.
        masks: The objects, ``[batch height width]``, bool, of the map's size.
        tolerance: See `pointing_hits`.

    Returns:
        ``[batch]``, bool. Its mean over the examples of a class is the class's accuracy.

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
    if map.ndim != 4 or map.shape[2:] != masks.shape[1:] or map.shape[0] != masks.shape[0]:
        raise ValueError(
            f"`masks` must be [batch height width] of the maps' size, {[map.shape[0], *map.shape[2:]]}, got "
            f"{list(masks.shape)}. Resize the maps, or the masks."
        )
    return pointing_hits(peak(map), masks, tolerance=tolerance)
