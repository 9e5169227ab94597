"""Other libraries, each called as its own documentation recommends, on a copy of the network of its own.

A peer that is not installed, or that does not have a method, gives no case. Copies share the weights, work out of place
where a library's hooks need that, and are trainable where a library's examples leave them so. Objects are made once,
outside of what is timed.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from _measure import LAYERS, gap
from torch import Tensor, nn

from pullback import maps

METHODS = ("gradient", "guided_backprop", "input_x_gradient", "integrated_gradients", "grad_cam")
STEPS = 8  # points on a path

LayerShape = Callable[[Tensor], Tensor]


def suits(method: str, name: str) -> bool:
    """Say whether a network has what a method needs: positions, rectifiers."""
    return not (method == "grad_cam" and name == "mlp") and not (method == "guided_backprop" and name == "vit_b_16")


def options_of(method: str, name: str) -> dict[str, Any]:
    """Give what our call of a method takes, so that peers compute the same."""
    return {"grad_cam": {"layer": LAYERS.get(name)}, "integrated_gradients": {"steps": STEPS}}.get(method, {})


class Peer(NamedTuple):
    """One library's way of one method.

    Attributes:
        one: From a class index to what the library returns.
        many: The same from class indices ``[target]`` together, as ``[target ...]``; `None` where it is not tried.
        shared: What `many` does: repeats the image, or keeps one forward for all.
        seen: From our value for one target to what the library makes of it: absolute, normalised, resized.
        remark: Why the values differ, where they do.
    """

    one: Callable[[int], Tensor]
    many: Callable[[Tensor], Tensor] | None = None
    shared: str = "batch"
    seen: LayerShape = lambda ours: ours
    remark: str = ""


def found(module: str) -> Any:
    """Import a peer, or go without."""
    from pullback._networks.models import import_torchvision

    try:
        import_torchvision()  # several ask for it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except Exception:
        return None


def own_copy(model: nn.Module, *, trainable: bool = False) -> nn.Module:
    """Copy a module's structure, with its weights shared and nothing in place."""
    weights = {id(p): nn.Parameter(p.detach(), requires_grad=trainable) for p in model.parameters()}
    copied = copy.deepcopy(model, weights)  # pyright: ignore[reportArgumentType]
    for module in copied.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # pyright: ignore[reportArgumentType]
    return copied


def peers(method: str, model: nn.Module, x: Tensor, name: str) -> dict[str, Peer]:
    """Give the peers that have a method, by library; Grad-CAM at the network's layer in `LAYERS`."""
    layer = LAYERS.get(name, "")
    libraries = {"captum": captum, "zennit": zennit, "torchray": torchray, "grad-cam": grad_cam, "torchcam": torchcam}
    made = {library: make(method, model, x, layer, name) for library, make in libraries.items()}
    return {library: peer for library, peer in made.items() if peer is not None}


def absent() -> list[str]:
    """Name the libraries that are not installed."""
    modules = {
        "captum": "captum",
        "zennit": "zennit",
        "torchray": "torchray.attribution",
        "grad-cam": "pytorch_grad_cam",
    }
    return [library for library, module in {**modules, "torchcam": "torchcam"}.items() if found(module) is None]


def _repeated(x: Tensor, count: int) -> Tensor:
    return x.repeat(count, *[1] * (x.ndim - 1))


def captum(method: str, model: nn.Module, x: Tensor, layer: str, name: str) -> Peer | None:
    attr = found("captum.attr")
    if attr is None:
        return None
    model = own_copy(model)
    options: dict[str, Any] = {}
    if method == "grad_cam":
        if name.startswith("vit"):
            return None  # it has no way to lay tokens out
        made, options = attr.LayerGradCam(model, model.get_submodule(layer)), {"relu_attributions": True}
    elif method == "integrated_gradients":
        made, options = attr.IntegratedGradients(model), {"n_steps": STEPS}
    else:
        names = {
            "gradient": "Saliency",
            "guided_backprop": "GuidedBackprop",
            "input_x_gradient": "InputXGradient",
        }
        made, options = getattr(attr, names[method])(model), {"abs": False} if method == "gradient" else {}

    def attribute(inputs: Tensor, target: Any) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells of its hooks
            return made.attribute(inputs.clone().requires_grad_(), target=target, **options).detach()

    return Peer(
        lambda t: attribute(x, t),
        lambda targets: attribute(_repeated(x, len(targets)), targets).unsqueeze(1),
        remark="leaves ReLU6 alone" if (method, name) == ("guided_backprop", "lite0") else "",
    )


