"""`pullback explain`: a figure and a file of maps for each photograph."""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

import pullback
from pullback import maps
from pullback._networks.messages import Problem, as_user_error, needed
from pullback._networks.models import Network, class_names
from pullback._networks.photographs import prepare, read
from pullback.cli import _asked
from pullback.cli._asked import chosen_classes, chosen_methods, public_methods, set_up, settle_layers, version

# Sensitivities have no sign to add up over colours: how much the score moves, whichever way the colour does. The other
# methods share out the score, and what they give to the colours of a pixel adds up.
PEAK_OVER_CHANNELS = frozenset({"gradient", "guided_backprop", "deconvnet", "smooth_grad"})


@dataclass(frozen=True)
class Task:
    """What is to be done to each photograph."""

    network: Network
    device: torch.device
    params: Any
    methods: Mapping[str, Mapping[str, Any]]
    choose: Callable[[Tensor], list[int]]
    names: list[list[str]] | None
    chunk_size: int | Literal["auto"]
    show: int
    smooth: float
    bar: Any

    def explain(self, path: Path, out: Path) -> list[str]:
        """Explain one photograph and write figure and maps; the lines to print."""
        preprocessing = self.network.preprocessing
        pixels = read(path, preprocessing)
        x = prepare(pixels, preprocessing, self.device)
        probabilities = _asked.predict(self.network.model, x)
        targets = self.choose(probabilities)
        attributions = {name: self.attribution(name, x, targets) for name in self.methods}

        figure = self.figure(path.name, pixels, x, probabilities, targets, attributions)
        metadata = self.metadata(path, probabilities, targets)
        arrays = {name: attribution.numpy() for name, attribution in attributions.items()}
        arrays |= {"image": pixels, "targets": np.array(targets), "metadata": np.array(json.dumps(metadata))}
        files = {
            out.with_name(f"{out.name}-explained.png"): lambda file: figure.savefig(file, format="png", dpi=120),
            out.with_name(f"{out.name}-maps.npz"): lambda file: np.savez(file, **arrays),  # pyright: ignore[reportArgumentType]
        }
        write_together(files)

        best = probabilities.topk(min(5, len(probabilities))).indices.tolist()
        lines = [f"  {percent(probabilities[i].item()):>6}  {i:>4}  {self.label(i)}" for i in best]
        if self.show < len(targets):
            lines.append(f"  the figure shows the {self.show} most probable of {len(targets)} targets (--show)")
        return [*lines, *(f"  wrote {file}" for file in files)]

    def attribution(self, name: str, x: Tensor, targets: Sequence[int]) -> Tensor:
        """``[target ...]``, all targets from one forward of the model."""
        self.bar.set_description_str(name, refresh=False)
        method, options = public_methods()[name], dict(self.methods[name])
        if "progress" in inspect.signature(method).parameters:
            options["progress"] = lambda n, all: self.bar.set_description_str(f"{name} {n} of {all}", refresh=False)
        over = pullback.over_targets(method, chunk_size=self.chunk_size)
        with as_user_error(f"{name} failed"):
            indices = torch.tensor(targets, device=self.device)
            result = over(self.params, self.network.model, x, indices, **options)
        self.bar.update()
        return result.detach().float().cpu().squeeze(1)  # the batch of one

    def figure(
        self,
        title: str,
        pixels: np.ndarray,
        x: Tensor,
        probabilities: Tensor,
        targets: Sequence[int],
        attributions: Mapping[str, Tensor],
    ) -> Any:
        from matplotlib.figure import Figure

        from pullback import plot

        places = list(range(len(targets)))
        if len(targets) > self.show:
            places = probabilities[list(targets)].topk(self.show).indices.tolist()
        rows = {}
        for name, attribution in attributions.items():
            layer = self.methods[name].get("layer")
            rows[name + (f"\n{layer}" if layer else "")] = drawn(name, attribution[places], x, self.smooth)
        columns = [f"{self.label(i)}\n{i} · {percent(probabilities[i].item())}" for i in (targets[p] for p in places)]
        best = probabilities.topk(min(5, len(probabilities))).indices.tolist()
        predictions = [(self.label(i), probabilities[i].item()) for i in best]
        return plot.grid(pixels, rows, columns, predictions=predictions, title=title, figure=Figure())

    def metadata(self, path: Path, probabilities: Tensor, targets: Sequence[int]) -> dict[str, Any]:
        return {
            "image": str(path),
            "model": self.network.name,
            "weights": self.network.weights,
            "preprocessing": asdict(self.network.preprocessing),
            "device": str(self.device),
            "methods": {name: {option: getattr(value, "__name__", value) for option, value in options.items()}
                        for name, options in self.methods.items()},
            "targets": list(targets),
            "classes": [self.label(i) for i in targets],
            "probabilities": probabilities[list(targets)].tolist(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__, "pullback": version()},
        }  # fmt: skip

    def label(self, index: int) -> str:
        return self.names[index][0] if self.names else f"class {index}"


