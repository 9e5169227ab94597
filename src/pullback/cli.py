"""The command line: explain photographs with a trained network, one figure and one file of maps for each.

A thin client of the public functions. A method joins by being public: every name of `pullback.__all__` that is called
as ``method(params, model, x, target, *, options)`` can be named here, and its options are those of its signature.

What a user gets wrong becomes one line on standard error and exit code 2. A bad photograph does not keep the others of
the call from being explained.
"""

from __future__ import annotations

import argparse
import ast
import csv
import importlib.metadata
import inspect
import itertools
import json
import os
import platform
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from inspect import Parameter
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

import pullback
from pullback import maps
from pullback._networks import (
    Network,
    Problem,
    class_names,
    find_device,
    load,
    needed,
    prepare,
    read,
    say,
    told_as,
    unknown,
)

# Sensitivities have no sign to add up over colours: how much the score moves, whichever way the colour does. The other
# methods share out the score, and what they give to the colours of a pixel adds up.
PEAK_OVER_CHANNELS = frozenset({"gradient", "guided_backprop", "deconvnet", "smooth_grad"})
POINTS_AT_ONCE = 4  # of methods that average over many inputs: more of them take more memory, not less time


# -- what was asked for ------------------------------------------------------------------------------------------------


def chosen_classes(text: str, names: list[list[str]] | None, classes: int) -> Callable[[Tensor], list[int]]:
    """What `--targets` asks for, checked: a function from probabilities ``[class]`` to indices."""
    text = text.strip()
    if text == "all":
        return lambda probabilities: list(range(classes))
    if match := re.fullmatch(r"top([1-9][0-9]*)", text):
        k = min(int(match[1]), classes)
        return lambda probabilities: probabilities.topk(k).indices.tolist()
    words = next(csv.reader([text], skipinitialspace=True), [])
    indices = list(dict.fromkeys(_class(word.strip(), names, classes) for word in words if word.strip()))
    if not indices:
        raise Problem('no targets: give --targets top5, all, or classes such as 282,285 or "tabby"')
    return lambda probabilities: indices


def _class(word: str, names: list[list[str]] | None, classes: int) -> int:
    if re.fullmatch(r"[+-]?[0-9]+", word):
        if not 0 <= int(word) < classes:
            raise Problem(f"no class {word}: the model has {classes}, 0 to {classes - 1}")
        return int(word)
    if names is None:
        raise Problem(f"class {word!r}: the model's {classes} classes have no names; give an index, or --classes FILE")
    wanted = word.lower()
    for candidates in ([own[:1] for own in names], names):  # the usual name goes before other names
        found = [i for i, own in enumerate(candidates) if wanted in (name.lower() for name in own)]
        if len(found) > 1:
            raise Problem(f"class {word!r} is ambiguous: give one of the indices {', '.join(map(str, found))}")
        if found:
            return found[0]
    raise Problem(unknown("class", word, [name for own in names for name in own]))


# -- methods -----------------------------------------------------------------------------------------------------------


def public_methods() -> dict[str, Callable[..., Any]]:
    """Every public function called as ``method(params, model, x, target, ...)``, by name."""
    found = {}
    for name in pullback.__all__:
        function = getattr(pullback, name)
        if inspect.isfunction(function) and _parameters(function)[:4] == ["params", "model", "x", "target"]:
            found[name] = function
    return found


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def method_options(function: Callable[..., Any], inner: Callable[..., Any] | None = None) -> dict[str, Parameter]:
    """The options of a method that can be given on the command line.

    A method over another one (`inner`, or its own choice) passes the options on that it has not itself.
    """
    parameters = list(inspect.signature(function).parameters.values())[4:]
    own = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "return_info"}
    if "method" in own and any(p.kind is p.VAR_KEYWORD for p in parameters):
        passed = method_options(inner or own["method"].default)
        if "layers" in own:  # each of them is the layer of the inner method once
            passed.pop("layer", None)
        own = passed | own
    return own


