"""The run over a dataset."""

from __future__ import annotations

import copy
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from pullback._core.modules import params_of
from pullback._core.types import Model, Output, Params
from pullback._torch.heap import keep_memory
from pullback.dataset._compute import DTYPES, REDUCTIONS, RESERVED, Method, Recipe, Reduce, Targets, explained
from pullback.dataset._described import described, described_method, described_model, digest
from pullback.dataset._feed import Batch, End, Share, Unpack, batches, is_sized, known_ids, told, unpacked
from pullback.dataset._store import DONE, FAILED, FORMAT, Store, check_writable, exists, open_store, surroundings, zarr

Progress = Callable[[int, "int | None"], Any]
HOPELESS = 64  # examples that could be read and not be explained, before any that could: the call is wrong


@keep_memory()
def explain_dataset(
    method: Method | Mapping[str, Method],
    params: Params,
    model: Model,
    data: Any,
    *,
    targets: Targets,
    out: str | os.PathLike[str],
    batch_size: int = 16,
    chunk_size: int | Literal["auto"] | None = "auto",
    output: Output = None,
    reduce: Reduce | Mapping[str, Reduce] = None,
    dtype: str = "float32",
    scores: bool = True,
    ids: Sequence[str] | None = None,
    unpack: Unpack = unpacked,
    about: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    workers: int = 0,
    on_error: Literal["record", "raise"] = "record",
    retry: bool = False,
    check: bool = False,
    shard: tuple[int, int] | None = None,
    progress: Progress | bool = False,
) -> Any:
    r"""Explain every example of a dataset by several methods, into a Zarr store on the disk.

    .. math:: \text{store}[m][i, k] = m(\text{params}, \text{model}, x_i, t_{ik})

    Batch j holds the examples :math:`jB` to :math:`(j + 1)B - 1`, whatever else happens, so a store is a function of
    the arguments: on one kind of machine and number of threads its arrays are the same to the bit, however often the
    run was killed and begun again, and however many processes shared it. A batch is written whole, then marked; what
    was not marked is done again by the next run with the same arguments. Memory is bounded by the batch.

    Processes under `torchrun`, or with their own `shard`, take every n-th batch each, and share nothing but the store,
    on a file system that all of them see: none waits for another.

    Costs what the methods cost, and a forward for each batch, unless `scores` is off and targets are known without it.

    Args:
        method: ``method(params, model, x, target)``, or several by name. Options are given by `functools.partial`.
        params, model: See `gradient`. The model is as it is, on its device, or copied to `device`.
        data: A dataset (`ImageFolder`, a Hugging Face dataset that returns tensors, a list) read by position; or an
            iterable (a WebDataset, a generator), read once from its start. An example must be the same each time.
        targets: ``"label"``; ``"top5"``, the most probable classes (any number); a list of classes for all examples; a
            function of output ``[batch class]`` and labels ``[batch]`` that returns ``[batch target]``; `None` where
            the output is one score.
        out: Folder of the store. If it is there, the run goes on with it.
        batch_size: Examples explained together; also of a chunk of the store.
        chunk_size: Targets pulled back together, see `over_targets`.
        output: Which part of the model's output is explained.
        reduce: ``"sum"`` or ``"peak"`` over channels, or a function ``[batch channel ...] -> [batch 1 ...]``; by name
            of the method, or one for all. Full attributions if omitted.
        dtype: ``"float32"``, or ``"float16"``: half the bytes, and 11 bits of the largest values of each map, however
            small they are. A map is divided by a power of two, which ``NAME_scale`` holds; `read` multiplies it back.
        scores: Record the scores of the targets.
        ids: Names of the examples. If omitted, those that the dataset has, or positions.
        unpack: From an item of the dataset to (input, label or None, id or None). If omitted: a tensor, a tuple in this
            order, or a dict with ``label`` and ``id`` (or ``labels``, ``cls``, ``__key__``) beside the input.
        about: What else the results depend on, such as the preprocessing; kept, and compared as options are.
        device: Where to compute. Where the params are, if omitted. ``"cuda"`` is ``cuda:LOCAL_RANK`` under `torchrun`.
        workers: Processes that read examples, see `torch.utils.data.DataLoader`; one at most for an iterable.
        on_error: ``"record"``: an example that cannot be read or explained is recorded with its error, and its rows are
            NaN; the others of its batch come out the same to the bit. ``"raise"``: stop there.
        retry: Do batches again in which examples failed before.
        check: Read back all that is done, and do again what is damaged.
        shard: (rank, number of processes). If omitted, that of `torch.distributed`, of `torchrun`'s environment, or
            (0, 1).
        progress: Called with (examples done, examples in all or None) of this process; True for a bar by tqdm, with
            rate and time to go.

    Returns:
        The store, a `zarr.Group`, open for reading when this process has done its share: ``[example target ...]`` for
        each method, ``targets`` and ``scores`` ``[example target]``, and ``ids``, ``labels``, ``status`` (0 to do, 1
        done, 2 failed) and ``errors`` ``[example]``. Its attributes hold methods, options, versions, and a checksum of
        the params.

    Raises:
        ValueError: If `out` holds the results of other arguments, which are named; or an argument is not as above, so
            that none of the first examples can be explained.
        OSError: If `out` cannot be written to, or the disk is full. What is marked stays good.
        RuntimeError: If memory or the device fails; with ``on_error="raise"``, if an example does.

    Example:
        >>> import tempfile
        >>> model = torch.nn.Linear(3, 4).eval()
        >>> data = [(torch.randn(3), i % 4) for i in range(10)]
        >>> with tempfile.TemporaryDirectory() as out:
        ...     store = explain_dataset(gradient, {}, model, data, targets="label", out=out, batch_size=4)
        ...     a = torch.from_numpy(store["gradient"][:])  # [example target 3], a row of the weight for each label
        >>> torch.equal(a[:, 0], model.weight[[label for _, label in data]])
        True
    """
    zarr()
    methods, reductions = as_asked(
        method, reduce, targets=targets, batch_size=batch_size, chunk_size=chunk_size, dtype=dtype, on_error=on_error
    )
    path = Path(out)
    rank, world = _shard(shard)
    device, params, model = placed(device, params, model)
    ids = known_ids(data) if ids is None and is_sized(data) else ids
    length = len(data) if is_sized(data) else None
    if ids is not None and (length is None or len(ids) != length):
        raise ValueError(
            f"`ids` must name each of the {'known' if length is None else length} examples, got {len(ids)}."
        )

    recipe = Recipe(methods, params, model, targets, chunk_size, output, reductions, dtype, scores, device)
    metadata = {
        "pullback": FORMAT,
        "methods": {name: described_method(m) for name, m in methods.items()},
        **described_model(params, model),
        "targets": described(targets),
        "batch_size": batch_size,
        "chunk_size": chunk_size,
        "output": described(output),
        "reduce": {name: described(r) for name, r in reductions.items()},
        "dtype": dtype,
        "scores": scores,
        "length": length,
        "ids": None if ids is None else digest(json.dumps(list(ids))),
        "about": described(about or {}),
        "root": os.path.abspath(root) if isinstance(root := getattr(data, "root", None), str | os.PathLike) else None,
        **surroundings(device),
    }
    check_writable(path)
    store = Store(path, metadata, ids) if exists(path) else None
    share = Share(rank, world, frozenset() if store is None else store.done(check, retry))
    feed = batches(
        data,
        ids=ids,
        unpack=unpack,
        batch_size=batch_size,
        share=share,
        workers=workers,
        pinned=device.type == "cuda",
    )
    report = _reporter(progress)
    done, mine = _counts(length, batch_size, share)
    report(done, mine)
    held: list[Batch] = []  # all examples broken, before a first result says what a store is made for
    tried = 0  # of them those that could be read
    try:
        for batch in feed:
            if isinstance(batch, End):
                if batch.error:
                    raise RuntimeError(f"`data` broke after {batch.length} examples: {batch.error}")
                continue
            results, errors = explained(recipe, batch, on_error)
            held.append(replace(batch, x=None, errors=errors))
            if store is None and results is None:
                tried += len(batch.places)
                if tried >= HOPELESS and not exists(path):
                    raise ValueError(_nothing_explained(held, f"None of the first {tried} examples"))
                continue
            if store is None:
                assert results is not None
                store = Store.create(path, metadata, results, length or 0)
            for earlier in held[:-1]:
                _submit(store, earlier, None, on_error)
            _submit(store, held[-1], results, on_error)
            done, held = done + sum(len(b.ids) for b in held), []
            report(done, mine)
        if store is None:
            store = _store_of_others(path, metadata, held, world)
        for earlier in held:
            _submit(store, earlier, None, on_error)
        report(done + sum(len(b.ids) for b in held), mine)
        store.wait()
    finally:
        if store is not None:
            store.close()
        report(None, None)
    return open_store(path)


