"""Photographs read from files and prepared for a network."""

from __future__ import annotations

import importlib
import importlib.resources
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback._networks.messages import Problem, first_line, needed
from pullback._networks.models import Preprocessing

MEGAPIXELS = 150  # that a photograph may hold; decoded, 450 MB
FORMATS = frozenset({"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"})


# -- photographs -------------------------------------------------------------------------------------------------------


def read(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    """The part of a photograph that the model sees, ``[height width channel]``, uint8.

    Turned as its EXIF data says, on white where it is transparent, 16 bits scaled to 8, the first of several frames.
    """
    image_module, ops = needed("cli", "PIL.Image", "PIL.ImageOps")
    if not path.exists():
        raise Problem("no such file")
    if not path.is_file():
        raise Problem("is no file; name the photographs in it" if path.is_dir() else "is no file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its metadata, or of a size that is judged here
            image_module.init()
            with image_module.open(path, formats=sorted(FORMATS & set(image_module.OPEN))) as image:
                width, height = image.size
                if width * height > MEGAPIXELS * 1_000_000:
                    raise Problem(_too_large(f"holds {width} x {height} pixels"))
                image.load()
                image = ops.exif_transpose(image)
                image = _eight_bits(image)
                channels = len(preprocessing.mean)
                if image.mode in ("P", "PA", "LA", "La", "RGBa") or "transparency" in image.info:
                    image = image.convert("RGBA")
                if image.mode == "RGBA":
                    image = image_module.alpha_composite(image_module.new("RGBA", image.size, "white"), image)
                image = image.convert("RGB" if channels == 3 else "L")
                resample = image_module.Resampling[preprocessing.interpolation.upper()]
                size = (preprocessing.size[1], preprocessing.size[0])
                image = image.resize(size, resample, box=_box(image.size, size, preprocessing.crop))
    except Problem:
        raise
    except image_module.DecompressionBombError as error:
        raise Problem(_too_large("holds too many pixels")) from error
    except image_module.UnidentifiedImageError as error:
        if path.stat().st_size == 0:
            raise Problem("is empty; take a whole copy") from error
        raise Problem(f"is no photograph that can be read; save it as one of {', '.join(sorted(FORMATS))}") from error
    except PermissionError as error:
        raise Problem("cannot be opened: no permission to read it") from error
    except Exception as error:  # decoders raise all sorts of errors on damaged files
        raise Problem(f"is damaged or cut short ({first_line(error)}); take a whole copy") from error
    return np.asarray(image).reshape(*preprocessing.size, channels)


def _too_large(what: str) -> str:
    return f"{what}, more than the {MEGAPIXELS} million that are read; scale it down first"


def _eight_bits(image: Any) -> Any:
    if image.mode not in ("F", "I") and not image.mode.startswith("I;16"):
        return image
    image_module = importlib.import_module("PIL.Image")
    values = np.asarray(image).astype(np.float64)
    top = values.max(initial=0)
    if not np.isfinite(values).all() or values.min(initial=0) < 0 or top > 65535:
        raise Problem("has pixels that are not between 0 and 65535; save it with 8 or 16 bits")
    full = 65535 if image.mode.startswith("I;16") or top > 255 else 1 if image.mode == "F" and top <= 1 else 255
    return image_module.fromarray(np.rint(values * (255 / full)).astype(np.uint8))


def _box(have: tuple[int, int], want: tuple[int, int], crop: float) -> tuple[float, float, float, float]:
    """The largest centred box of the wanted aspect, shrunk by `crop`: it is cut out before anything is resized, so that
    a strip of 1 x 10000 pixels costs no more than another photograph."""
    scale = crop * min(have[0] / want[0], have[1] / want[1])
    half = (scale * want[0] / 2, scale * want[1] / 2)
    return (have[0] / 2 - half[0], have[1] / 2 - half[1], have[0] / 2 + half[0], have[1] / 2 + half[1])


def prepare(pixels: np.ndarray, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """What goes into the model, ``[1 channel height width]``."""
    mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
    return ((x - mean) / std)[None].to(device)
