"""How many copies of a batch go together while many targets are explained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from pullback._core.batching import ACTIVATION_PER_INPUT, GRADIENT_BYTES, budget_on, chunks, report, rows_together
from pullback._core.many.state import COTANGENT_BYTES, current_run
from pullback._core.types import ChunkSize, Progress
from pullback._torch.internals import compiling


def copies(count: int, size: ChunkSize, like: Sequence[Tensor], progress: Progress = None) -> Iterator[range]:
    """Cut the copies of a batch that a method runs together, `size` at a time, and tell after each how many are done.

    ``"auto"`` takes as many as run fast, guessed by what is explained, which is shaped `like` these; all of them where
    a graph is traced. While targets are run together, it takes as many as keep to four of their budgets, by the
    largest activation and by the attributions of all targets. The first copy then goes alone: its forward tells how
    large an activation is.
    """
    for part in _cut(count, size, like):
        yield part
        report(progress, part.stop, count)


def _cut(count: int, size: ChunkSize, like: Sequence[Tensor]) -> Iterator[range]:
    if size != "auto":
        yield from chunks(count, size)
        return
    running, bytes_of_copy = current_run(), sum(t.numel() * t.element_size() for t in like)
    if running is None or running.chunk_size is None:
        whole = compiling() or running is not None
        yield from chunks(
            count,
            None if whole else rows_together(ACTIVATION_PER_INPUT * bytes_of_copy, like[0].device, GRADIENT_BYTES),
        )
        return
    yield range(min(1, count))
    held = len(running.targets) * bytes_of_copy
    budget = 4 * budget_on(like[0].device, COTANGENT_BYTES)
    for part in chunks(count - 1, max(1, budget // max(1, held, 4 * running.largest))):
        yield range(part.start + 1, part.stop + 1)
