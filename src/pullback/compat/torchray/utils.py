"""Images as tensors, files, devices and settings.

Written for today's torch, NumPy and Pillow. Pictures are drawn with matplotlib, which is imported when one is asked
for, as Pillow is.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import urllib.parse
import urllib.request
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pullback import maps
from pullback.compat.torchray._arguments import ArgumentError

__all__ = [
    "get_config",
    "get_device",
    "imarraysc",
    "imread",
    "imsc",
    "imsmooth",
    "im_to_numpy",
    "is_url",
    "pil_to_tensor",
    "resample",
    "tensor_to_im",
    "xmkdir",
]

EPSILON_DOUBLE = torch.tensor(torch.finfo(torch.float64).eps, dtype=torch.float64)
EPSILON_SINGLE = torch.tensor(torch.finfo(torch.float32).eps, dtype=torch.float32)
SQRT_TWO_DOUBLE = torch.tensor(math.sqrt(2), dtype=torch.float32)  # of single precision, as TorchRay's is
SQRT_TWO_SINGLE = SQRT_TWO_DOUBLE.clone()


# -- settings, devices, files

_DEFAULTS: dict[str, dict[str, Any]] = {
    "mongo": {"server": "mongod", "hostname": "localhost", "port": 27017, "database": "./data/db"},
    "benchmark": {"voc_dir": "./data/voc", "coco_dir": "./data/coco", "coco_anno_dir": "./data/coco/annotations"}
    | {"imagenet_dir": "./data/imagenet"},
}


@lru_cache
def get_config() -> dict[str, dict[str, Any]]:
    """Read the settings: those of ``.torchrayrc`` in the current folder, else in the home folder, over the defaults.

    The file is JSON with the sections ``mongo`` and ``benchmark``. It is read once.

    Raises:
        ValueError: If it sets something that there is not.
    """
    config = {section: dict(values) for section, values in _DEFAULTS.items()}
    for folder in (Path.cwd(), Path.home()):
        file = folder / ".torchrayrc"
        if not file.is_file():
            continue
        given = json.loads(file.read_text(encoding="utf-8"))
        for section, values in given.items():
            if section not in config:
                raise ArgumentError(f"{file}: no section `{section}`. There are {', '.join(config)}.")
            for key, value in values.items():
                if key not in config[section]:
                    raise ArgumentError(f"{file}: no `{key}` in `{section}`. There are {', '.join(config[section])}.")
                config[section][key] = value
        break
    return config


def get_device(gpu: int | None = 0) -> torch.device:
    """Give the CUDA device of that number; the CPU for `None`, or where there is no CUDA."""
    return torch.device("cpu" if gpu is None or not torch.cuda.is_available() else f"cuda:{gpu}")


def xmkdir(path: str | os.PathLike[str]) -> None:
    """Make a folder, with those above it, unless it is there."""
    os.makedirs(path, exist_ok=True)


def is_url(obj: Any) -> bool:
    """Tell whether `obj` is a string that reads as a URL."""
    try:
        parts = urllib.parse.urlparse(obj)
    except (TypeError, ValueError, AttributeError):
        return False
    return isinstance(obj, str) and bool(parts.scheme and parts.netloc)


# -- images and tensors


def tensor_to_im(tensor: Tensor) -> Tensor:
    """Lay channels out as images of their own: ``[batch channel ...]`` to ``[(batch channel) 1 ...]``."""
    return tensor.reshape(-1, *tensor.shape[2:]).unsqueeze(1)


def pil_to_tensor(pil_image: Any) -> Tensor:
    """Give an image as ``[channel height width]``, from 0 to 1."""
    pixels = np.array(pil_image)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    top = 1 if pixels.dtype == np.bool_ else np.iinfo(pixels.dtype).max if pixels.dtype.kind in "iu" else 1
    return torch.from_numpy(pixels.astype(np.float32) / top).permute(2, 0, 1).contiguous()


def im_to_numpy(tensor: Tensor) -> np.ndarray:
    """Give ``[1 channel height width]`` or ``[channel height width]`` as an array ``[height width 3]``; grey thrice."""
    tensor = tensor.detach().cpu()
    if tensor.ndim == 4 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise ArgumentError(f"`tensor` must be one image of 1 or 3 channels, got {list(tensor.shape)}.")
    return tensor.expand(3, -1, -1).permute(1, 2, 0).numpy()


def imread(file: Any, as_pil: bool = False, resize: float | Sequence[int] | None = None, to_rgb: bool = False) -> Any:
    """Read an image.

    Args:
        file: Path, URL or open file.
        as_pil: Give a Pillow image, not a tensor.
        resize: Length of the shorter side, or (width, height).
        to_rgb: Convert to three channels.

    Returns:
        Image ``[channel height width]`` from 0 to 1, or a Pillow image.
    """
    pil = importlib.import_module("PIL.Image")
    if is_url(file):
        with urllib.request.urlopen(file) as answer:
            file = io.BytesIO(answer.read())
    with pil.open(file) as opened:
        image = opened.convert("RGB") if to_rgb else opened.copy()
    if resize is not None:
        if isinstance(resize, int | float):
            size = tuple(max(1, round(n * resize / min(image.size))) for n in image.size)
        else:
            size = tuple(int(n) for n in resize)
        image = image.resize(size, pil.Resampling.LANCZOS)
    return image if as_pil else pil_to_tensor(image)


# -- pictures


def _scaled(image: Tensor, lim: Sequence[float] | None) -> Tensor:
    """Scale values to [0, 1]; a constant image gives zeros."""
    image = image.detach()
    low, high = (image.min(), image.max()) if lim is None else (float(lim[0]), float(lim[1]))
    span = high - low
    scaled = (image - low) / span if span != 0 else torch.zeros_like(image)
    return scaled.clamp(0, 1)


def imsc(
    img: Tensor,
    *args: Any,
    quiet: bool = False,
    lim: Sequence[float] | None = None,
    interpolation: str = "lanczos",
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Scale an image to [0, 1], and draw it.

    Args:
        img: ``[1 channel height width]`` or ``[channel height width]``, of 1 or 3 channels.
        *args: For matplotlib's `imshow`.
        quiet: Do not draw.
        lim: Values that become 0 and 1; the least and the greatest if omitted.
        interpolation: For `imshow`.
        **kwargs: For `imshow`.

    Returns:
        The scaled image, and what `imshow` returned, `None` where nothing is drawn.
    """
    scaled = _scaled(img, lim)
    if quiet:
        return scaled, None
    plt = importlib.import_module("matplotlib.pyplot")
    handle = plt.imshow(im_to_numpy(scaled), *args, interpolation=interpolation, **kwargs)
    plt.gca().axis("off")
    return scaled, handle


