"""Feed a dataset in batches that are always the same: batch i holds the examples i B to (i + 1) B - 1.

Which examples meet in a batch does not depend on how many processes there are, on what was done before, or on which
examples cannot be read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pullback._core.types import Inputs

Unpack: TypeAlias = "Callable[[Any], tuple[Any, int | None, str | None]]"
LABELS, IDS = ("label", "labels", "cls"), ("__key__", "id")


@dataclass
class Batch:
    """Some examples that follow one another.

    `x` and `labels` hold the examples at `places`, those that could be read; `errors` says what became of the others.
    """

    number: int
    start: int
    ids: list[str]
    x: Inputs | None
    labels: Tensor
    places: list[int]
    errors: dict[int, str]

    def pin_memory(self) -> Batch:
        return replace(self, x=None if self.x is None else each_tensor(Tensor.pin_memory, self.x))

    def full(self, kept: Sequence[int]) -> tuple[Inputs, Tensor]:
        """Give inputs and labels of the batch's whole length: copies of the first of `kept` stand at all other places.

        An example's results can depend on the length of its batch in the last bits. They do not depend on the others.
        """
        assert self.x is not None
        if len(kept) == len(self.ids):
            return self.x, self.labels
        row = {place: i for i, place in enumerate(self.places)}
        rows = torch.tensor([row[place if place in kept else kept[0]] for place in range(len(self.ids))])
        return each_tensor(lambda t: t[rows], self.x), self.labels[rows]


@dataclass
class End:
    """A stream ended after so many examples, or broke."""

    length: int
    error: str = ""


def each_tensor(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    if isinstance(x, Mapping):
        return {k: each_tensor(function, v) for k, v in x.items()}
    return tuple(each_tensor(function, v) for v in x) if isinstance(x, tuple) else function(x)


def told(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:500]}" if lines else type(error).__name__


# -- examples


@dataclass
class _Example:
    x: Any
    label: int
    id: str | None


def unpacked(item: Any) -> tuple[Any, int | None, str | None]:
    """Take an item apart: input, label, id.

    A tensor; a tuple (input, label, id), the last two if there are any; or a dict, where ``label``, ``labels`` or
    ``cls`` is the label, ``__key__`` or ``id`` the id, and the rest the input: a tensor if it is one, or a dict.
    """
    if isinstance(item, Mapping):
        label = next((item[k] for k in LABELS if k in item), None)
        id = next((item[k] for k in IDS if k in item), None)
        rest = {k: v for k, v in item.items() if k not in (*LABELS, *IDS) and not str(k).startswith("__")}
        return (next(iter(rest.values())) if len(rest) == 1 else rest), label, id
    if isinstance(item, tuple | list) and 1 <= len(item) <= 3:
        x, label, id = (*item, None, None)[:3]
        return x, label, id
    return item, None, None


def _example(item: Any, unpack: Unpack) -> _Example | str:
    """Give an example, or what is wrong with it."""
    try:
        x, label, id = unpack(item)
        return _Example(_tensors(x), -1 if label is None else int(label), None if id is None else str(id))
    except Exception as error:
        return told(error)


def _tensors(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {str(k): _tensors(v) for k, v in x.items()}
    if isinstance(x, tuple | list):
        return tuple(_tensors(v) for v in x)
    if not isinstance(x, Tensor | np.ndarray):
        raise TypeError(f"an example must be a tensor, or a tuple or dict of tensors, got {type(x).__name__}")
    return torch.as_tensor(x)


def _collated(start: int, examples: Sequence[_Example | str], ids: Sequence[str | None], batch_size: int) -> Batch:
    whole = {place: e for place, e in enumerate(examples) if isinstance(e, _Example)}
    errors = {place: e for place, e in enumerate(examples) if isinstance(e, str)}
    shapes = {place: _shape(e.x) for place, e in whole.items()}
    usual = max(Counter(shapes.values()).items(), key=lambda pair: pair[1])[0] if shapes else ""
    for place, shape in shapes.items():
        if shape != usual:
            errors[place] = f"ValueError: the example is {shape}, where others are {usual}"
    places = [place for place in whole if place not in errors]
    chosen = [whole[place] for place in places]
    names = [_id(examples[place], ids[place], start + place) for place in range(len(examples))]
    labels = torch.tensor([e.label for e in chosen], dtype=torch.long)
    x = _stacked([e.x for e in chosen]) if chosen else None
    return Batch(start // batch_size, start, names, x, labels, places, errors)


def _id(example: _Example | str, given: str | None, position: int) -> str:
    if given is not None:
        return given
    return example.id if isinstance(example, _Example) and example.id is not None else str(position)


def _shape(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
    items = x.items() if isinstance(x, Mapping) else enumerate(x)
    return ", ".join(f"{key}: {_shape(value)}" for key, value in items)


def _stacked(xs: Sequence[Any]) -> Any:
    if isinstance(xs[0], Tensor):
        return torch.stack(list(xs))
    if isinstance(xs[0], Mapping):
        return {key: _stacked([x[key] for x in xs]) for key in xs[0]}
    return tuple(_stacked(column) for column in zip(*xs, strict=True))


# -- where they come from


def is_sized(data: Any) -> bool:
    """Say whether the examples can be read by position; otherwise they come in a stream."""
    if isinstance(data, IterableDataset | Iterator):
        return False
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return True
    if not isinstance(data, Iterable):
        raise TypeError(f"`data` must be a dataset, a sequence or an iterable of examples, got {type(data).__name__}.")
    return False


def known_ids(data: Any) -> list[str] | None:
    """Give the ids that are known without reading the examples: the files of an `ImageFolder`, below its root."""
    if isinstance(ids := getattr(data, "ids", None), list):
        return [str(id) for id in ids]
    samples, root = getattr(data, "samples", None), getattr(data, "root", None)
    if not isinstance(samples, list) or root is None:
        return None
    paths = [Path(sample[0]) for sample in samples]
    return [(p.relative_to(root) if p.is_relative_to(root) else p).as_posix() for p in paths]


class _Sized(Dataset[Any]):
    def __init__(self, data: Any, ids: Sequence[str] | None, unpack: Unpack) -> None:
        self.data, self.ids, self.unpack = data, ids, unpack

    def __getitem__(self, position: int) -> tuple[int, _Example | str, str | None]:
        try:
            found = _example(self.data[position], self.unpack)
        except Exception as error:
            found = told(error)
        return position, found, None if self.ids is None else self.ids[position]


@dataclass(frozen=True)
class Share:
    """The batches that this process explains: every `world`-th, but for those that are done."""

    rank: int = 0
    world: int = 1
    done: frozenset[int] = frozenset()

    def __contains__(self, number: int) -> bool:
        return number % self.world == self.rank and number not in self.done


class _Stream(IterableDataset[Any]):
    def __init__(self, data: Any, batch_size: int, share: Share, unpack: Unpack) -> None:
        self.data, self.batch_size, self.share, self.unpack = data, batch_size, share, unpack

    def __iter__(self) -> Iterator[Batch | End]:
        position, held = 0, []
        try:
            for item in self.data:
                if position // self.batch_size in self.share:
                    held.append(_example(item, self.unpack))
                position += 1
                if held and position % self.batch_size == 0:
                    yield _collated(position - len(held), held, [None] * len(held), self.batch_size)
                    held = []
        except Exception as error:
            yield End(position, told(error))
            return
        if held:
            yield _collated(position - len(held), held, [None] * len(held), self.batch_size)
        yield End(position)


def batches(
    data: Any,
    *,
    ids: Sequence[str] | None,
    unpack: Unpack,
    batch_size: int,
    share: Share,
    workers: int,
    pinned: bool,
) -> Iterator[Batch | End]:
    """Give the batches of a share, in order; a stream ends with an `End`.

    A stream is read by one worker at most: several would each read all of it.
    """
    common: dict[str, Any] = {"pin_memory": pinned, "generator": torch.Generator().manual_seed(0)}
    if not is_sized(data):
        stream = _Stream(data, batch_size, share, unpack)
        return iter(DataLoader(stream, batch_size=None, num_workers=min(workers, 1), collate_fn=_itself, **common))
    length = len(data)
    starts = [n * batch_size for n in range(-(-length // batch_size)) if n in share]
    positions = [list(range(start, min(length, start + batch_size))) for start in starts]
    if not positions:
        return iter(())
    collate = partial(_collate, batch_size=batch_size)
    reading = _Sized(data, ids, unpack)
    return iter(DataLoader(reading, batch_sampler=positions, num_workers=workers, collate_fn=collate, **common))


def _collate(items: Sequence[tuple[int, _Example | str, str | None]], batch_size: int) -> Batch:
    positions, examples, ids = zip(*items, strict=True)
    return _collated(positions[0], examples, ids, batch_size)


def _itself(item: Any) -> Any:
    return item
