"""`pullback run`, `show` and `metrics`: a folder of photographs into a store, and what is in it."""

from __future__ import annotations

import argparse
import csv
import inspect
import itertools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

import pullback
from pullback import maps
from pullback._networks.messages import Problem, as_user_error, needed, say, unknown
from pullback._networks.models import Network, Preprocessing, class_names, find_device, load
from pullback._networks.photographs import FORMATS, prepare, read
from pullback.cli import _asked
from pullback.cli._asked import chosen_classes, chosen_methods, public_methods, set_up, settle_layers
from pullback.cli._explain import PEAK_OVER_CHANNELS, drawn, progress_bar, write_together
from pullback.metrics import METRICS

SUFFIXES = frozenset(f".{name.lower()}" for name in FORMATS) | {".jpg", ".jpe", ".tif", ".jp2", ".pgm"}
# Of metrics that run many inputs for each, as the steps of a curve. More take more memory (64 of EfficientNet-Lite0 for
# a gradient 5 GB), not less time.
IMAGES_AT_ONCE = 16


class Photographs(Dataset[Any]):
    """The photographs below a folder, in the order of their names; `ids` are their paths there."""

    def __init__(self, root: Path, preprocessing: Preprocessing) -> None:
        self.root, self.preprocessing = root, preprocessing
        paths = (p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
        self.ids = sorted(p.relative_to(root).as_posix() for p in paths)
        self.labels: list[int] | None = None
        if not self.ids:
            raise Problem(f"no photographs in {str(root)!r}" if root.is_dir() else f"no folder {str(root)!r}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, position: int) -> tuple[Tensor, int | None]:
        pixels = read(self.root / self.ids[position], self.preprocessing)
        label = None if self.labels is None else self.labels[position]
        return prepare(pixels, self.preprocessing, torch.device("cpu"))[0], label

    def label(self, names: list[list[str]] | None, classes: int) -> None:
        """Read each photograph's class from the folder it is in: an index, a name, or its place among the folders."""
        folders = sorted({id.partition("/")[0] for id in self.ids if "/" in id})
        if any("/" not in id for id in self.ids):
            raise Problem("--targets label needs the photographs in one folder for each class")
        try:
            found = {folder: chosen_classes(f'"{folder}"', names, classes)(torch.zeros(0))[0] for folder in folders}
        except Problem as problem:
            if len(folders) != classes:
                raise Problem(
                    f"--targets label: {problem}; name the folders as classes, or have one for each of {classes}"
                ) from problem
            found = {folder: index for index, folder in enumerate(folders)}
        self.labels = [found[id.partition("/")[0]] for id in self.ids]


@contextmanager
def as_problem() -> Iterator[None]:
    """What the library says of arguments, disks and machines is said in one line."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise Problem(text.splitlines()[0]) from error


@contextmanager
def that_goes_on(rank: int) -> Iterator[None]:
    """Say what becomes of a run that is stopped by Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        if not rank:
            say("pullback: stopped; the same command goes on from here")
        raise


def run(arguments: argparse.Namespace) -> int:
    """Explain all photographs below a folder, or go on with it; 2 if some of them could not be."""
    needed("scale", "zarr", "tqdm")
    needed("cli", "PIL")
    from pullback.dataset import explain_dataset

    methods = chosen_methods(arguments.method, arguments.option, arguments.layer)
    rank = int(os.environ.get("RANK", 0))
    if rank:
        warnings.simplefilter("ignore")  # one process says what there is to warn of
    device, network, probe = set_up(arguments)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    params = pullback.params_of(network.model)
    classes = len(_asked.predict(network.model, probe))
    names = class_names(arguments.classes, classes)
    data = Photographs(Path(arguments.folder), network.preprocessing)
    targets: Any = arguments.targets.strip()
    if targets == "label":
        data.label(names, classes)
    elif best := re.fullmatch("top([1-9][0-9]*)", targets):
        targets = f"top{min(int(best[1]), classes)}"
    else:
        targets = chosen_classes(targets, names, classes)(torch.zeros(classes))
    settle_layers(methods, params, network.model, probe)
    reduce: dict[str, Any] = {
        "auto": {name: "peak" if name in PEAK_OVER_CHANNELS else "sum" for name in methods},
        "none": None,
    }
    with as_problem(), that_goes_on(rank):
        store = explain_dataset(
            {name: partial(public_methods()[name], **options) for name, options in methods.items()},
            params,
            network.model,
            data,
            targets=targets,
            out=arguments.out,
            batch_size=arguments.batch_size,
            chunk_size=arguments.chunk_size or "auto",
            reduce=reduce.get(arguments.reduce, arguments.reduce),
            dtype=arguments.dtype,
            about={
                "network": {
                    "model": arguments.model,
                    "weights": arguments.weights,
                    "names": arguments.classes,
                    "classes": classes,
                },
                "preprocessing": asdict(network.preprocessing),
            },
            device=device,
            workers=arguments.workers,
            retry=arguments.retry,
            check=arguments.check,
            progress=rank == 0 and sys.stderr.isatty(),
        )
    if rank:
        return 0
    status, errors, ids = store["status"][:], store["errors"][:], store["ids"][:]
    failed = np.flatnonzero(status == 2)
    for place in failed[:10]:
        say(f"pullback: error: {ids[place]}: {re.sub('^Problem: ', '', str(errors[place]))}")
    if len(failed) > 10:
        say(f"pullback: error: and {len(failed) - 10} more, in the store's array `errors`")
    counts = f"{(status == 1).sum()} of {len(status)} explained, {len(failed)} failed"
    left = (status == 0).sum()
    print(f"{arguments.out}: {counts}" + (f", {left} left to other processes" if left else ""))
    return 2 if len(failed) else 0


# -- what is in a store ------------------------------------------------------------------------------------------------


class Made:
    """A store that `pullback run` made, with the photographs and the network that it was made of."""

    def __init__(self, path: str, folder: str | None) -> None:
        needed("scale", "zarr")
        from pullback.dataset import open_store

        with as_problem():
            self.store = open_store(path)
        self.about = dict(self.store.attrs["about"])
        if "preprocessing" not in self.about:
            raise Problem(f"{path!r} was made from Python; `pullback run` makes those that are shown and judged here")
        kept: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in self.about["preprocessing"].items()
        }
        self.preprocessing = Preprocessing(**kept)
        self.folder = Path(folder or self.store.attrs["root"])
        self.ids = [str(id) for id in self.store["ids"][:]]
        self.status = self.store["status"][:]
        self.methods = [name for name in self.store.attrs["methods"] if name in self.store]

    def values(self, name: str, examples: slice | int) -> Tensor:
        from pullback.dataset import read as read_store

        with as_problem():
            return torch.from_numpy(np.array(read_store(self.store, name, examples)))

    def names(self) -> list[list[str]] | None:
        return class_names(self.about["network"]["names"], self.about["network"]["classes"])

    def chosen(self, asked: str | None) -> list[str]:
        wanted = self.methods if asked is None else [n.strip().replace("-", "_") for n in asked.split(",") if n.strip()]
        for name in wanted:
            if name not in self.methods:
                raise Problem(unknown("method", name, self.methods) + f"; the store has {', '.join(self.methods)}")
        return wanted

    def pixels(self, id: str, preprocessing: Preprocessing | None = None) -> np.ndarray:
        try:
            return read(self.folder / id, preprocessing or self.preprocessing)
        except Problem as problem:
            raise Problem(f"{self.folder / id}: {problem}; --images FOLDER says where the photographs are") from problem

    def network(self, device: torch.device) -> tuple[Any, Network]:
        from pullback.dataset._described import described_model

        network = load(self.about["network"]["model"], self.about["network"]["weights"], device)
        params = pullback.params_of(network.model)
        if described_model(params, network.model)["params"] != self.store.attrs["params"]:
            raise Problem("the network has other params now than when the store was made")
        return params, network


def show(arguments: argparse.Namespace) -> int:
    """Draw what a store holds of some photographs, a figure for each."""
    needed("cli", "matplotlib", "PIL")
    from matplotlib.figure import Figure

    from pullback import plot

    made = Made(arguments.store, arguments.images)
    methods, names = made.chosen(arguments.method), made.names()
    for id in arguments.id:
        if id not in made.ids:
            raise Problem(unknown("id", id, made.ids))
    out = Path(arguments.out)
    with as_user_error(f"cannot write to {str(out)!r}"):
        out.mkdir(parents=True, exist_ok=True)
    for id in arguments.id:
        place = made.ids.index(id)
        if made.status[place] != 1:
            raise Problem(f"{id}: {str(made.store['errors'][place]) or 'not explained yet; `pullback run` goes on'}")
        pixels = made.pixels(id)
        x = prepare(pixels, made.preprocessing, torch.device("cpu"))
        targets, scores = made.store["targets"][place], made.store["scores"][place]
        rows = {name: drawn(name, made.values(name, place), x, arguments.smooth) for name in methods}
        labels = [names[t][0] if names and t < len(names) else f"class {t}" for t in targets]
        columns = [f"{label}\n{t} · score {s:.2f}" for label, t, s in zip(labels, targets, scores, strict=True)]
        figure = plot.grid(pixels, rows, columns, title=id, figure=Figure())
        file = out / f"{Path(id).with_suffix('').as_posix().replace('/', '-')}-explained.png"
        write_together({file: lambda f, figure=figure: figure.savefig(f, format="png", dpi=120)})
        print(f"  wrote {file}")
    return 0


# -- metrics -----------------------------------------------------------------------------------------------------------


def metrics(arguments: argparse.Namespace) -> int:
    """Judge the maps of a store; a table of means, and each value as CSV where asked."""
    made = Made(arguments.store, arguments.images)
    methods, wanted = made.chosen(arguments.method), chosen_metrics(arguments.metric, arguments.masks)
    device = find_device(arguments.device)
    params, network = made.network(device) if any(METRICS[name].model for name in wanted) else (None, None)
    options = metric_options(wanted, arguments.option, made.store.attrs["batch_size"])
    maps_of_each = made.store["targets"].shape[1] * len(methods) * len(wanted)
    with progress_bar(int((made.status == 1).sum()) * maps_of_each) as bar:
        trial = Trial(made, methods, wanted, params, network, arguments.masks, options, device, bar)
        rows = [row for places in _batches(made) for row in trial.rows(places)]
    if arguments.out:
        out = Path(arguments.out)
        with as_user_error(f"cannot write to {arguments.out!r}"), out.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "target", "method", "metric", "value"), *rows])
    found: dict[tuple[str, str], list[float]] = {(method, metric): [] for method in methods for metric in wanted}
    for _, _, method, metric, value in rows:
        found[method, metric].append(value)
    print_table(found, methods, wanted)
    return 0


