"""From an attribution to a map: reduce over channels, normalise, resize, smooth.

Attributions are ``[batch channel ...]`` with up to three spatial axes, maps ``[batch 1 ...]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor

_MODES = {"linear": "linear bilinear trilinear", "cubic": "bicubic", "": "nearest nearest-exact area"}


def channel_peak(attribution: Tensor) -> Tensor:
    """Take the largest absolute value over channels, ``[batch 1 ...]``, not negative.

    Example:
        >>> a = torch.randn(2, 3, 4, 4)
        >>> torch.equal(channel_peak(a), channel_peak(-a))
        True
    """
    return reduce(attribution.abs(), "batch channel ... -> batch 1 ...", "max")


def channel_sum(attribution: Tensor) -> Tensor:
    """Sum over channels, ``[batch 1 ...]``: keeps the total.

    Example:
        >>> a = torch.randn(2, 3, 4, 4)
        >>> torch.allclose(channel_sum(a).sum(), a.sum(), atol=1e-5)
        True
    """
    return reduce(attribution, "batch channel ... -> batch 1 ...", "sum")


def weighted_sum(activation: Tensor, weights: Tensor) -> Tensor:
    """Sum channels with weights ``[batch channel]`` or of the activation's own shape, ``[batch 1 ...]``."""
    pattern = "batch channel" if weights.ndim == 2 else "batch channel ..."
    return einsum(activation, weights, f"batch channel ..., {pattern} -> batch ...").unsqueeze(1)


def normalise(map: Tensor, signed: bool = False) -> Tensor:
    """Scale each example to ``[0, 1]`` by its least and greatest value; `signed`: to ``[-1, 1]``, 0 staying 0.

    A constant map gives zeros.

    Example:
        >>> m = torch.randn(2, 1, 4, 4)
        >>> n = normalise(m)
        >>> bool((n.amin((1, 2, 3)) == 0).all() and (n.amax((1, 2, 3)) == 1).all())
        True
    """
    axes = tuple(range(1, map.ndim))
    low = torch.zeros_like(map) if signed else map.amin(axes, keepdim=True)
    span = (map - low).abs().amax(axes, keepdim=True)
    return (map - low) / torch.where(span == 0, torch.ones_like(span), span)


def resize(map: Tensor, size: Sequence[int], mode: str = "bilinear") -> Tensor:
    """Resize the spatial axes to `size` (height, width); `mode` as in `torch.nn.functional.interpolate`.

    ``"bilinear"`` stands for linear interpolation over any number of axes. Pixel centres keep their places
    (``align_corners=False``).

    Raises:
        ValueError: If `size` does not fit the spatial axes, or the mode is unknown.

    Example:
        >>> m = torch.randn(1, 1, 4, 4)
        >>> torch.equal(resize(m, (4, 4)), m)
        True
    """
    axes = map.ndim - 2
    size = tuple(int(n) for n in size)
    if axes not in (1, 2, 3):
        raise ValueError(f"`resize` needs a map with 1 to 3 spatial axes, [batch channel ...], got {list(map.shape)}.")
    if len(size) != axes or min(size) < 1:
        raise ValueError(f"`resize` must give {axes} positive sizes, one a spatial axis, got {size}.")
    if mode not in " ".join(_MODES.values()).split():
        raise ValueError(f"`resize_mode` must be one of {', '.join(' '.join(_MODES.values()).split())}, got {mode!r}.")
    if mode in _MODES["linear"].split():
        return F.interpolate(map, size, mode=_MODES["linear"].split()[axes - 1], align_corners=False)
    if mode in _MODES["cubic"].split():
        if axes != 2:
            raise ValueError(f"`resize_mode` 'bicubic' needs 2 spatial axes, got {axes}.")
        return F.interpolate(map, size, mode=mode, align_corners=False)
    return F.interpolate(map, size, mode=mode)