def _submit(store: Store, batch: Batch, results: Mapping[str, torch.Tensor] | None, on_error: str) -> None:
    size, errors = len(batch.ids), batch.errors
    try:
        rows = store.rows(size, results, sorted(errors))
    except ValueError as error:
        if on_error == "raise":
            raise
        errors = {place: told(error) for place in range(size)} | errors
        rows = store.rows(size, None, ())
    labels = np.full(size, -1, np.int64)
    labels[batch.places] = batch.labels.numpy()
    status = np.array([FAILED if place in errors else DONE for place in range(size)], np.uint8)
    texts = np.array([errors.get(place, "") for place in range(size)], object)
    rows |= {"ids": np.array(batch.ids, object), "labels": labels, "errors": texts, "status": status}
    store.submit(batch.start, rows)


def _store_of_others(path: Path, metadata: Mapping[str, Any], held: Sequence[Batch], world: int) -> Store:
    """Where no example of this process could be explained, another's results say what a store is made for."""
    patience = 600 if world > 1 else 0
    for _ in range(patience * 5):
        if exists(path):
            return Store(path, metadata)
        time.sleep(0.2)
    if not held:
        raise ValueError("`data` has no examples.")
    raise ValueError(_nothing_explained(held, "None of the examples"))


def _nothing_explained(held: Sequence[Batch], which: str) -> str:
    of_methods = [batch.errors[place] for batch in held for place in batch.places]
    of_data = [error for batch in held for error in batch.errors.values()]
    return f"{which} could be explained. The first one: {(of_methods or of_data)[0]}"


