"""What is shown where a mask covers: a constant, a mean, a blur, a pyramid."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from pullback import maps

Fill: TypeAlias = "str | float | Tensor | Callable[[Tensor], Tensor] | None"


# -- what covers


def pyramid(x: Tensor, kind: str = "blur", *, levels: int = 8, max_blur: float = 20.0) -> Tensor:
    r"""Give steps from a perturbed input to the input itself, ``[level *x.shape]``; level l is strongest at 0.

    ``"blur"`` smooths with :math:`\sigma_l = \sigma_{\max} (1 - l / (L - 1))` pixels, zeros beyond the border;
    ``"fade"`` multiplies by :math:`l / (L - 1)`.

    Raises:
        ValueError: If the kind is unknown, or there are less than 2 levels.

    Example:
        >>> x = torch.rand(2, 3, 8, 8)
        >>> p = pyramid(x, "fade", levels=3)
        >>> torch.equal(p[2], x) and torch.equal(p[1], x / 2) and not p[0].any()
        True
    """
    if levels < 2:
        raise ValueError(f"`levels` must be at least 2, got {levels}.")
    strengths = [1 - level / (levels - 1) for level in range(levels)]
    if kind == "blur":
        return torch.stack([maps.smooth(x, max_blur * strength, padding="zeros") for strength in strengths])
    if kind == "fade":
        return torch.stack([x * (1 - strength) for strength in strengths])
    raise ValueError(f"`perturbation` must be 'blur' or 'fade', got {kind!r}.")


def blended(levels: Tensor, masks: Tensor) -> Tensor:
    """Choose a level at each pixel: 1 the last, 0 the first, linear between neighbours.

    Args:
        levels: ``[level mask channel ...]`` as `pyramid` gives it, or 1 for mask or channel.
        masks: ``[mask 1 ...]`` in [0, 1].

    Example:
        >>> x, m = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8)
        >>> torch.allclose(blended(pyramid(x, "fade", levels=5), m), m * x, atol=1e-6)
        True
    """
    last = len(levels) - 1
    height = masks * last
    floor = height.detach().floor()
    shape = torch.broadcast_shapes(levels.shape[1:], masks.shape)
    levels = levels.expand(len(levels), *shape)

    def at(level: Tensor) -> Tensor:
        index = level.long().clamp(0, last)  # also where a mask is NaN
        return torch.gather(levels, 0, index.expand(shape).unsqueeze(0)).squeeze(0)

    below = at(floor)
    return below + (height - floor).to(below.dtype) * (at(floor + 1) - below)


def fill(x: Tensor, cover: Fill, sigma: float = 10.0) -> Tensor:
    """Give what lies under the masks, broadcastable to `x`.

    Args:
        x: ``[batch channel ...]``.
        cover: `None` for zeros, a number, a tensor that broadcasts to `x`, ``"mean"`` of each channel, ``"blur"``
            by `sigma` pixels, or a function of `x`.
        sigma: Standard deviation of the blur.

    Raises:
        ValueError: If the name is unknown, or the tensor does not broadcast to `x`.

    Example:
        >>> x = torch.rand(2, 3, 8, 8)
        >>> torch.allclose(fill(x, "mean")[:, :, 0, 0], x.mean((2, 3)))
        True
    """
    if cover is None:
        cover = 0.0
    if isinstance(cover, str):
        if cover == "mean":
            return x.mean(tuple(range(2, x.ndim)) or 1, keepdim=True)
        if cover == "blur":
            return maps.smooth(x, sigma)
        raise ValueError(f"`baseline` must be 'mean', 'blur', a number, a tensor or a function, got {cover!r}.")
    if callable(cover) and not isinstance(cover, Tensor):
        cover = cover(x)
    under = torch.as_tensor(cover, dtype=x.dtype, device=x.device)
    try:
        torch.broadcast_shapes(under.shape, x.shape)
        under.expand_as(x)
    except RuntimeError:
        raise ValueError(f"`baseline` must broadcast to {list(x.shape)}, got {list(under.shape)}.") from None
    return under
