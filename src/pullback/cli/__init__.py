"""The command line: explain photographs with a trained network, one figure and one file of maps for each.

A thin client of the public functions. A method joins by being public: every name of `pullback.__all__` that is called
as ``method(params, model, x, target, *, options)`` can be named here, and its options are those of its signature.

What a user gets wrong becomes one line on standard error and exit code 2. A bad photograph does not keep the others of
the call from being explained.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import pullback
from pullback._networks.messages import Problem, as_user_error, say
from pullback.cli._asked import chosen_methods as chosen_methods
from pullback.cli._asked import is_required, method_options, public_methods, set_up, version
from pullback.cli._dataset import metrics, run, show
from pullback.cli._explain import explain


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
    with as_user_error(f"the model cannot be run on an input of shape {list(probe.shape)}"):
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

    about = "Explain every photograph below a folder into a Zarr store; run it again to go on. Also under torchrun."
    command = commands.add_parser("run", parents=[network], help="explain a folder into a store", description=about)
    command.set_defaults(run=run)
    add = command.add_argument
    add("folder", metavar="FOLDER", help="of photographs, also in folders below it")
    add("--out", required=True, metavar="STORE", help="the store, such as maps.zarr; if it is there, the run goes on")
    add("--method", default="gradient,grad_cam", metavar="A,B", help="see `pullback methods` (default: %(default)s)")
    add("--option", action="append", default=[], metavar="KEY=VALUE", help=options)
    classes = "topN, label (the folder a photograph is in), all, or classes: 282,285 (default: %(default)s)"
    add("--targets", default="top5", help=classes)
    add("--classes", metavar="FILE", help="names of the classes, a line each (default: ImageNet's if there are 1000)")
    add("--layer", default="auto", metavar="NAME", help=layers)
    kept = "over channels: auto (peak of sensitivities, sum of shares), sum, peak, none (default: %(default)s)"
    add("--reduce", default="auto", choices=("auto", "sum", "peak", "none"), help=kept)
    add("--dtype", default="float16", choices=("float16", "float32"), help="of the maps (default: %(default)s)")
    add("--batch-size", type=positive, default=16, metavar="N", help="photographs at once (default: %(default)s)")
    add("--chunk-size", type=positive, metavar="N", help="targets held at once (default: what memory allows)")
    add("--workers", type=count, default=0, metavar="N", help="processes that read photographs (default: %(default)s)")
    add("--retry", action="store_true", help="try those again that failed before")
    add("--check", action="store_true", help="read back what is done, and do again what is damaged")

    store = Parser(add_help=False)
    store.add_argument("store", metavar="STORE", help="what `pullback run` made")
    store.add_argument("--method", metavar="A,B", help="of those in the store (default: all)")
    store.add_argument("--images", metavar="FOLDER", help="where the photographs are (default: where they were)")
    about = "Draw the maps that a store holds of some photographs."
    command = commands.add_parser("show", parents=[store], help="draw what a store holds", description=about)
    command.set_defaults(run=show)
    command.add_argument("--id", action="append", required=True, metavar="ID", help="photograph, by its path in FOLDER")
    command.add_argument("--out", default="out", metavar="DIR", help="folder for figures (default: %(default)s)")
    command.add_argument("--smooth", type=share, default=0.008, metavar="SIGMA", help=blur)
    about = "Judge the maps of a store: how sparse they are, what the model makes of what they cover, where they point."
    command = commands.add_parser("metrics", parents=[store], help="judge what a store holds", description=about)
    command.set_defaults(run=metrics)
    add = command.add_argument
    add("--metric", metavar="A,B", help="names of pullback.metrics (default: those that need no run of the model)")
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="option of the metrics that take it")
    add("--masks", metavar="FOLDER", help="of the objects' masks, named as the photographs are")
    add("--out", metavar="FILE", help="write each value here, as CSV")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto, the fastest there is)")

    command = commands.add_parser("methods", help="list the methods and their options")
    command.set_defaults(run=list_methods)
    command = commands.add_parser("layers", parents=[network], help="list the layers of a model")
    command.set_defaults(run=list_layers)
    return top


def positive(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def count(text: str) -> int:
    return 0 if text == "0" else positive(text)


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
        with one_line_warnings(), pullback.keep_memory():
            return parsed.run(parsed)
    except Problem as problem:
        say(f"pullback: error: {problem}")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # such as `pullback methods | head`
        sys.stdout = None  # nothing is left to flush it to at exit
        return 141