def percent(probability: float) -> str:
    return "<0.1%" if probability < 0.0005 else f"{probability:.1%}"


def drawn(method: str, attribution: Tensor, x: Tensor, smooth: float) -> Tensor:
    """What a figure shows of an attribution ``[target ...]``: maps ``[target height width]``.

    Single pixels cannot be seen, so maps as fine as the image are smoothed; `smooth` is a part of its longer side.
    """
    if attribution.ndim == 3:
        with as_user_error(f"{method} gives no map"):
            attribution = maps.token_grid(attribution, x)
    if attribution.ndim != 4:
        shape = list(attribution.shape[1:])
        cure = "choose a layer with positions, or call it from Python"
        raise Problem(f"{method} gives an attribution of shape {shape}, which is no map to draw: {cure}")
    reduce = maps.channel_peak if method in PEAK_OVER_CHANNELS else maps.channel_sum
    map = attribution if attribution.shape[1] == 1 else reduce(attribution)
    size = map.shape[2:]
    return (maps.smooth(map, smooth * max(size)) if size == x.shape[2:] else map)[:, 0]


def write_together(files: Mapping[Path, Callable[[IO[bytes]], Any]]) -> None:
    """Write all files or none: beside their places first, then each is moved there whole."""
    drafts = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, write in files.items():
            with drafts[path].open("wb") as file:
                write(file)
        for path, draft in drafts.items():
            draft.replace(path)
    except OSError as error:
        folder = next(iter(files)).parent
        raise Problem(f"could not be written to {str(folder)!r}: {error.strerror or error}") from error
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def explain(arguments: argparse.Namespace) -> int:
    """Explain each photograph; 2 if one of them could not be."""
    needed("cli", "matplotlib", "PIL", "tqdm")
    methods = chosen_methods(arguments.method, arguments.option, arguments.layer)
    device, network, probe = set_up(arguments)
    params = pullback.params_of(network.model)
    classes = len(_asked.predict(network.model, probe))
    names = class_names(arguments.classes, classes)
    choose = chosen_classes(arguments.targets, names, classes)
    settle_layers(methods, params, network.model, probe)
    out = Path(arguments.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"cannot write to {str(out)!r}: {error.strerror}; choose another --out") from error

    failed = False
    with progress_bar(len(arguments.images) * len(methods)) as bar:
        chunk_size = arguments.chunk_size or "auto"
        task = Task(network, device, params, methods, choose, names, chunk_size, arguments.show, arguments.smooth, bar)
        stems = distinct([Path(path).stem for path in arguments.images])
        for i, (path, stem) in enumerate(zip(arguments.images, stems, strict=True), start=1):
            try:
                lines, stream = [path, *task.explain(Path(path), out / stem)], sys.stdout
            except Problem as problem:
                lines, stream, failed = [f"pullback: error: {path}: {problem}"], sys.stderr, True
            bar.write("\n".join(lines), file=stream)
            bar.update(i * len(methods) - bar.n)
    return 2 if failed else 0


@contextmanager
def progress_bar(total: int) -> Iterator[Any]:
    """A bar on a terminal, once it takes more than a second; its clock runs on while a method does."""
    (tqdm,) = needed("cli", "tqdm")
    look = "{desc}: {bar:30} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
    with tqdm.tqdm(total=total, bar_format=look, delay=1, leave=False, disable=None) as bar:
        over = threading.Event()

        def tick() -> None:
            while not over.wait(timeout=1):
                bar.refresh()

        clock = threading.Thread(target=tick, daemon=True)
        clock.start()
        try:
            yield bar
        finally:
            over.set()
            clock.join()


def distinct(stems: Sequence[str]) -> list[str]:
    """Photographs from different folders may share a name; their results must not."""
    taken: dict[str, None] = {}
    for stem in stems:
        numbered = (f"{stem}-{n}" if n else stem for n in itertools.chain([0], itertools.count(2)))
        taken[next(name for name in numbered if name not in taken)] = None
    return list(taken)