def zennit(method: str, model: nn.Module, x: Tensor, layer: str, name: str) -> Peer | None:
    attribution, composites = found("zennit.attribution"), found("zennit.composites")
    if attribution is None or method not in ("gradient", "guided_backprop", "integrated_gradients"):
        return None
    model = own_copy(model)
    if method == "integrated_gradients":
        made = attribution.IntegratedGradients(model, n_iter=STEPS)
    else:
        made = attribution.Gradient(model, composites.GuidedBackprop() if method == "guided_backprop" else None)
    made.__enter__()  # as `with attributor:` around all calls
    units = torch.eye(int(model(x).shape[1]), device=x.device)

    def attribute(inputs: Tensor, targets: Tensor) -> Tensor:
        return made(inputs.clone().requires_grad_(), units[targets])[1].detach()

    remarks = {
        ("guided_backprop", "lite0"): "leaves ReLU6 alone",
        ("integrated_gradients", name): "other points on the path",
    }
    return Peer(lambda t: attribute(x, torch.tensor([t] * len(x))), remark=remarks.get((method, name), ""))


def torchray(method: str, model: nn.Module, x: Tensor, layer: str, name: str) -> Peer | None:
    module = found(f"torchray.attribution.{method}")
    if module is None or x.ndim != 4 or (name.startswith("vit") and method == "grad_cam"):
        return None
    model, run = own_copy(model), getattr(module, method)
    options = {"saliency_layer": layer} if method == "grad_cam" else {}
    seen = (lambda ours: ours) if method == "grad_cam" else maps.channel_peak
    remark = "leaves ReLU6 alone" if (method, name) == ("guided_backprop", "lite0") else ""
    return Peer(lambda t: run(model, x.clone(), t, **options).detach(), seen=seen, remark=remark)


def _tokens(activation: Tensor) -> Tensor:
    """Lay the tokens of a transformer out on a square, without the class token."""
    side = round((activation.shape[1] - 1) ** 0.5)
    return activation[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def grad_cam(method: str, model: nn.Module, x: Tensor, layer: str, name: str) -> Peer | None:
    library = found("pytorch_grad_cam")
    if library is None:
        return None
    model = own_copy(model, trainable=True)
    if method == "guided_backprop" and x.ndim == 4:
        run = library.GuidedBackpropReLUModel(model)

        def guided(t: int) -> Tensor:
            return torch.from_numpy(run(x.clone(), t)).permute(2, 0, 1)[None]

        return Peer(guided, remark="leaves ReLU6 alone" if name == "lite0" else "")
    if method != "grad_cam":
        return None
    target = found("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
    how = {"reshape_transform": _tokens} if name.startswith("vit") else {}
    cam = library.GradCAM(model, [model.get_submodule(layer)], **how)

    def attribute(inputs: Tensor, targets: list[int]) -> Tensor:
        return torch.from_numpy(cam(inputs, [target(t) for t in targets]))

    return Peer(
        lambda t: attribute(x, [t]),
        lambda targets: attribute(_repeated(x, len(targets)), targets.tolist()).unsqueeze(1),
        seen=lambda ours: maps.normalise(maps.resize(ours, x.shape[2:]))[:, 0],
    )


def torchcam(method: str, model: nn.Module, x: Tensor, layer: str, name: str) -> Peer | None:
    library = found("torchcam.methods")
    if library is None or method != "grad_cam":
        return None
    model = own_copy(model, trainable=True)
    how = {"reshape_transform": _tokens} if name.startswith("vit") else {}
    cam = library.GradCAM(model, layer, tuple(x.shape[1:]), **how)

    def retained(targets: Tensor) -> Tensor:
        """One forward, kept for all."""
        scores = model(x)
        return torch.stack([cam(t, scores, retain_graph=True)[0] for t in targets.tolist()])

    return Peer(lambda t: cam(t, model(x))[0], retained, "one forward", lambda ours: maps.normalise(ours)[:, 0])


def gaps(peers: dict[str, Peer], ours: Tensor, targets: list[int]) -> Iterator[tuple[str, float]]:
    """Compare each peer's values with ours ``[target ...]``: the largest difference over the largest value."""
    for library, peer in peers.items():
        mine = torch.stack([peer.seen(a) for a in ours])
        ways = [torch.stack([peer.one(t).reshape(mine.shape[1:]) for t in targets])]
        if peer.many is not None:
            ways.append(peer.many(torch.tensor(targets, device=ours.device)).reshape(mine.shape))
        yield library, max(gap(mine, theirs.to(mine.device)) for theirs in ways)
