"""What captum 0.9 returned on small networks, and the call of ours that must return the same.

`data/captum.json.xz` holds cases: `method` (captum's class), `model` (an index into the networks: modules by name, and
the steps of the forward), `layer`, `inputs`, `options` and `expected`. They are the deterministic cases of captum's own
tests of gradients, paths and maps, each kept once whatever its `internal_batch_size`. Left out are layers that the
stored graph has no call of, `NeuronConductance` that is not multiplied by the input, and `GuidedGradCam` of several
inputs. `saturated` cases end in a softmax that
float32 rounds to 0 and 1: the true values are 0, captum's are rounding, and one of each method stands for all.
"""

import json
import lzma
import operator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import pullback
from pullback import Layer, maps, params_of
from pullback.attribution.paths._quadrature import quadrature_of

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


class With(nn.Module):
    """A model handed arguments that are not explained, repeated to the batch."""

    def __init__(self, inner: nn.Module, more: tuple[Any, ...]) -> None:
        super().__init__()
        self.inner, self.more = inner, more

    def forward(self, *inputs: Tensor) -> Any:
        more = [
            v.repeat(len(inputs[0]) // len(v), *[1] * (v.ndim - 1)) if isinstance(v, Tensor) and v.ndim else v
            for v in self.more
        ]
        return self.inner(*inputs, *more)


def signed_grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM without the clamp; on a layer without positions each unit is a channel."""
    weights = gradient.flatten(2).mean(2) if gradient.ndim > 2 else gradient
    return maps.weighted_sum(activation, weights).reshape(len(activation), 1, *activation.shape[2:])


def by_channel(activation: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM before the sum over channels."""
    return activation * gradient.flatten(2).mean(2).reshape(*gradient.shape[:2], *[1] * (gradient.ndim - 2))


def _total(y: Tensor) -> Tensor:
    return y.reshape(len(y), -1).sum(1)


def ours(case: dict[str, Any], model: nn.Module) -> list[Any]:
    """What the project returns for a case, layer by layer."""
    options, layers = value(case["options"]), case["layer"] if isinstance(case["layer"], list) else [case["layer"]]
    if "more" in options:
        more = options["more"]
        model = With(model, more if isinstance(more, tuple) else (more,))
        layers = [layer and f"inner.{layer}" for layer in layers]
    return [_at(layer, case["method"], model, value(case["inputs"]), options) for layer in layers]


def _at(layer: str | None, method: str, model: nn.Module, x: Any, options: dict[str, Any]) -> Any:
    place = Layer(layer, at="input" if options.get("at_input") else "output") if layer else ""
    where = {"layer": place} if layer else {}
    target = _total if options.get("target") is None else chosen(options["target"])
    args = (params_of(model), model, x, target)
    path = {name: options[name] for name in ("steps", "quadrature", "baseline") if name in options}
    if isinstance(x, tuple) and not isinstance(path.get("baseline", ()), tuple):
        path["baseline"] = (path["baseline"],) * len(x)
    more = {"output": 0} if options.get("first_output") else {}
    if method.startswith("Neuron"):
        unit, kind = chosen(options["neuron"]), method.removeprefix("Neuron")
        at = place
        if kind == "Conductance":
            return pullback.neuron_conductance(*args, neuron=_place(options["neuron"], args, where), **where, **path)
        if kind == "IntegratedGradients":
            if options.get("multiply") is False:
                return pullback.internal_influence(*args[:3], unit, layer="", output=at, **path)
            return pullback.integrated_gradients(*args[:3], unit, output=at, **path)
        rules = {"Gradient": None, "GuidedBackprop": "guided", "Deconvolution": "deconvnet"}[kind]
        return pullback.gradient(*args[:3], unit, output=at, rules=rules)
    if method == "LayerGradCam":
        map = pullback.saliency(*args, reduce=by_channel if options.get("by_channel") else signed_grad_cam, **where)
        return map.clamp(min=0) if options.get("relu_attributions") else map
    if method == "Saliency":
        found = pullback.gradient(*args, **more)
        return pytree.tree_map(torch.abs, found) if options.get("abs", True) else found
    if method == "GuidedGradCam":
        return pullback.guided_grad_cam(*args, **where, resize_mode=options["interpolate_mode"])
    if method == "LayerActivation":
        return pullback.activation(*args[:3], **where)
    if options.get("multiply") is False:  # captum's `multiply_by_inputs`
        if method == "IntegratedGradients":
            return pullback.internal_influence(*args, layer="", **path)
        return pullback.gradient(*args, **where)
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
    return function(*args, **where, **path, **more)


def _place(neuron: Any, args: tuple[Any, ...], where: dict[str, Any]) -> Any:
    """A place in the activation, or weights of 1 where slices choose several."""
    place = neuron if isinstance(neuron, tuple) else (neuron,)
    if not any(isinstance(part, slice) for part in place):
        return place
    hot = torch.zeros_like(pullback.activation(*args[:3], **where)[0])
    hot[place] = 1
    return hot


def as_captum_sums(case: dict[str, Any], model: nn.Module) -> Any:
    """What the project returns, with the one thing changed that captum does otherwise."""
    options = value(case["options"])
    if case["method"] == "LayerConductance":
        with mock.patch.object(pullback, "conductance", by_differences):
            return ours(case, model)
    factor = 1.0
    if options.get("quadrature") == "trapezoid":  # captum divides by the number of points, not of intervals
        factor = (options["steps"] - 1) / options["steps"]
    if any(isinstance(module, nn.Dropout) for module in model.modules()):  # the case was run in training mode
        (dropout,) = (module for module in model.modules() if isinstance(module, nn.Dropout))
        factor /= 1 - dropout.p
    return pytree.tree_map(lambda a: None if a is None else factor * a, ours(case, model))


def by_differences(
    params: Any,
    model: nn.Module,
    x: Any,
    target: Any,
    *,
    steps: int,
    quadrature: str,
    baseline: Any = 0.0,
    **where: Any,
) -> Tensor:
    """Captum's conductance: gradients at one point more than `steps`, times the activation's way to the next point."""
    several = x if isinstance(x, tuple) else (x,)
    starts = baseline if isinstance(baseline, tuple) else (baseline,) * len(several)
    alphas, _ = quadrature_of(quadrature, steps + 1)
    points = tuple(torch.cat([b + alpha * (v - b) for alpha in alphas]) for v, b in zip(several, starts, strict=True))
    if isinstance(target, Tensor) and target.ndim:
        target = target.repeat(len(alphas))
    args = (params, model, points if isinstance(x, tuple) else points[0])
    place, slope = pullback.activation(*args, **where), pullback.gradient(*args, target, **where)
    place, slope = (v.unflatten(0, (len(alphas), -1)) for v in (place, slope))
    return (slope[:-1] * place.diff(dim=0)).sum(0)