def chosen_methods(text: str, settings: Iterable[str], layer: str) -> dict[str, dict[str, Any]]:
    """The options given for each method of a comma-separated list; a layer to be found is ``"auto"``."""
    known = public_methods()
    names = list(dict.fromkeys(name.strip().replace("-", "_") for name in text.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise Problem(unknown("method", name, known) + "; `pullback methods` lists them all")
    if not names:
        raise Problem("no method: name some with --method, `pullback methods` lists them")
    given = [_setting(setting) for setting in settings]
    for owner, _, _ in given:
        if owner and owner not in names:
            raise Problem(unknown("chosen method", owner, names))
    chosen = {name: _options(name, [(o, v) for owner, o, v in given if owner in ("", name)], layer) for name in names}
    for owner, option, _ in given:
        takers = [owner] if owner else names
        if not any(option in chosen[name] for name in takers):
            accepted = sorted({option for name in takers for option in method_options(known[name])})
            raise Problem(unknown("option", option, accepted) + f"; there are: {', '.join(accepted)}")
    return chosen


def _setting(text: str) -> tuple[str, str, str]:
    """Method or nothing, option and value of ``METHOD.KEY=VALUE``."""
    key, equals, value = text.partition("=")
    if not equals:
        raise Problem(f"--option {text!r} must be KEY=VALUE or METHOD.KEY=VALUE, such as steps=20")
    owner, _, option = key.strip().rpartition(".")
    return owner.replace("-", "_"), option, value.strip()


def _options(name: str, given: Sequence[tuple[str, str]], layer: str) -> dict[str, Any]:
    """What a method is called with, of the options that are given for it or for all."""
    known = public_methods()
    own = method_options(known[name])
    inner = next((known[value] for option, value in given if option == "method" and value in known), None)
    accepted = method_options(known[name], inner) if "method" in own else own
    options: dict[str, Any] = {}
    if "layer" in accepted and (layer != "auto" or is_required(accepted["layer"])):
        options["layer"] = layer
    if "chunk_size" in accepted and accepted["chunk_size"].default is None:
        options["chunk_size"] = POINTS_AT_ONCE
    for option, value in given:
        if option in accepted:
            takes_method = callable(accepted[option].default) and value in known
            options[option] = known[value] if takes_method else value if option == "layer" else _literal(value)
    for option, parameter in accepted.items():
        if is_required(parameter) and option not in options:
            raise Problem(f"{name} needs --option {name}.{option}=VALUE")
    return options


def is_required(parameter: Parameter) -> bool:
    return parameter.default is parameter.empty


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# -- layers ------------------------------------------------------------------------------------------------------------


def last_spatial_layer(params: Any, model: nn.Module, x: Tensor) -> str:
    """The last layer with several positions that the score depends on; the last call of it, where there are more.

    What it depends on has to be tried: after its last attention a transformer reads the class token only, and a map of
    that layer would be empty.
    """
    layers = pullback.layers(params, model, x)
    candidates = [
        name if len(layers[name]) == 1 else f"{name}#{len(layers[name]) - 1}"
        for name in _last_first(layers)
        if _positions(layers[name][-1]) > 1
    ]
    if not candidates:
        raise Problem("no layer of the model has positions to draw a map of; take a method that needs no layer")
    if not (pullback.gradient(params, model, x, target=0) != 0).any():  # such as an untrained head of zeros
        return candidates[0]
    for layer in candidates:
        attribution = pullback.gradient(params, model, x, target=0, layer=layer)
        channel_axis = 1 if attribution.ndim == 4 else -1
        if (attribution != 0).any(channel_axis).sum() > 1:
            return layer
    return candidates[0]


def _last_first(names: Iterable[str]) -> list[str]:
    """Layers by when they are done, the last one first: a layer is done after the layers in it."""
    names, ordered = list(names), {}
    for name in reversed(names):
        parts = name.split(".")
        ordered |= dict.fromkeys(".".join(parts[:n]) for n in range(1, len(parts) + 1))
    return [name for name in ordered if name in names and name]


def _positions(shape: torch.Size) -> int:
    """Places in an output ``[batch channel height width]`` or ``[batch token channel]``."""
    return shape[2] * shape[3] if len(shape) == 4 else shape[1] if len(shape) == 3 else 0


def settle_layers(methods: Mapping[str, dict[str, Any]], params: Any, model: nn.Module, probe: Tensor) -> None:
    """Check the layers that are named, and find the one for ``"auto"``."""
    asked = [options for options in methods.values() if options.get("layer")]
    if not asked:
        return
    with told_as("the layers of the model cannot be told"):
        known = pullback.layers(params, model, probe)
        found = ""
        for options in asked:
            if options["layer"] == "auto":
                found = options["layer"] = found or last_spatial_layer(params, model, probe)
            name = re.split("[:#]", options["layer"])[0]  # "name:1" is a part, "name#0" a call of it
            if name not in known:
                raise Problem(unknown("layer", name, known) + "; `pullback layers` lists them all")


# -- explain -----------------------------------------------------------------------------------------------------------


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
        probabilities = predict(self.network.model, x)
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
        over = pullback.over_targets(public_methods()[name], chunk_size=self.chunk_size)
        with told_as(f"{name} failed"):
            indices = torch.tensor(targets, device=self.device)
            result = over(self.params, self.network.model, x, indices, **self.methods[name])
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


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Probabilities ``[class]``."""
    with told_as(f"the model cannot be run on an input of shape {list(x.shape)}"), torch.no_grad():
        scores = model(x)
    if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[1] < 1:
        got = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise Problem(f"the model must return scores [batch class], got {got}; wrap it in a factory that returns them")
    return scores[0].float().softmax(0).cpu()


def drawn(method: str, attribution: Tensor, x: Tensor, smooth: float) -> Tensor:
    """What a figure shows of an attribution ``[target ...]``: maps ``[target height width]``.

    Single pixels cannot be seen, so maps as fine as the image are smoothed; `smooth` is a part of its longer side.
    """
    if attribution.ndim == 3:
        with told_as(f"{method} gives no map"):
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


# -- commands ----------------------------------------------------------------------------------------------------------


def explain(arguments: argparse.Namespace) -> int:
    """Explain each photograph; 2 if one of them could not be."""
    needed("cli", "matplotlib", "PIL", "tqdm")
    methods = chosen_methods(arguments.method, arguments.option, arguments.layer)
    device, network, probe = set_up(arguments)
    params = pullback.params_of(network.model)
    classes = len(predict(network.model, probe))
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


def set_up(arguments: argparse.Namespace) -> tuple[torch.device, Network, Tensor]:
    """The device and network that are asked for, and noise shaped like a photograph to try it with."""
    device = find_device(arguments.device)
    network = load(arguments.model, arguments.weights, device)
    asked = {"size": arguments.size, "mean": arguments.mean, "std": arguments.std}
    preprocessing = replace(network.preprocessing, **{name: v for name, v in asked.items() if v is not None})
    channels = len(preprocessing.mean)
    if len(preprocessing.std) != channels or channels not in (1, 3):
        raise Problem("--mean and --std must both have 3 numbers, or both 1 for grey images")
    if not all(std > 0 for std in preprocessing.std):
        raise Problem("--std must be above 0: the image is divided by it")
    noise = torch.randn((1, channels, *preprocessing.size), generator=torch.Generator().manual_seed(0))
    return device, replace(network, preprocessing=preprocessing), noise.to(device)


def distinct(stems: Sequence[str]) -> list[str]:
    """Photographs from different folders may share a name; their results must not."""
    taken: dict[str, None] = {}
    for stem in stems:
        numbered = (f"{stem}-{n}" if n else stem for n in itertools.chain([0], itertools.count(2)))
        taken[next(name for name in numbered if name not in taken)] = None
    return list(taken)


def list_methods(arguments: argparse.Namespace) -> int:
    """Print each method with its options."""
    for name, function in public_methods().items():
        print(name)
        print(f"    {(inspect.getdoc(function) or '').partition(chr(10))[0]}")
        options = [
            f"{o.name} (required)" if is_required(o) else f"{o.name}={o.default!r}"
            for o in method_options(function).values()
            if is_required(o) or not callable(o.default)
        ]
        print(f"    options: {', '.join(options)}")
    return 0


def list_layers(arguments: argparse.Namespace) -> int:
    """Print each layer of a model with the shape of its output."""
    _, network, probe = set_up(arguments)
    with told_as(f"the model cannot be run on an input of shape {list(probe.shape)}"):
        layers = pullback.layers(pullback.params_of(network.model), network.model, probe)
    rows = [
        (name, type(network.model.get_submodule(name)).__name__, ", ".join("x".join(map(str, s)) for s in shapes))
        for name, shapes in layers.items()
        if name
    ]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:2]]
    for name, kind, shapes in rows:
        print(f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {shapes}")
    return 0


def version() -> str:
    try:
        return importlib.metadata.version("pullback")
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return "unknown"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Problem(f"{message}; `{self.prog} --help` tells more")


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="pullback", description="Explain what a PyTorch image model looks at.")
    top.add_argument("--version", action="version", version=f"pullback {version()}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    network = Parser(add_help=False)
    add = network.add_argument_group("network").add_argument
    models = "efficientnet-lite0 (default; has its weights), torchvision:NAME, timm:NAME, package.module:factory"
    add("--model", default="efficientnet-lite0", metavar="NAME", help=models)
    add("--weights", metavar="FILE", help="state dict, saved by torch.save or as safetensors; nothing is downloaded")
    add("--size", type=side, metavar="N", help="side of the image in pixels (default: the model's)")
    add("--mean", type=numbers, metavar="R,G,B", help="subtracted from pixels from 0 to 1 (default: the model's)")
    add("--std", type=numbers, metavar="R,G,B", help="what they are then divided by (default: the model's)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto, the fastest there is)")

    about = "Write a figure and a file of raw maps for each photograph."
    command = commands.add_parser("explain", parents=[network], help="explain photographs", description=about)
    command.set_defaults(run=explain)
    add = command.add_argument
    add("images", nargs="+", metavar="IMAGE", help="photograph")
    add("--method", default="gradient,grad_cam", metavar="A,B", help="see `pullback methods` (default: %(default)s)")
    options = "option of the methods that take it, or METHOD.KEY=VALUE of one; may be repeated"
    add("--option", action="append", default=[], metavar="KEY=VALUE", help=options)
    add("--targets", default="top5", help='topN, all, or classes: 282,285 or "tabby, tiger cat" (default: top5)')
    add("--classes", metavar="FILE", help="names of the classes, a line each (default: ImageNet's if there are 1000)")
    layers = (
        "of the methods that take one (default: auto, the last with positions, if they must); see `pullback layers`"
    )
    add("--layer", default="auto", metavar="NAME", help=layers)
    add("--out", default="out", metavar="DIR", help="folder for the results (default: %(default)s)")
    add("--show", type=positive, default=10, metavar="N", help="targets in the figure, at most (default: %(default)s)")
    blur = "blur of fine maps in the figure, as a part of its side; 0 for none (default: %(default)s)"
    add("--smooth", type=share, default=0.008, metavar="SIGMA", help=blur)
    add("--chunk-size", type=positive, metavar="N", help="targets held at once (default: what memory allows)")

    command = commands.add_parser("methods", help="list the methods and their options")
    command.set_defaults(run=list_methods)
    command = commands.add_parser("layers", parents=[network], help="list the layers of a model")
    command.set_defaults(run=list_layers)
    return top


def positive(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def side(text: str) -> tuple[int, int]:
    if positive(text) > 8192:
        raise argparse.ArgumentTypeError(f"must be at most 8192, got {text}")
    return int(text), int(text)


def share(text: str) -> float:
    (value,) = numbers(text) if "," not in text else (-1.0,)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return value


def numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers such as 0.5,0.5,0.5, got {text!r}") from None


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """What a library warns of, without the place in its source and a line of it."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        say("pullback: warning: " + " ".join(str(message).split()))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    try:
        parsed = parser().parse_args(arguments)
        with one_line_warnings():
            return parsed.run(parsed)
    except Problem as problem:
        say(f"pullback: error: {problem}")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # such as `pullback methods | head`
        sys.stdout = None  # nothing is left to flush it to at exit
        return 141


if __name__ == "__main__":
    sys.exit(main())