def _counts(length: int | None, batch_size: int, share: Share) -> tuple[int, int | None]:
    """Examples of a share that are done, and in all, where that is known."""
    whole = replace(share, done=frozenset())
    done = [n for n in share.done if n in whole]
    if length is None:
        return len(done) * batch_size, None
    sizes = [min(length, (n + 1) * batch_size) - n * batch_size for n in range(-(-length // batch_size))]
    return sum(sizes[n] for n in done), sum(size for n, size in enumerate(sizes) if n in whole)


def _reporter(progress: Progress | bool) -> Callable[[int | None, int | None], None]:
    """Call `progress`, or draw a bar; (None, None) ends it."""
    bar: Any = None

    def report(done: int | None, total: int | None) -> None:
        nonlocal bar
        if progress is False:
            return
        if progress is not True:
            if done is not None:
                progress(done, total)
            return
        if done is None:
            if bar is not None:
                bar.close()
            return
        if bar is None:
            try:
                from tqdm.auto import tqdm
            except ModuleNotFoundError as error:
                raise ImportError("`progress` as a bar needs tqdm: pip install tqdm, or give a function.") from error
            bar = tqdm(total=total, initial=done, unit=" examples")
        bar.update(done - bar.n)

    return report


# -- what was asked for


def _name(method: Method) -> str:
    while isinstance(method, partial):
        method = method.func
    return getattr(method, "__name__", "") if getattr(method, "__name__", "<")[:1] != "<" else "attribution"


def as_asked(
    method: Method | Mapping[str, Method],
    reduce: Reduce | Mapping[str, Reduce],
    *,
    targets: Any,
    batch_size: int = 1,
    chunk_size: Any = "auto",
    dtype: str = "float32",
    on_error: str = "record",
) -> tuple[dict[str, Method], dict[str, Reduce]]:
    """Give methods and reductions by name, and check the arguments."""
    methods = dict(method) if isinstance(method, Mapping) else {_name(method): method}
    for name, method in methods.items():
        if not callable(method):
            raise TypeError(
                f"`method` must be a function or several by name, got {type(method).__name__} for {name!r}."
            )
        if not re.fullmatch(r"[\w.-]*\w", name) or name in RESERVED:
            raise ValueError(
                "`method` must have names of letters, digits, `_`, `.` and `-`, other than those of axes and other "
                f"arrays, {', '.join(sorted(RESERVED))}; got {name!r}."
            )
    if not methods:
        raise ValueError("`method` must name at least one method, got none.")
    if isinstance(targets, str) and not re.fullmatch("label|top[1-9][0-9]*", targets):
        raise ValueError(
            f"`targets` must be 'label', 'top5' (or another number), classes or a function, got {targets!r}."
        )
    if isinstance(targets, int) or (
        targets is not None and not isinstance(targets, str) and not callable(targets) and not len(targets)
    ):
        raise ValueError(f"`targets` must be a list of at least one class, got {targets!r}.")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size!r}.")
    if chunk_size not in ("auto", None) and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"`chunk_size` must be at least 1, 'auto' or None, got {chunk_size!r}.")
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be 'float16' or 'float32', got {dtype!r}.")
    if on_error not in ("record", "raise"):
        raise ValueError(f"`on_error` must be 'record' or 'raise', got {on_error!r}.")
    return methods, _reductions(reduce, methods)


def _reductions(reduce: Reduce | Mapping[str, Reduce], methods: Mapping[str, Method]) -> dict[str, Reduce]:
    by_name = dict(reduce) if isinstance(reduce, Mapping) else dict.fromkeys(methods, reduce)
    for name, own in by_name.items():
        if name not in methods:
            raise ValueError(f"`reduce` must be for methods that are run, {', '.join(methods)}, got {name!r}.")
        if own is not None and not callable(own) and own not in REDUCTIONS:
            raise ValueError(f"`reduce` must be 'sum', 'peak', a function or None, got {own!r}.")
    return {name: own for name, own in by_name.items() if own is not None}


def _shard(shard: tuple[int, int] | None) -> tuple[int, int]:
    if shard is None:
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    rank, world = shard
    if not 0 <= rank < world:
        raise ValueError(f"`shard` must be (rank, number of processes) with 0 <= rank < number, got {shard}.")
    return rank, world


def placed(device: Any, params: Params, model: Model) -> tuple[torch.device, Params, Model]:
    """Give params and model on a device; the caller's stay where they are."""
    here = _device_of(params, model)
    if device is None:
        return here, params, model
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    if device == here:
        return device, params, model
    moved: Any = (
        tuple({k: v.to(device) for k, v in part.items()} for part in params)
        if isinstance(params, tuple)
        else {k: v.to(device) for k, v in params.items()}
    )
    return device, moved, copy.deepcopy(model).to(device) if isinstance(model, nn.Module) else model


def _device_of(params: Params, model: Model) -> torch.device:
    given = [t for part in (params if isinstance(params, tuple) else (params,)) for t in part.values()]
    own = list(params_of(model).values()) if isinstance(model, nn.Module) and not given else []
    return next(iter([*given, *own]), torch.zeros(())).device