def imarraysc(
    tiles: Tensor,
    spacing: int = 0,
    quiet: bool = False,
    lim: Sequence[float] | None = None,
    interpolation: str = "lanczos",
) -> tuple[Tensor, Any]:
    """Lay images out as a mosaic, nearly square, each scaled to [0, 1] by itself, and draw it.

    Args:
        tiles: ``[image channel height width]``.
        spacing: Pixels between them.
        quiet, lim, interpolation: See `imsc`.

    Returns:
        The mosaic ``[1 channel height width]``, and what `imshow` returned.
    """
    count, channels, height, width = tiles.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    size = (rows * (height + spacing) - spacing, columns * (width + spacing) - spacing)
    mosaic = torch.zeros(1, channels, *size, dtype=tiles.dtype, device=tiles.device)
    for i, tile in enumerate(tiles):
        top, left = (i // columns) * (height + spacing), (i % columns) * (width + spacing)
        mosaic[0, :, top : top + height, left : left + width] = _scaled(tile, lim)
    return imsc(mosaic, quiet=quiet, lim=(0, 1), interpolation=interpolation)


def resample(source: Tensor, target_size: Sequence[int], transform: Any) -> Tensor:
    """Move and scale an image.

    Args:
        source: ``[batch channel height width]``.
        target_size: (height, width) of the result.
        transform: ``[[scale_u, shift_u], [scale_v, shift_v]]``, or one such for each example: a point (u, v) of the
            source, along width and height in pixels, goes to ``scale * (u, v) + shift``. Pixel centres are at halves.

    Returns:
        ``[batch channel *target_size]``, interpolated linearly, 0 outside of the source.
    """
    transform = torch.as_tensor(transform, dtype=source.dtype, device=source.device).expand(len(source), 2, 2)
    weights = []
    for axis, (count, extent) in enumerate(zip((target_size[1], target_size[0]), source.shape[:1:-1], strict=True)):
        target, known = (torch.arange(n, dtype=source.dtype, device=source.device) for n in (count, extent))
        place = (target + 0.5 - transform[:, axis, 1:]) / transform[:, axis, :1] - 0.5  # [batch count], in the source
        weights.append((1 - (place[:, :, None] - known).abs()).clamp(min=0))
    across, down = weights
    return torch.matmul(torch.matmul(down[:, None], source), across[:, None].mT)


def imsmooth(
    tensor: Tensor,
    sigma: float,
    stride: int = 1,
    padding: int = 0,
    padding_mode: str = "constant",
    padding_value: float = 0,
) -> Tensor:
    """Smooth by a Gaussian cut at four standard deviations.

    Args:
        tensor: ``[batch channel height width]``, of any floating-point type.
        sigma: Standard deviation in pixels; 0 changes nothing.
        stride: Keep every so many pixels.
        padding: Pixels that the result is larger by on each side; twice as many for zeros beyond the border, as in
            TorchRay.
        padding_mode: What lies beyond the border: ``"constant"``, ``"replicate"``, ``"reflect"`` or ``"circular"``.
        padding_value: The constant.

    Returns:
        ``[batch channel height width]``; the size of `tensor` at the defaults.
    """
    if not sigma >= 0:
        raise ArgumentError(f"`sigma` must be at least 0, got {sigma}.")
    zeros = padding_mode == "constant" and padding_value == 0
    half = 0 if zeros else math.ceil(4 * sigma)
    extra = 2 * padding if zeros else padding + half
    dtype = tensor.dtype
    if extra:
        if padding_mode == "constant":
            tensor = F.pad(tensor, (extra,) * 4, mode="constant", value=padding_value)
        else:  # on a CPU, torch 2.0 pads no halves
            wide = tensor.to(torch.promote_types(dtype, torch.float32))
            tensor = F.pad(wide, (extra,) * 4, mode=padding_mode)
    smoothed = maps.smooth(tensor, sigma, "zeros")
    height, width = (n - half for n in tensor.shape[2:])
    return smoothed[:, :, half:height:stride, half:width:stride].to(dtype)
