"""Random numbers as a function of a seed and a place.

A counter-based generator: each number is a hash of seed, sample index and position within the example. It neither reads
nor moves torch's generator, takes the seed as a tensor (so that `vmap` over seeds works without a `randomness` flag),
and gives the same numbers on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pullback._torch.internals import compiling

Seed: TypeAlias = "int | Tensor"
_LOW = 0xFFFFFFFF
_CACHED = 2**16  # numbers drawn at once on a CPU, so that intermediate results stay in its cache


def _mixed(h: Tensor) -> Tensor:
    """Mix 32 bits (Ellis's finaliser found by search, bias 0.17), held in int64."""
    h = h ^ (h >> 16)
    h = (h * 0x21F0AAAD) & _LOW
    h = h ^ (h >> 15)
    h = (h * 0x735A2D97) & _LOW
    return h ^ (h >> 15)


def _hashed(seed: Seed, samples: Tensor, stream: int) -> Tensor:
    """Return 32 random bits for each sample, ``[sample]``, in int64."""
    device = samples.device
    if isinstance(seed, Tensor):
        if seed.is_floating_point() or seed.numel() != 1:
            raise TypeError(f"`seed` must be an integer, got a {seed.dtype} tensor of shape {list(seed.shape)}.")
        seed = seed.to(device).long().reshape(())
    else:
        seed = torch.tensor(int(seed) & 0x7FFFFFFFFFFFFFFF, device=device)
    h = _mixed((seed & _LOW) ^ 0x9E3779B9)
    h = _mixed(h ^ ((seed >> 32) & _LOW) ^ (stream * 0x85EBCA6B & _LOW))
    return _mixed(h ^ (samples.long() & _LOW))


def uniform(seed: Seed, samples: Tensor, shape: Sequence[int], dtype: torch.dtype, stream: int = 0) -> Tensor:
    """Draw from the open interval (0, 1), ``[sample *shape]``, for the sample indices given."""
    wide = torch.float32 if samples.device.type == "mps" else torch.float64
    count, device = math.prod(shape), samples.device
    place = torch.arange(count, device=device)
    spread = (place * 0x9E3779B1) & _LOW

    def drawn(h: Tensor) -> Tensor:
        bits = _mixed(_mixed(h ^ place) ^ spread ^ h)
        return (((bits >> 8).to(wide) + 0.5) / 2**24).to(dtype)

    hashed = _hashed(seed, samples, stream).unsqueeze(1)
    together = max(_CACHED // max(count, 1), 1) if device.type == "cpu" and not compiling() else len(samples)
    parts = [drawn(h) for h in hashed.split(max(together, 1))]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(len(samples), *shape)


def normal(seed: Seed, samples: Tensor, shape: Sequence[int], dtype: torch.dtype, stream: int = 0) -> Tensor:
    """Draw from the standard normal distribution, ``[sample *shape]``, by Box and Muller's transform."""
    wide = torch.float32 if samples.device.type == "mps" else torch.float64
    radius = torch.sqrt(-2 * torch.log(uniform(seed, samples, shape, wide, 2 * stream)))
    angle = 2 * math.pi * uniform(seed, samples, shape, wide, 2 * stream + 1)
    return (radius * torch.cos(angle)).to(dtype)
