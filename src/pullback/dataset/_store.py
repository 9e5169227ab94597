"""A Zarr store of explanations: made in one move, written batch by batch, a batch marked when it is whole."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback._core.types import PullbackWarning
from pullback.dataset._described import differences

FORMAT = 1
DONE, FAILED = 1, 2  # of `status`; 0 is what is not done yet
AXES = {
    1: ("value",),
    2: ("token", "channel"),
    3: ("channel", "height", "width"),
    4: ("channel", "depth", "height", "width"),
}
COMPRESSION = {"level": 1, "checksum": True}
CHUNK = 64 * 2**20  # bytes of a chunk, about, that only many targets would exceed
SURROUNDINGS = ("versions", "device", "threads")  # of the metadata: told where they change, but not refused


def zarr() -> Any:
    try:
        return import_module("zarr")
    except ModuleNotFoundError as error:
        raise ImportError(
            "`pullback.dataset` needs zarr 3, and that Python 3.11: pip install 'pullback[scale]'"
        ) from error


def surroundings(device: torch.device) -> dict[str, Any]:
    """Say where the results are computed: the last bits depend on it."""
    found = {"python": platform.python_version()}
    for package in ("pullback", "torch", "numpy", "zarr"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else device.type
    return {"versions": found, "device": name, "threads": None if on_cuda else torch.get_num_threads()}


@contextmanager
def options_text(out: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(error.errno, f"`out` {str(out)!r} cannot be {doing}: {reason}.") from error


def check_writable(out: Path) -> None:
    """Find out before the first batch is explained."""
    with options_text(out, "written to"):
        folder = out if out.is_dir() else out.parent
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def exists(out: Path) -> bool:
    if (out / "zarr.json").is_file():
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"`out` {str(out)!r} is there and is no store of results: choose another place.")
    return False


def open_store(path: str | os.PathLike[str]) -> Any:
    """Open a store of results, to be read.

    The same as ``zarr.open_group(path, mode="r")``, but for errors that say what is wrong.

    Returns:
        A `zarr.Group` of the arrays ``ids``, ``labels``, ``targets``, ``scores``, ``status``, ``errors`` and one for
        each method; its ``attrs`` say how they were made.

    Raises:
        ValueError: If there is no such store, or it is of another kind.
    """
    return _opened(Path(path), "r")


def _opened(path: Path, mode: str) -> Any:
    package = zarr()
    if not (path / "zarr.json").is_file():
        raise ValueError(f"No store of results at {str(path)!r}.")
    try:
        group = package.open_group(str(path), mode=mode, use_consolidated=False)
        kind = group.attrs.get("pullback")
    except Exception as error:
        raise ValueError(f"{str(path)!r} is damaged, or no Zarr store: {error}") from error
    if kind != FORMAT:
        raise ValueError(
            f"{str(path)!r} is no store of results in format {FORMAT}: its attribute `pullback` is {kind!r}."
        )
    return group


def read(store: Any, name: str, examples: slice | int = slice(None)) -> np.ndarray:
    """Read an array, or part of it; half precision comes back as float32, in the attribution's unit.

    Args:
        store: What `explain_dataset` or `open_store` returns.
        name: Of a method, or another array of the store.
        examples: Which of them, along the first axis.

    Returns:
        ``[example target ...]`` for a method, NaN where an example failed or is not done yet.

    Raises:
        ValueError: If there is no such array, or it is damaged on the disk.
    """
    if name not in store:
        raise ValueError(f"`name` must be one of {', '.join(sorted(store))}, got {name!r}.")
    values = _values(store, name, examples)
    if f"{name}_scale" not in store:
        return values
    scale = _values(store, f"{name}_scale", examples)
    return values.astype(np.float32) * scale.reshape(*scale.shape, *[1] * (values.ndim - scale.ndim))


def _values(store: Any, name: str, examples: slice | int) -> np.ndarray:
    try:
        return np.asarray(store[name][examples])
    except (IndexError, KeyboardInterrupt):
        raise
    except Exception as error:
        rows = range(store[name].shape[0])[examples]
        where = f"example {rows}" if isinstance(rows, int) else f"examples {rows[0]} to {rows[-1]}"
        raise ValueError(
            f"`{name}` of {where} is damaged in {_path(store)}: {' '.join(str(error).split())[:200]}. Run "
            "again with check=True: what is damaged is explained again."
        ) from error


def _path(store: Any) -> str:
    return repr(str(getattr(store.store, "root", store.store)))


class Store:
    """A store that is being written.

    Every file is written beside its place and moved there, and the chunk of `status` that marks a batch comes after the
    batch's other chunks: whenever the process is killed, what is marked is whole.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], ids: Sequence[str] | None = None) -> None:
        self.path = path
        self.group = _opened(path, "r+")
        held = dict(self.group.attrs)
        apart = (*SURROUNDINGS, "root")
        before, now = ({k: v for k, v in m.items() if k not in apart} for m in (held, metadata))
        found = differences(before, now)
        if found:
            raise ValueError(
                f"`out` {str(path)!r} holds the results of another run: {'; '.join(found + self._gone(ids))}. "
                "Choose another place, or delete it."
            )
        before, now = ({k: m.get(k) for k in SURROUNDINGS} for m in (held, metadata))
        changed = differences(before, now)
        if changed:
            message = (
                f"{str(path)!r} was begun elsewhere, so results may differ in the last bits: {'; '.join(changed)}."
            )
            warnings.warn(message, PullbackWarning, stacklevel=4)
        self.batch_size = int(held["batch_size"])
        self.arrays = {name: self.group[name] for name in self.group}
        self.writer = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def _gone(self, ids: Sequence[str] | None) -> list[str]:
        """Name an example that has results and is not among those of now."""
        now = set(map(str, ids or ()))
        gone = [name for name in read(self.group, "ids") if name and name not in now] if ids is not None else []
        more = f", nor {len(gone) - 1} more" if len(gone) > 1 else ""
        return [f"example {name!r} is no longer there{more}" for name in gone[:1]]

    @classmethod
    def create(cls, path: Path, metadata: Mapping[str, Any], results: Mapping[str, Tensor], length: int) -> Store:
        """Make a store for such results as those of a first batch; another process may be faster."""
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            with options_text(path, "written to"):
                _make(draft, metadata, results, length)
                try:
                    draft.rename(path)
                except OSError:
                    if not exists(path):
                        raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return cls(path, metadata)

    def done(self, check: bool, retry: bool) -> frozenset[int]:
        """Give the numbers of the batches that are done: not those that are damaged, if they are to be checked, nor
        those with failures, if they are to be tried again."""
        size, length = self.batch_size, self.arrays["status"].shape[0]

        def is_done(part: slice, status: np.ndarray) -> bool:
            if not (status != 0).all() or (retry and (status == FAILED).any()):
                return False
            for name in self.arrays if check else ():
                read(self.group, name, part)
            return True

        found = set()
        whole = None if check else read(self.group, "status")
        for start in range(0, length, size):
            part = slice(start, min(start + size, length))
            with suppress(ValueError) if check else nullcontext():
                if is_done(part, read(self.group, "status", part) if whole is None else whole[part]):
                    found.add(start // size)
        return frozenset(found)

    def submit(self, start: int, values: Mapping[str, np.ndarray]) -> None:
        """Write a batch while the next is explained."""
        self.wait()
        self.pending = self.writer.submit(self._write, start, values)

    def wait(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            with options_text(self.path, "written to"):
                pending.result()

    def close(self) -> None:
        self.writer.shutdown(wait=True)

    def _write(self, start: int, values: Mapping[str, np.ndarray]) -> None:
        stop = start + len(values["status"])
        for name in [*(name for name in values if name != "status"), "status"]:
            array = self.arrays[name]
            if array.shape[0] < stop:  # a stream has no length before its end
                array.resize((stop, *array.shape[1:]))
            _write_chunks(self.path / name, array, start // self.batch_size, values[name])

    def rows(self, size: int, results: Mapping[str, Tensor] | None, failed: Sequence[int]) -> dict[str, np.ndarray]:
        """Give a batch's results with nothing in the rows that failed.

        Raises:
            ValueError: If they are not of the shape of the results before them.
        """
        found = {}
        for name, array in self.arrays.items():
            if name in ("ids", "labels", "status", "errors"):
                continue
            shape = (size, *array.shape[1:])
            if results is None:
                found[name] = np.full(shape, array.fill_value, dtype=array.dtype)
                continue
            values = results[name].numpy()
            if values.shape != shape:
                raise ValueError(
                    f"`{name}` is {list(values.shape[1:])} for each example, where it was {list(shape[1:])} for those "
                    "before. Give all examples one shape, or all results, by `reduce`."
                )
            if failed:
                values = values.copy()
                values[list(failed)] = array.fill_value
            found[name] = values
        return found


def _write_chunks(folder: Path, array: Any, number: int, values: np.ndarray) -> None:
    """Write the chunks of a batch, as Zarr does for codecs of ours: it would take 2.5 ms of Python for each array,
    which the methods wait for."""
    for at in range(-(-array.shape[1] // array.chunks[1]) if array.ndim > 1 else 1):
        part = values if array.ndim == 1 else values[:, at * array.chunks[1] :][:, : array.chunks[1]]
        file = folder / array.metadata.encode_chunk_key((number, at, *[0] * array.ndim)[: array.ndim])
        if _is_nothing(part, array.fill_value):
            file.unlink(missing_ok=True)
            continue
        if part.shape != array.chunks:
            whole = np.full(array.chunks, array.fill_value, part.dtype)
            whole[tuple(map(slice, part.shape))] = part
            part = whole
        draft = file.with_suffix(f".{uuid.uuid4().hex}.partial")
        try:
            draft.write_bytes(_encoded(part, array.metadata.data_type.to_native_dtype()))
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)


def _is_nothing(values: np.ndarray, fill: Any) -> bool:
    def same(values: np.ndarray) -> bool:
        return bool((values == fill).all() if fill == fill else np.isnan(values).all())

    return same(values.flat[:1]) and same(values)


def _encoded(values: np.ndarray, dtype: np.dtype) -> bytes:
    """Encode a chunk by the codecs of `_make`: little-endian bytes or texts of any length, then zstd."""
    if values.dtype == object:
        raw = import_module("numcodecs.vlen").VLenUTF8().encode(values)
    else:
        raw = np.ascontiguousarray(values, dtype.newbyteorder("<"))
    return import_module("numcodecs.zstd").Zstd(**COMPRESSION).encode(raw)


def _make(path: Path, metadata: Mapping[str, Any], results: Mapping[str, Tensor], length: int) -> None:
    package = zarr()
    codec = import_module("zarr.codecs").ZstdCodec(**COMPRESSION)
    group = package.open_group(str(path), mode="w-", attributes=dict(metadata))
    batch = int(metadata["batch_size"])
    sizes: dict[str, int] = {}

    def add(name: str, shape: Sequence[int], dtype: Any, fill: Any, axes: Sequence[str]) -> None:
        chunks = [batch, *shape]
        if len(shape) > 1:
            row = batch * int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
            chunks[1] = max(1, min(shape[0], CHUNK // max(1, row)))
        group.create_array(
            name,
            shape=(length, *shape),
            chunks=tuple(max(1, n) for n in chunks),
            dtype=dtype,
            fill_value=fill,
            compressors=codec,
            chunk_key_encoding={"name": "default", "separator": "."},  # a folder an array, not one a chunk
            dimension_names=("example", *axes),
        )

    add("ids", (), "str", "", ())
    add("labels", (), "int64", -1, ())
    add("status", (), "uint8", 0, ())
    add("errors", (), "str", "", ())
    for name, tensor in results.items():
        shape = tuple(tensor.shape[1:])
        if not tensor.is_floating_point():
            add(name, shape, "int64", -1, ("target",))
            continue
        axes = ["target"]
        for axis, size in zip(AXES.get(len(shape) - 1, range(len(shape) - 1)), shape[1:], strict=True):
            own = axis if sizes.setdefault(str(axis), size) == size else f"{name}_{axis}"
            axes.append(str(own))
        add(name, shape, str(tensor.dtype).removeprefix("torch."), np.nan, axes)
