"""Memory that the forwards of a CPU free, kept for the next one.

glibc gives what is free at the end of its heap back to the system, and large blocks at once. Each forward then takes
its memory anew, page by page, which can take as long as its arithmetic. Where there is no glibc, nothing is done.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

BLOCK = 31 * 2**20  # bytes: glibc takes blocks of up to 32 MiB from its heap, once it was given back such a one
FEW, MANY = 2**29, 2**32  # bytes: what some forwards together, and whole batches with their gradients, have in hand


@cache
def _glibc() -> ctypes.CDLL | None:
    """Give malloc and free; `torch.empty` and a tensor's storage leave small pieces between blocks."""
    if os.name != "posix" or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    return libc


def _taken(size: int) -> int | None:
    """Take so many bytes, or as many as there are, in blocks; give all back but the last, which the caller must."""
    libc, taken = _glibc(), []
    while libc is not None and len(taken) * BLOCK < size and (block := libc.malloc(BLOCK)) is not None:
        taken.append(block)
    last = taken.pop() if taken else None
    for block in taken:
        _given_back(block)
    return last


def _given_back(block: int | None) -> None:
    if (libc := _glibc()) is not None:
        libc.free(block)  # nothing, where there is none


@cache
def hold_a_little() -> None:
    """Have the C library keep what is free, up to twice the largest block that it was given back, for good."""
    _given_back(_taken(MANY))


@contextmanager
def keep_memory(up_to: int = MANY) -> Iterator[None]:
    """Keep the memory that is freed meanwhile for what comes next, on a CPU with glibc; elsewhere, do nothing.

    For loops of your own over batches, where fetching memory from the system anew takes as long as some of the
    arithmetic: `benchmarks/batch.py` measures how long. Methods do so between their own parts, and runs over a dataset
    between batches. It also holds for what is not pullback's.

    Costs about a millisecond, and no memory but what would have gone back: the end of the heap is held by a block that
    is never written to. Afterwards what is free can go back. In a process that has begun to use CUDA, nothing is done.

    Args:
        up_to: Bytes to keep, at most.

    Raises:
        ValueError: If `up_to` is negative.

    Example:
        >>> model, batches = torch.nn.Linear(3, 4).eval(), torch.randn(5, 2, 3)
        >>> with keep_memory():
        ...     maps = [gradient({}, model, x, target=0) for x in batches]
        >>> torch.equal(torch.stack(maps), model.weight[0].expand(5, 2, 3))
        True
    """
    if up_to < 0:
        raise ValueError(f"`up_to` must be a number of bytes, got {up_to}.")
    last = None
    if not torch.cuda.is_initialized():
        hold_a_little()
        last = _taken(up_to)
    try:
        yield
    finally:
        _given_back(last)
