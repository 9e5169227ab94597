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
FEW, MANY = 16, 128  # blocks: what some forwards together, and whole batches with their gradients, have in hand


@cache
def _glibc() -> ctypes.CDLL | None:
    """Give malloc and free; `torch.empty` and a tensor's storage leave small pieces between blocks."""
    if os.name != "posix" or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    return libc


def _taken(blocks: int) -> int | None:
    """Take so many blocks, or as many as there are, and give all back but the last, which stays to be given back."""
    libc, taken = _glibc(), []
    while libc is not None and len(taken) < blocks and (block := libc.malloc(BLOCK)) is not None:
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
def kept(blocks: int = FEW) -> Iterator[None]:
    """Keep all that is freed meanwhile, for as many blocks: the last of them stays at the end of the heap.

    None of them is ever written to, so they take no memory themselves. Afterwards what is free can go back. A process
    that computes on a GPU needs none of it.
    """
    last = None
    if not torch.cuda.is_initialized():
        hold_a_little()
        last = _taken(blocks)
    try:
        yield
    finally:
        _given_back(last)