def smooth(map: Tensor, sigma: float, padding: str = "replicate", *, value: float = 0.0, stride: int = 1) -> Tensor:
    r"""Smooth each spatial axis by a Gaussian, :math:`w_i \propto e^{-i^2 / 2 \sigma^2}`, cut at :math:`4 \sigma`.

    Args:
        map: ``[batch channel ...]`` with 1 to 3 spatial axes.
        sigma: Standard deviation in pixels; 0 changes nothing.
        padding: What lies beyond the border: ``"replicate"``, ``"reflect"``, ``"circular"``, ``"zeros"`` or
            ``"constant"``: `value`.
        value: Beyond the border, for ``"constant"``.
        stride: Keep every so many pixels along each axis.

    Raises:
        ValueError: If `sigma` is negative or not finite, `stride` less than 1, or `padding` unknown.

    Example:
        >>> m = torch.ones(1, 1, 6, 6)
        >>> torch.allclose(smooth(m, 2.0), m)
        True
    """
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"`smooth` must be a standard deviation of at least 0, got {sigma}.")
    if stride < 1:
        raise ValueError(f"`stride` must be at least 1, got {stride}.")
    if padding not in ("replicate", "reflect", "circular", "zeros", "constant"):
        raise ValueError(
            f"`padding` must be 'replicate', 'reflect', 'circular', 'zeros' or 'constant', got {padding!r}."
        )
    if sigma == 0:
        return map if stride == 1 else map[(..., *[slice(None, None, stride)] * (map.ndim - 2))]
    sigma_ = torch.tensor(sigma, dtype=map.dtype, device=map.device)
    return blurred(map, sigma_, math.ceil(4 * sigma), padding, value, stride)


def blurred(
    map: Tensor, sigma: Tensor, reach: int, padding: str = "replicate", value: float = 0.0, stride: int = 1
) -> Tensor:
    """Smooth as `smooth` does, by a `sigma` ``[]`` that may be differentiated, with weights up to `reach` pixels."""
    dtype = map.dtype
    map = map.to(torch.promote_types(dtype, torch.float32))  # on a CPU, torch 2.0 neither pads nor convolves halves
    steps = torch.arange(-reach, reach + 1, device=map.device, dtype=map.dtype)
    kernel = torch.exp(-(steps**2) / (2 * sigma.clamp(min=1e-3) ** 2))
    kernel = kernel / kernel.sum()
    for axis in range(2, map.ndim):
        rows = map.movedim(axis, -1)
        shape = rows.shape
        lines = rearrange(rows, "... n -> (...) 1 n")
        if padding in ("zeros", "constant"):
            lines = F.pad(lines, (reach, reach), value=value if padding == "constant" else 0.0)
        else:
            lines = F.pad(lines, (reach, reach), mode=padding)
        lines = F.conv1d(lines, kernel.reshape(1, 1, -1), stride=stride)
        map = lines.reshape(*shape[:-1], lines.shape[-1]).movedim(-1, axis)
    return map.to(dtype)


def token_grid(tokens: Tensor, x: Tensor) -> Tensor:
    """Lay tokens ``[batch token channel]`` out as ``[batch channel height width]``; leading class tokens are left out.

    The grid has the aspect of the image `x`.

    Raises:
        ValueError: If no grid of that aspect fits.

    Example:
        >>> token_grid(torch.randn(2, 197, 8), torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 8, 14, 14])
    """
    height, width = x.shape[-2:]
    for prefix in range(min(tokens.shape[1], 17)):
        count = tokens.shape[1] - prefix
        rows = round(math.sqrt(count * height / width))
        if rows > 0 and count % rows == 0 and abs(math.log(rows * rows * width / (count * height))) < 1e-6:
            return rearrange(tokens[:, prefix:], "batch (row column) channel -> batch channel row column", row=rows)
    raise ValueError(
        f"`layer` gives {tokens.shape[1]} tokens, which no grid with the aspect of a {height} x {width} image fits."
    )
