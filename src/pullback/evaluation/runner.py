"""Judge methods on examples, and lose nothing when it is interrupted.

A unit of work is one method on one example, all of its targets from one forward of the model. Its results are one line
of the journal ``journal.jsonl``, written at once; a run into the same folder skips what the journal holds. A line that
was cut short is read over, and its unit done again. Results of another model are refused; other options of a method or
metric are other results, and stand beside the first.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pullback import maps
from pullback._core.many.over_targets import over_targets
from pullback._core.modules import params_of
from pullback._core.types import PullbackWarning
from pullback._networks.messages import first_line
from pullback._torch.heap import keep_memory
from pullback.evaluation.examples import Example, first
from pullback.metrics import METRICS

Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A method as it is judged.

    Args:
        method: ``method(params, model, x, target, **options)``.
        options: Passed to it.
        reduce: How channels become a map: ``"sum"`` for shares of the score, ``"peak"``, the largest magnitude, for
            sensitivities, whose sign says nothing of where.
        examples: Judge it on the first so many examples only. All if omitted.
        together: Explain all targets at once, under `vmap`. Where False, one after the other.
    """

    method: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    reduce: Literal["sum", "peak"] = "sum"
    examples: int | None = None
    together: bool = True

    def reduced(self, attribution: Tensor) -> Tensor:
        """Bring an attribution's channels together."""
        if attribution.ndim != 4:
            return attribution
        return maps.channel_peak(attribution) if self.reduce == "peak" else maps.channel_sum(attribution)

    def map(self, params: Any, model: Any, x: Tensor, target: Any) -> Tensor:
        """Explain: the method with its options and its channels brought together."""
        return self.reduced(self.method(params, model, x, target, **self.options))

    @property
    def description(self) -> str:
        """The options in one line, which tells results of one set of options from those of another."""
        method, options = self.method, dict(self.options)
        while isinstance(method, partial):
            method, options = method.func, {**method.keywords, **options}
        name = [] if self.reduce == "sum" else [self.reduce]
        return ", ".join([*name, *(f"{key}={_described(options[key])}" for key in sorted(options))])


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)}#{_digest([value])}" if value.numel() > 1 else f"{value.item():g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_described(k)}: {_described(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_described, value)) + "]"
    if isinstance(value, partial):
        return Entry(value).description
    return getattr(value, "__qualname__", None) or str(value)


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous()
            digest.update(f"{part.dtype}{list(part.shape)}".encode())
            digest.update(part.reshape(-1).view(torch.uint8).numpy().tobytes() if part.numel() else b"")
        else:
            digest.update(str(part).encode())
    return digest.hexdigest()[:12]


def fingerprint(params: Any, model: Any) -> str:
    """What tells a model with its parameters from another."""
    given = params if isinstance(params, tuple) else (params,)
    named = [item for part in given for pair in sorted(part.items()) for item in pair]
    name = getattr(model, "__qualname__", None) or type(model).__qualname__
    return f"{name}#{_digest([str(model) if isinstance(model, torch.nn.Module) else name, *named])}"


FILE = "journal.jsonl"


def lines_of(file: Path) -> Iterator[dict[str, Any]]:
    """Read the lines of a journal that are whole."""
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:  # the run ended in the middle of it
            continue
        if isinstance(found, dict):
            yield found


def rows_of(line: dict[str, Any]) -> Iterator[Row]:
    """Give the rows of the tidy table that a line of the journal holds."""
    shared = {key: line[key] for key in ("method", "options", "example")}
    for metric in line["metrics"]:
        for target, group, value in zip(line["targets"], line["groups"], metric["values"], strict=True):
            yield {
                **shared,
                "target": target,
                "group": group,
                "metric": metric["metric"],
                "metric_options": metric["options"],
                "value": float("nan") if value is None else value,
                "chance": line["chance"][str(target)],
                "seconds": line["seconds"],
            }