@dataclass(frozen=True)
class Trial:
    """What is to be judged, and by what."""

    made: Made
    methods: Sequence[str]
    metrics: Sequence[str]
    params: Any
    network: Network | None
    masks: str | None
    options: Mapping[str, Mapping[str, Any]]
    device: torch.device
    bar: Any

    def rows(self, places: Sequence[int]) -> Iterator[tuple[str, int, str, str, float]]:
        """Judge the examples at some places of one chunk: id, target, method, metric, value."""
        preprocessing, x, masks = self.made.preprocessing, None, None
        ids = [self.made.ids[place] for place in places]
        if self.network is not None:
            x = torch.cat([prepare(self.made.pixels(id), preprocessing, self.device) for id in ids])
        if self.masks:
            masks = torch.stack([mask_of(Path(self.masks), id, preprocessing) for id in ids]).to(self.device)
        targets = torch.from_numpy(self.made.store["targets"][:][places]).to(self.device)
        for method in self.methods:
            chunk = self.made.values(method, slice(places[0], places[-1] + 1))
            held = chunk[[place - places[0] for place in places]].to(self.device)
            for metric, k in itertools.product(self.metrics, range(targets.shape[1])):
                self.bar.set_description_str(f"{metric} of {method}", refresh=False)
                judged, target = as_judged(method, metric, held[:, k], preprocessing), targets[:, k]
                with as_user_error(f"{metric} of {method} failed"):
                    values = judge(metric, judged, self.params, self.network, x, target, masks, self.options[metric])
                self.bar.update(len(values))
                for id, of, value in zip(ids, target.tolist(), values, strict=True):
                    yield id, of, method, metric, value


