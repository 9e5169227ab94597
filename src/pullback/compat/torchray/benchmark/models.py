"""Networks with weights from local files, and the preprocessing that belongs to them.

TorchRay downloads Caffe weights for VOC and COCO. Nothing is downloaded here: weights come from where torch keeps what
it has downloaded, ``torch.hub.get_dir()/checkpoints``; without them a network has random weights and a warning names
the file that was wanted.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback._core.types import PullbackWarning
from pullback._networks.models import IMAGENET_MEAN, IMAGENET_STD, Network, _torchvision, import_torchvision
from pullback.compat.torchray._arguments import ArgumentError
from pullback.compat.torchray.benchmark.datasets import COCO_CLASSES, IMAGENET_CLASSES, VOC_CLASSES
from pullback.compat.torchray.utils import pil_to_tensor

__all__ = ["get_model", "get_transform", "replace_module"]

_CLASSES = {"imagenet": len(IMAGENET_CLASSES), "voc": len(VOC_CLASSES), "coco": len(COCO_CLASSES)}
_CAFFE_MEAN = (123.68, 116.779, 103.939)


def _kind(dataset: str) -> str:
    for kind in _CLASSES:
        if dataset.startswith(kind):
            return kind
    raise ArgumentError(f"`dataset` must be one of {', '.join(_CLASSES)}, got {dataset!r}.")


def _torchvision_network(arch: str) -> Network:
    """Give torchvision's network of that name, with weights where torch has kept them."""
    network = _torchvision(arch)
    models = import_torchvision().models
    file = next((os.path.basename(w.url) for w in models.get_model_weights(arch)), f"{arch}.pth")
    _load(network.model, file)
    return Network(network.model.eval(), network.name, file, network.preprocessing)


def _load(model: nn.Module, name: str) -> None:
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if file.is_file():
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    else:
        warnings.warn(
            f"The network has random weights: there is no `{file}`. Put a state dict there.",
            PullbackWarning,
            stacklevel=4,
        )


def replace_module(model: nn.Module, module_name: str, new_module: nn.Module) -> None:
    """Put a module in the place of another, named as in `named_modules`."""
    path, _, name = module_name.rpartition(".")
    parent = dict(model.named_modules()).get(path)
    if parent is None or name not in parent._modules:
        raise ArgumentError(f"`module_name`: no module `{module_name}` in the model.")
    parent._modules[name] = new_module


def get_model(arch: str = "vgg16", dataset: str = "voc", convert_to_fully_convolutional: bool = False) -> nn.Module:
    """Give a network of torchvision's for a data set, in eval mode.

    Args:
        arch: Such as ``"vgg16"`` or ``"resnet50"``.
        dataset: ``"imagenet"`` (weights: torchvision's), ``"voc"`` or ``"coco"`` (weights: a state dict in
            ``ARCH_DATASET.pth``); it settles the number of classes.
        convert_to_fully_convolutional: Make the classifier convolutions, so that larger images give a grid of scores.
            For VGG and ResNet networks; layer names stay.

    Returns:
        Module in eval mode.
    """
    kind = _kind(dataset)
    if kind == "imagenet":
        model = _torchvision_network(arch).model
    else:
        model = _torchvision(arch).model
        linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ArgumentError(f"`arch` must end in a linear layer to be fitted to {dataset!r}, got {arch!r}.")
        name, last = linear[-1]
        replace_module(model, name, nn.Linear(last.in_features, _CLASSES[kind]))
        _load(model, f"{arch}_{kind}.pth")
    return (_convolutional(model, arch) if convert_to_fully_convolutional else model).eval()


def _convolution(linear: nn.Linear, side: int) -> nn.Conv2d:
    convolution = nn.Conv2d(linear.in_features // side**2, linear.out_features, side, bias=linear.bias is not None)
    state = {"weight": linear.weight.detach().reshape(convolution.weight.shape)}
    if linear.bias is not None:
        state["bias"] = linear.bias.detach()
    convolution.load_state_dict(state)
    return convolution


def _convolutional(model: nn.Module, arch: str) -> nn.Sequential:
    parts = OrderedDict(model.named_children())
    if list(parts) == ["features", "avgpool", "classifier"] and isinstance(parts["classifier"], nn.Sequential):
        side, layers = 7, []
        for layer in parts["classifier"]:
            layers.append(_convolution(layer, side) if isinstance(layer, nn.Linear) else layer)
            side = 1 if isinstance(layer, nn.Linear) else side
        return nn.Sequential(
            OrderedDict(features=parts["features"], avgpool=nn.Identity(), classifier=nn.Sequential(*layers))
        )
    if list(parts)[-2:] == ["avgpool", "fc"] and isinstance(parts["fc"], nn.Linear):
        parts["avgpool"], parts["fc"] = nn.AvgPool2d(7, stride=1), _convolution(parts["fc"], 1)
        return nn.Sequential(parts)
    raise ArgumentError(
        f"`convert_to_fully_convolutional` must be False for {arch!r}: it is for VGG and ResNet networks."
    )


class _Transform:
    """From an image to what a network sees."""

    def __init__(self, size: int | Sequence[int] | None, scale: float, mean: Sequence[float], std: Sequence[float]):
        self.size, self.scale = size, scale
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (mean, std))

    def __call__(self, image: Any) -> Tensor:
        x = image if isinstance(image, Tensor) else pil_to_tensor(image.convert("RGB"))
        if self.size is not None:
            height, width = x.shape[1:]
            if isinstance(self.size, int):  # the shorter side
                shrink = self.size / min(height, width)
                size = (round(height * shrink), round(width * shrink))
            else:
                size = (self.size[0], self.size[1])
            x = F.interpolate(x[None], size, mode="bilinear", align_corners=False)[0]
        return (x * self.scale - self.mean) / self.std


def get_transform(dataset: str = "imagenet", size: int | Sequence[int] | None = 224) -> Callable[[Any], Tensor]:
    """Give the function from an image to an input ``[3 height width]``.

    Args:
        dataset: ``"imagenet"`` (torchvision's mean and deviation), ``"voc"`` or ``"coco"`` (values up to 255, Caffe's
            mean, channels in the order red, green, blue).
        size: Length of the shorter side, or (height, width); `None` for no change. Interpolated linearly, without
            anti-aliasing.
    """
    if _kind(dataset) == "imagenet":
        return _Transform(size, 1.0, IMAGENET_MEAN, IMAGENET_STD)
    return _Transform(size, 255.0, _CAFFE_MEAN, (1.0, 1.0, 1.0))
