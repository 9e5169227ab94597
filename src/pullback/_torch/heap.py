"""Keep the memory that the forwards of a CPU free for the next forward, where the caller asks for it.

Gain: a loop over batches of 16 images takes 0.5 to 0.87 of the time (`benchmarks/batch.py`). Switch: nothing is kept
outside of ``with keep_memory():``.

glibc returns free memory at the end of its heap to the system, and large blocks at once. Each forward then fetches its
memory again, page by page, which can take as long as its arithmetic. Without glibc nothing is done.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

BLOCK_BYTES = 31 * 2**20  # glibc serves blocks of up to 32 MiB from its heap, once one of that size has been freed
HEAP_BYTES = 2**32  # enough for whole batches with their gradients


@cache
def _glibc() -> ctypes.CDLL | None:
    """Return malloc and free. `torch.empty` would not do: a tensor leaves small pieces between the blocks."""
    if os.name != "posix" or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    return libc


def _allocated(size: int) -> int | None:
    """Allocate `size` bytes, or as many as there are, in blocks; free all but the last, which the caller frees."""
    libc, blocks = _glibc(), []
    while libc is not None and len(blocks) * BLOCK_BYTES < size and (block := libc.malloc(BLOCK_BYTES)) is not None:
        blocks.append(block)
    last = blocks.pop() if blocks else None
    for block in blocks:
        _freed(block)
    return last


def _freed(block: int | None) -> None:
    if (libc := _glibc()) is not None:
        libc.free(block)  # freeing `None` does nothing


@cache
def _raise_threshold() -> None:
    """Make glibc serve large blocks from its heap: it raises its threshold when a large block is freed."""
    _freed(_allocated(HEAP_BYTES))


@contextmanager
def keep_memory(up_to: int = HEAP_BYTES) -> Iterator[None]:
    """Keep memory that is freed within the context for what runs next, on a CPU with glibc; elsewhere, do nothing.

    For loops over batches, where fetching memory from the system again takes as long as some of the arithmetic:
    `benchmarks/batch.py` measures how long. Runs over a dataset and the command line use it by themselves; methods do
    not, because it changes the allocator of the whole process.

    Costs about a millisecond, and no memory beyond what would have been returned to the system: a block that is never
    written to holds the end of the heap. When the context ends, free memory can be returned. Nothing is done in a
    process that has begun to use CUDA.

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
        _raise_threshold()
        last = _allocated(up_to)
    try:
        yield
    finally:
        _freed(last)