def chosen_metrics(text: str | None, masks: str | None) -> list[str]:
    """Those that can judge what is stored: maps and attributions, but not methods."""
    able = [name for name, metric in METRICS.items() if metric.judges != "method"]
    if text is None:
        of_maps = [name for name in able if METRICS[name].judges == "map" and not METRICS[name].model]
        return [name for name in of_maps if masks or not METRICS[name].masks]
    wanted = list(dict.fromkeys(name.strip().replace("-", "_") for name in text.split(",") if name.strip()))
    for name in wanted:
        if name not in able:
            raise Problem(unknown("metric", name, able) + f"; there are {', '.join(able)}")
        if METRICS[name].masks and masks is None:
            raise Problem(f"{name} needs --masks FOLDER, with an image for each photograph: white where the object is")
    if not wanted:
        raise Problem(f"no metric; there are {', '.join(able)}")
    return wanted


def metric_options(wanted: Sequence[str], settings: Sequence[str], batch: int) -> dict[str, dict[str, Any]]:
    options: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    for name in wanted:
        accepted = inspect.signature(METRICS[name].function).parameters
        if "chunk_size" in accepted:
            options[name]["chunk_size"] = max(1, IMAGES_AT_ONCE // batch)
        for setting in settings:
            owner, option, value = _asked.setting(setting)
            if option in accepted and owner in ("", name):
                options[name][option] = _asked.literal(value)
    for setting in settings:
        _, option, _ = _asked.setting(setting)
        if not any(option in own for own in options.values()):
            raise Problem(f"no metric that is run takes the option {option!r}")
    return options


def _batches(made: Made) -> Iterator[list[int]]:
    """Places of examples that are explained, those of a chunk together."""
    size = int(made.store.attrs["batch_size"])
    done = False
    for start in range(0, len(made.ids), size):
        places = [p for p in range(start, min(start + size, len(made.ids))) if made.status[p] == 1]
        if places:
            done = True
            yield places
    if not done:
        raise Problem("no photograph of the store is explained yet")


def mask_of(folder: Path, id: str, preprocessing: Preprocessing) -> Tensor:
    """Cut and resize the mask as the photograph was; anything but black is object."""
    candidates = [folder / id, *sorted((folder / id).parent.glob(f"{Path(id).stem}.*"))]
    path = next((p for p in candidates if p.is_file()), folder / id)
    try:
        grey = read(path, replace(preprocessing, mean=(0.0,), std=(1.0,), interpolation="nearest"))
    except Problem as problem:
        raise Problem(f"mask {str(path)!r}: {problem}") from problem
    return torch.from_numpy(grey[..., 0].copy()) > 0


def as_judged(method: str, metric: str, held: Tensor, preprocessing: Preprocessing) -> Tensor:
    """A map ``[batch 1 height width]`` of the image's size where places are compared, or the attribution itself."""
    if METRICS[metric].judges == "attribution":
        if held.shape[1:] != (len(preprocessing.mean), *preprocessing.size):
            raise Problem(f"{metric} judges attributions at the input: run {method} with --reduce none")
        return held
    if held.ndim != 4:
        raise Problem(f"{method} gives {list(held.shape[1:])} for each example, which is no map to judge")
    reduce = maps.channel_peak if method in PEAK_OVER_CHANNELS else maps.channel_sum
    map = held if held.shape[1] == 1 else reduce(held)
    return maps.resize(map, preprocessing.size) if METRICS[metric].model or METRICS[metric].masks else map


def judge(
    metric: str,
    judged: Tensor,
    params: Any,
    network: Network | None,
    x: Tensor | None,
    target: Tensor,
    masks: Tensor | None,
    options: Mapping[str, Any],
) -> list[float]:
    function: Callable[..., Tensor] = METRICS[metric].function
    if network is not None and METRICS[metric].model:
        result = function(params, network.model, x, target, judged, **options)
    elif METRICS[metric].masks:
        result = function(judged, masks, **options)
    else:
        result = function(judged, **options)
    return result.double().tolist()


def print_table(found: Mapping[tuple[str, str], list[float]], methods: Sequence[str], wanted: Sequence[str]) -> None:
    """Means over examples and targets, with the standard error of the mean."""

    def cell(values: Sequence[float]) -> str:
        known = np.array([v for v in values if np.isfinite(v)])
        if not len(known):
            return "-"
        error = known.std(ddof=1) / np.sqrt(len(known)) if len(known) > 1 else np.nan
        return f"{known.mean():.4g} ± {error:.2g}"

    better = {True: "more is better", False: "less is better"}
    cells = [["", *methods], *([m, *(cell(found[method, m]) for method in methods)] for m in wanted)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row, metric in zip(cells, ["", *wanted], strict=True):
        line = "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True))
        print((line + (f"  {better[METRICS[metric].higher]}" if metric else "")).rstrip())
    counts = {len(values) for values in found.values()}
    print(f"means over {max(counts)} maps a method, with their standard error")