class Journal:
    """The results of a run, a line for each unit."""

    def __init__(self, out: str | Path, dataset: str, model: str) -> None:
        self.folder = Path(out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / FILE
        about = {"dataset": dataset, "model": model}
        lines = list(lines_of(self.file))
        if not lines:
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            self._append({"about": about, "versions": versions})
        elif lines[0].get("about") != about:
            raise ValueError(
                f"`out` must be a folder of its own for each data set and model: {str(out)!r} holds "
                f"{lines[0].get('about')}, and this is {about}. Take another folder, or remove that one."
            )
        self.rows: dict[tuple[str, ...], Row] = {}
        self.examples: dict[str, str] = {}
        for line in lines[1:]:
            self._take(line)

    def _append(self, line: dict[str, Any]) -> None:
        """Write a line at once, on a line of its own also after one that was cut short."""
        handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(handle).st_size
            os.lseek(handle, max(size - 1, 0), os.SEEK_SET)
            whole = size == 0 or os.read(handle, 1) == b"\n"
            os.write(handle, (("" if whole else "\n") + json.dumps(line) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    def _take(self, line: dict[str, Any]) -> None:
        self.examples.setdefault(line["example"], line["digest"])
        for row in rows_of(line):
            self.rows.setdefault(_key(row), row)  # the first of two runs at once is kept

    def add(self, line: dict[str, Any]) -> None:
        self._append(line)
        self._take(line)

    def open(self, name: str, entry: Entry, example: Example, metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Name the metrics that are still to be measured."""
        known = self.examples.get(example.name)
        if known is not None and known != digest_of(example):
            raise ValueError(
                f"`examples` has another {example.name!r} than the run in {str(self.folder)!r}: take another folder."
            )
        rows = [
            {"method": name, "options": entry.description, "example": example.name, "target": t}
            for t in example.targets
        ]
        return [
            metric
            for metric, options in metrics.items()
            if any(_key({**row, "metric": metric, "metric_options": _listed(options)}) not in self.rows for row in rows)
        ]


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(int(row[k]) if k == "target" else row[k]) for k in
                 ("method", "options", "example", "target", "metric", "metric_options"))  # fmt: skip


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_described(options[key])}" for key in sorted(options))


def digest_of(example: Example) -> str:
    return _digest([example.x, example.targets, example.masks])


@keep_memory()
def run(
    model: Any,
    examples: Sequence[Example],
    methods: Mapping[str, Entry],
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    out: str | Path,
    dataset: str = "",
    params: Any = None,
    progress: bool = False,
) -> list[Row]:
    """Judge methods on examples by metrics, as far as the folder `out` does not hold it already.

    A method that fails on an example, or gives a map that is not finite, is told by a `PullbackWarning` and left out
    there; the next run tries it again. A metric that has nothing to measure, such as the share of a map that is
    nowhere positive, gives NaN, which counts as a result.

    Args:
        model: See `gradient`.
        examples: See `Example`.
        methods: By name, see `Entry`.
        metrics: Options by the names of `pullback.metrics.METRICS`. If omitted ``energy_pointing_game``, and
            ``pointing_game`` with a tolerance of 1, which is none.
        out: Folder of the journal. One data set and one model to a folder.
        dataset: Name of the data set.
        params: `params_of` the model if omitted.
        progress: Show a bar; needs tqdm.

    Returns:
        The tidy table: a dict for each method, example, target and metric of this call, with the keys ``dataset``,
        ``model``, ``method``, ``options``, ``example``, ``target``, ``group``, ``metric``, ``metric_options``,
        ``value``, ``chance`` (the object's share of the image) and ``seconds`` (of the method, all targets together).

    Raises:
        ValueError: If a metric is unknown, or `out` holds results of another data set, model or example.

    Example:
        >>> import tempfile
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
        >>> mask = torch.ones(1, 4, 4, dtype=torch.bool)  # an object that fills the image
        >>> example = Example("one", torch.randn(1, 4, 4), torch.tensor([1]), mask)
        >>> rows = run(model, [example], {"gradient": Entry(gradient, reduce="peak")}, out=tempfile.mkdtemp())
        >>> [row["value"] for row in rows] == [1.0, 1.0]
        True
    """
    metrics = {"energy_pointing_game": {}, "pointing_game": {"tolerance": 1}} if metrics is None else metrics
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"`metrics` must be named in `pullback.metrics.METRICS`, got {unknown[0]!r}.")
    params = params_of(model) if params is None else params
    journal = Journal(out, dataset, fingerprint(params, model))
    wanted: set[tuple[str, ...]] = set()
    units = [(name, entry, len(examples) if entry.examples is None else min(entry.examples, len(examples)))
             for name, entry in methods.items()]  # fmt: skip
    with _bar(sum(count for *_, count in units), progress) as bar:
        for index, example in enumerate(first(examples, max((count for *_, count in units), default=0))):
            for name, entry, count in units:
                if index >= count:
                    continue
                left = journal.open(name, entry, example, metrics)
                if left:
                    try:
                        line = _unit(params, model, name, entry, example, {m: metrics[m] for m in left})
                    except Exception as error:
                        what = f"`{name}` on example {example.name!r} is left out: {first_line(error)}"
                        warnings.warn(what, PullbackWarning, stacklevel=3)
                    else:
                        journal.add(line)
                shared = {"method": name, "options": entry.description, "example": example.name}
                wanted |= {_key({**shared, "target": t, "metric": m, "metric_options": _listed(o)})
                           for t in example.targets for m, o in metrics.items()}  # fmt: skip
                bar(f"{name}, {example.name}")
    about = {"dataset": dataset, "model": fingerprint(params, model)}
    return [{**about, **row} for key, row in journal.rows.items() if key in wanted]


def _unit(
    params: Any, model: Any, name: str, entry: Entry, example: Example, metrics: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Explain all targets of an example, and measure: a line of the journal."""
    start = time.perf_counter()
    attribution = attributions(params, model, entry, example)
    seconds = time.perf_counter() - start
    reduced = entry.reduced(attribution)
    if reduced.ndim != 4:
        raise ValueError(f"the attribution has shape {list(attribution.shape)}, which is no map")
    if not reduced.isfinite().all():
        raise ValueError("the map holds NaN or infinite values")
    found = []
    copies = example.x.expand(len(example.targets), *example.x.shape)
    for metric, options in metrics.items():
        about = METRICS[metric]
        if about.masks:
            arguments = (_sized(reduced, example.masks.shape[1:]), example.masks)
        else:
            judged = {"map": _sized(reduced, example.x.shape[1:]), "attribution": attribution,
                      "method": entry.map}[about.judges]  # fmt: skip
            arguments = (params, model, copies, example.targets, judged) if about.model else (judged,)
        values = about.function(*arguments, **options).double().tolist()
        values = [None if value != value else value for value in values]
        found.append({"metric": metric, "options": _listed(options), "values": values})
    share = example.masks.double().flatten(1).mean(1).tolist()
    targets = example.targets.tolist()
    return {"method": name, "options": entry.description, "example": example.name, "digest": digest_of(example),
            "targets": targets, "groups": list(example.groups), "metrics": found,
            "chance": dict(zip(map(str, targets), share, strict=True)), "seconds": round(seconds, 4)}  # fmt: skip


def attributions(params: Any, model: Any, entry: Entry, example: Example) -> Tensor:
    """Explain all targets of an example, ``[target ...]``."""
    x = example.x.unsqueeze(0)
    if entry.together:
        return over_targets(entry.method)(params, model, x, example.targets, **entry.options).squeeze(1).detach()
    one = [entry.method(params, model, x, target, **entry.options) for target in example.targets]
    return torch.cat(one).detach()


def _sized(map: Tensor, size: Sequence[int]) -> Tensor:
    return map if map.shape[2:] == torch.Size(size) else maps.resize(map, size)


class _bar:
    """A bar on a terminal where tqdm is installed, and nothing elsewhere."""

    def __init__(self, total: int, shown: bool) -> None:
        self.bar = None
        if shown:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, disable=None, leave=False)

    def __enter__(self) -> Callable[[str], None]:
        return self.step

    def step(self, what: str) -> None:
        if self.bar is not None:
            self.bar.set_description_str(what, refresh=False)
            self.bar.update()

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


# -- tables -----------------------------------------------------------------------------------------------------------


def write_table(rows: Sequence[Row], file: str | Path) -> Path:
    """Write the tidy table, by its ending as CSV, or as Parquet where pandas and pyarrow are installed.

    Raises:
        ValueError: If there are no rows, or the ending is neither.
        ImportError: If Parquet is asked for and cannot be written.
    """
    file = Path(file)
    if not rows:
        raise ValueError("`rows` is empty: nothing was judged.")
    if file.suffix not in (".csv", ".parquet"):
        raise ValueError(f"`file` must end in .csv or .parquet, got {file.name!r}.")
    draft = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        if file.suffix == ".parquet":
            try:
                import pandas

                pandas.DataFrame(rows).to_parquet(draft)
            except ImportError as error:
                raise ImportError("Parquet needs pandas and pyarrow: pip install pandas pyarrow") from error
        else:
            with draft.open("w", newline="", encoding="utf-8") as handle:
                writer = csv.DictWriter(handle, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
    return file


def read_table(file: str | Path) -> list[Row]:
    """Read a tidy table that `write_table` wrote as CSV."""
    with Path(file).open(newline="", encoding="utf-8") as handle:
        return [
            {**row, "target": int(row["target"]), **{k: float(row[k]) for k in ("value", "chance", "seconds")}}
            for row in csv.DictReader(handle)
        ]
