"""How many copies of a batch run together, also while many targets are explained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from pullback._core.batching import ACTIVATION_PER_INPUT, GRADIENT_BYTES, budget_on, chunks, rows_together
from pullback._core.many.state import COTANGENT_BYTES, TargetRun, local
from pullback._core.types import ChunkSize, Progress
from pullback._torch.internals import compiling


def copies(count: int, size: ChunkSize, like: Sequence[Tensor], progress: Progress = None) -> Iterator[range]:
    """Cut the copies of a batch that a method runs into chunks of `size`, and report progress after each.

    ``"auto"`` takes as many as run fast, by an estimate from what is explained, which is shaped `like` these; all of
    them where a graph is traced. While many targets are explained it takes as many as keep to a memory budget.
    """
    many = None if compiling() else getattr(local, "many", None)
    if size != "auto":
        parts: Iterable[range] = chunks(count, size)
    elif many is not None and many.chunk_size is not None:
        parts = _within_budget(count, many, like)
    else:
        row = ACTIVATION_PER_INPUT * sum(t.numel() * t.element_size() for t in like)
        all_at_once = compiling() or many is not None
        parts = chunks(count, None if all_at_once else rows_together(row, like[0].device, GRADIENT_BYTES))
    for part in parts:
        yield part
        if progress is not None and not compiling():
            progress(part.stop, count)


def _within_budget(count: int, many: TargetRun, like: Sequence[Tensor]) -> Iterator[range]:
    """Keep the largest activation, and the attributions of all targets, to four times the budget of their cotangents.

    The first copy goes alone: its forward tells how large an activation is.
    """
    yield range(min(1, count))
    held = len(many.targets) * sum(t.numel() * t.element_size() for t in like)
    budget = 4 * budget_on(like[0].device, COTANGENT_BYTES)
    for part in chunks(count - 1, max(1, budget // max(1, held, 4 * many.largest))):
        yield range(part.start + 1, part.stop + 1)
