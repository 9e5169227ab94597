r"""RISE: the mean of random masks, weighted by what the model makes of what they show.

    maps = rise(model, x)                # of all classes
    map = rise_class(model, x, target=[285])

The pure function is `pullback.rise`, which divides by the probability of a cell as the paper does; TorchRay, and this
module, do not.

.. math:: m_c = \frac{1}{K} \sum_k \sigma(f_c(m_k \odot x)) \, m_k

Reference:
    Petsiuk, Das & Saenko, RISE: Randomized Input Sampling for Explanation of Black-box Models, 2018.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from pullback._core.batching import chunks
from pullback._core.call import Call
from pullback._core.entry import public
from pullback._core.inputs import folded, unfolded
from pullback._core.modules import params_of
from pullback.compat.torchray._arguments import ArgumentError
from pullback.compat.torchray.attribution.common import resize_saliency
from pullback.masks._grids import grid_masks

__all__ = ["rise", "rise_class"]


class _Draws:
    """The masks that TorchRay draws: its order and its numbers, from generators of their own with the same seed."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.Generator().manual_seed(seed)
        self.own = self.cpu if device.type == "cpu" else torch.Generator(device).manual_seed(seed)

    def grids(self, count: int, cells: int, p: float) -> Tensor:
        return (torch.rand(count, 1, cells, cells, generator=self.own, device=self.device) < p)[:, 0]

    def shifts(self, count: int, size: tuple[int, int], cells: int) -> Tensor:
        drawn = [torch.randint(math.ceil(length / cells), (count,), generator=self.cpu) for length in size]
        return torch.stack(drawn, 1).to(self.device)


@public
def rise(
    model: nn.Module,
    input: Tensor,
    target: Any = None,
    seed: int = 0,
    num_masks: int = 8000,
    num_cells: int = 7,
    filter_masks: Tensor | None = None,
    batch_size: int = 32,
    p: float = 0.5,
    resize: Any = False,
    resize_mode: str = "bilinear",
) -> Tensor:
    """Give the maps of all classes.

    The model is run in eval mode on a copy of its structure.

    Args:
        model: A module, whose output is ``[batch class]`` or ``[batch class 1 1]``.
        input: ``[batch channel height width]``.
        target: Not used.
        seed: Of the masks, which are those that TorchRay draws. No generator of torch's is moved.
        num_masks: How many, the same for all inputs.
        num_cells: Cells of a mask along each axis.
        filter_masks: Masks to use, ``[mask 1 height width]``, or the grids that they are drawn from, ``[mask 1 cell
            cell]``. There must be `num_masks`.
        batch_size: Masks at once. Other numbers draw other masks, as in TorchRay.
        p: Probability that a cell is shown.
        resize, resize_mode: See `common.resize_saliency`.

    Returns:
        Maps ``[batch class height width]``, not negative.
    """
    if num_masks < 1:
        raise ArgumentError(f"`num_masks` must be at least 1, got {num_masks}.")
    if filter_masks is not None and len(filter_masks) != num_masks:
        raise ArgumentError(
            f"`filter_masks` must be {num_masks} masks, one each of `num_masks`, got {len(filter_masks)}."
        )
    params, draws = params_of(model), _Draws(seed, input.device)
    height, width = input.shape[2:]
    total = torch.zeros((), device=input.device)
    with torch.no_grad():
        for k in chunks(num_masks, batch_size):
            given = None if filter_masks is None else filter_masks[k.start : k.stop].to(input.device)
            if given is not None and given.shape[2:] == input.shape[2:]:
                masks = given.to(input.dtype)
            else:
                grids = draws.grids(len(k), num_cells, p) if given is None else given[:, 0]
                shifts = draws.shifts(len(k), (height, width), grids.shape[-1])
                masks = grid_masks(grids.to(input.dtype), shifts, (height, width))
            scores = torch.sigmoid(Call.bind(params, model, folded(masks[:, None] * input)).forward())
            if scores.ndim > 2 and scores.shape[2:].numel() != 1:
                raise ArgumentError(f"The model's output must be [batch class], or 1 x 1, got {list(scores.shape)}.")
            scores = unfolded(scores.flatten(1), len(k))
            shown = rearrange(masks, "mask 1 height width -> mask height width")
            weighted = "mask batch label, mask height width -> batch label height width"
            total = total + einsum(scores, shown, weighted)
    return resize_saliency(input, total / num_masks, resize, resize_mode)


def rise_class(*args: Any, target: Any, **kwargs: Any) -> Tensor:
    """Give the map of a class for each input, ``[batch 1 height width]``. Takes what `rise` takes.

    Args:
        *args: See `rise`.
        target: Class index, one each or one for all.
        **kwargs: See `rise`.
    """
    maps = rise(*args, **kwargs)
    index = torch.as_tensor(target, device=maps.device).reshape(-1)
    if len(index) not in (1, len(maps)):
        raise ArgumentError(f"`target` must be one class for each of {len(maps)} inputs, got {len(index)}.")
    return maps[torch.arange(len(maps), device=maps.device), index.expand(len(maps))].unsqueeze(1)
