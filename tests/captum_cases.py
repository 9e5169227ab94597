"""What captum 0.9 returned on small networks, and the call of ours that must return the same.

`data/captum.json.xz` holds cases: `method` (captum's class), `model` (an index into the networks: modules by name, and
the steps of the forward), `layer`, `inputs`, `options` and `expected`.
"""

import json
import lzma
import operator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import pullback
from pullback import Layer, maps, params_of

DATA = Path(__file__).parent / "data" / "captum.json.xz"
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "int64", "int32", "bool")}
HOMES = {"operator": operator, "torch": torch, "torch.nn.functional": F, "torch.Tensor": torch.Tensor}
RULES = {"gausslegendre": "gauss_legendre", "riemann_trapezoid": "trapezoid"}


@cache
def stored() -> dict[str, Any]:
    return json.loads(lzma.decompress(DATA.read_bytes()))


def value(stored: Any, nodes: dict[str, Any] | None = None) -> Any:
    """Tensors, tuples and the rest, out of JSON."""
    if isinstance(stored, list):
        return [value(item, nodes) for item in stored]
    if not isinstance(stored, dict):
        return stored
    if "t" in stored:
        return torch.tensor(stored["t"], dtype=DTYPES[stored["d"]]).reshape(stored["s"])
    if "tuple" in stored:
        return tuple(value(item, nodes) for item in stored["tuple"])
    if "slice" in stored:
        return slice(*(value(item, nodes) for item in stored["slice"]))
    if "dict" in stored:
        return {key: value(item, nodes) for key, item in stored["dict"].items()}
    if "ellipsis" in stored:
        return Ellipsis
    if "n" in stored:
        return nodes[stored["n"]]  # type: ignore[index]
    return {key: value(item, nodes) for key, item in stored.items()}


def in_double(stored: Any) -> Any:
    """The same JSON, for float64."""
    if isinstance(stored, dict):
        return {key: "float64" if (key, item) == ("d", "float32") else in_double(item) for key, item in stored.items()}
    return [in_double(item) for item in stored] if isinstance(stored, list) else stored


def model_of(stored: dict[str, Any]) -> nn.Module:
    """The network, in eval mode."""
    root = nn.Module()
    for path, spec in stored["modules"].items():
        module = eval(f"torch.nn.{spec['repr']}", {"torch": torch})
        module.load_state_dict({name: value(tensor) for name, tensor in spec["state"].items()})
        *parents, last = path.split(".")
        owner = root
        for parent in parents:
            if parent not in owner._modules:
                owner.add_module(parent, nn.Module())
            owner = owner._modules[parent]  # type: ignore[assignment]
        owner.add_module(last, module)
    graph, nodes = fx.Graph(), {}
    for name, kind, target, args, kwargs in stored["nodes"]:
        args, kwargs = tuple(value(args, nodes)), value(kwargs, nodes)
        if kind == "output":
            graph.output(args[0])
            continue
        if kind == "call_function":
            home, _, function = target.rpartition(".")
            target = getattr(HOMES[home], function)
        nodes[name] = graph.create_node(kind, target, args, kwargs, name)
    return fx.GraphModule(root, graph).eval()


def chosen(selector: Any) -> Any:
    """A place in the output (or a layer's activation), as a target of ours."""
    if selector is None or isinstance(selector, int):
        return selector
    if isinstance(selector, Tensor):
        return selector.reshape(-1) if selector.numel() > 1 else int(selector)
    if isinstance(selector, list) and isinstance(selector[0], int):
        return selector
    if isinstance(selector, tuple):
        return lambda y: y[(slice(None), *selector)].reshape(len(y), -1).sum(1)
    raise NotImplementedError(selector)


def signed_grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM without the clamp; on a layer without positions each unit is a channel."""
    weights = gradient.flatten(2).mean(2) if gradient.ndim > 2 else gradient
    return maps.weighted_sum(activation, weights).reshape(len(activation), 1, *activation.shape[2:])


def ours(case: dict[str, Any], model: nn.Module) -> Any:
    """What the project returns for a case."""
    options, x, method, layer = value(case["options"]), value(case["inputs"]), case["method"], case["layer"]
    where = {"layer": layer, "at": "input" if options.get("at_input") else "output"} if layer else {}
    args = (params_of(model), model, x, chosen(options.get("target")))
    path = {"steps": options.get("steps"), "quadrature": options.get("quadrature"), "baseline": options.get("baseline")}
    if method.startswith("Neuron"):
        unit, kind = chosen(options["neuron"]), method.removeprefix("Neuron")
        at = Layer(layer, where["at"])
        if kind == "Conductance":
            place = options["neuron"] if isinstance(options["neuron"], tuple) else (options["neuron"],)
            return pullback.neuron_conductance(*args, neuron=place, **where, **path)
        if kind == "IntegratedGradients":
            return pullback.integrated_gradients(*args[:3], unit, output=at, **path)
        rules = {"Gradient": None, "GuidedBackprop": "guided", "Deconvolution": "deconvnet"}[kind]
        return pullback.gradient(*args[:3], unit, output=at, rules=rules)
    if method == "LayerGradCam":
        map = pullback.saliency(*args, reduce=signed_grad_cam, **where)
        return map.clamp(min=0) if options.get("relu_attributions") else map
    if method == "Saliency":
        found = pullback.gradient(*args)
        return torch.utils._pytree.tree_map(torch.abs, found) if options.get("abs", True) else found
    if method == "LayerActivation":
        return pullback.activation(*args[:3], **where)
    if method == "GuidedGradCam":
        return pullback.guided_grad_cam(*args, **where, resize_mode=options.get("interpolate_mode", "nearest"))
    function = {
        "InputXGradient": pullback.input_x_gradient,
        "LayerGradientXActivation": pullback.input_x_gradient,
        "GuidedBackprop": pullback.guided_backprop,
        "Deconvolution": pullback.deconvnet,
        "IntegratedGradients": pullback.integrated_gradients,
        "LayerIntegratedGradients": pullback.integrated_gradients,
        "InternalInfluence": pullback.internal_influence,
        "LayerConductance": pullback.conductance,
    }[method]
    return function(*args, **where, **(path if "steps" in options else {}))


def as_captum_sums(case: dict[str, Any], model: nn.Module) -> Any:
    """What the project returns, with the one thing changed that captum does otherwise."""
    options = value(case["options"])
    factor = 1.0
    if options.get("quadrature") == "trapezoid":  # captum divides by the number of points, not of intervals
        factor = (options["steps"] - 1) / options["steps"]
    if any(isinstance(module, nn.Dropout) for module in model.modules()):  # the case was run in training mode
        (dropout,) = (module for module in model.modules() if isinstance(module, nn.Dropout))
        factor /= 1 - dropout.p
    return torch.utils._pytree.tree_map(lambda a: None if a is None else factor * a, ours(case, model))
