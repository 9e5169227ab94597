"""How many copies of a batch run together.

On a CPU a larger batch saves little, and one whose largest activation exceeds some tens of megabytes costs more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pullback._core.types import ChunkSize, Progress
from pullback._torch.internals import compiling

# Budgets for the largest activation of the rows that run together, on a CPU and elsewhere: in forwards alone, and where
# a graph keeps all activations.
FORWARD_BYTES, GRADIENT_BYTES = (20 * 2**20, 512 * 2**20), (40 * 2**20, 128 * 2**20)
ACTIVATION_PER_INPUT = 8  # an estimate of largest activation over input, where it is not measured
MAX_ROWS = 1024  # that run together, however small they are


def budget_on(device: torch.device, budgets: tuple[int, int]) -> int:
    """Choose between a number of bytes for a CPU and one for elsewhere."""
    return budgets[0 if device.type == "cpu" else 1]


def rows_together(bytes_per_row: int, device: torch.device, budgets: tuple[int, int] = FORWARD_BYTES) -> int:
    """Return how many rows run fastest together, by the size of a row's largest activation."""
    return max(1, min(MAX_ROWS, budgets[device.type != "cpu"] // max(1, bytes_per_row)))


def chunks(count: int, size: ChunkSize) -> Iterator[range]:
    """Cut ``range(count)`` into ranges of at most `size`."""
    if isinstance(size, str):
        raise ValueError(f"`chunk_size` must be a number, 'auto' or None, got {size!r}.")
    if size is not None and size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {size}.")
    size = size or count
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def report(progress: Progress, done: int, total: int) -> None:
    """Report progress to the caller's function."""
    if progress is not None and not compiling():
        progress(done, total)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that masks and sums are computed in: at least float32."""
    return torch.promote_types(dtype, torch.float32)
