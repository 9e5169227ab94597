"""What a command line asks for: network, targets, methods with their options, layers. Checked, and said in one line."""

from __future__ import annotations

import argparse
import ast
import csv
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn

import pullback
from pullback._networks.messages import Problem, as_user_error, unknown
from pullback._networks.models import Network, find_device, load

# -- network -----------------------------------------------------------------------------------------------------------


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


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Probabilities ``[class]``."""
    with as_user_error(f"the model cannot be run on an input of shape {list(x.shape)}"), torch.no_grad():
        scores = model(x)
    if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[1] < 1:
        got = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise Problem(f"the model must return scores [batch class], got {got}; wrap it in a factory that returns them")
    return scores[0].float().softmax(0).cpu()


def version() -> str:
    try:
        return importlib.metadata.version("pullback")
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return "unknown"


# -- targets -----------------------------------------------------------------------------------------------------------


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
    own = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("return_info", "progress")}
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
    given = [setting(text) for text in settings]
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


def setting(text: str) -> tuple[str, str, str]:
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
    for option, value in given:
        if option in accepted:
            takes_method = callable(accepted[option].default) and value in known
            options[option] = known[value] if takes_method else value if option == "layer" else literal(value)
    for option, parameter in accepted.items():
        if is_required(parameter) and option not in options:
            raise Problem(f"{name} needs --option {name}.{option}=VALUE")
    return options


def is_required(parameter: Parameter) -> bool:
    return parameter.default is parameter.empty


def literal(text: str) -> Any:
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
    with as_user_error("the layers of the model cannot be told"):
        known = pullback.layers(params, model, probe)
        found = ""
        for options in asked:
            if options["layer"] == "auto":
                found = options["layer"] = found or last_spatial_layer(params, model, probe)
            name = re.split("[:#]", options["layer"])[0]  # "name:1" is a part, "name#0" a call of it
            if name not in known:
                raise Problem(unknown("layer", name, known) + "; `pullback layers` lists them all")
