"""Example data, data sets, networks and the pointing game, over local files: nothing is ever downloaded."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pullback._networks.messages import needed
from pullback._networks.models import Preprocessing, load
from pullback._networks.photographs import prepare, read
from pullback.compat.torchray.benchmark.datasets import *  # noqa: F403
from pullback.compat.torchray.benchmark.models import *  # noqa: F403
from pullback.compat.torchray.benchmark.models import _torchvision_network
from pullback.compat.torchray.utils import imsc

_CAT, _TABBY = 285, 282  # what the packaged photograph shows


def get_example_data(arch: str | None = None, shape: int | tuple[int, int] = 224) -> tuple[nn.Module, Tensor, int, int]:
    """Give a network, a photograph, and two classes that it shows.

    TorchRay downloads a photograph of a dog and a cat, and VGG-16. Here the photograph is the cat that comes with
    scikit-image, so the classes are 285 (Egyptian cat) and 282 (tiger cat).

    Args:
        arch: A name of torchvision's, with weights from the local cache of torch, or random ones and a warning: layer
            names such as ``features.29`` of ``vgg16`` stay good. If omitted, EfficientNet-Lite0 with its packaged
            ImageNet weights.
        shape: Side of the photograph, or (height, width).

    Returns:
        Model in eval mode, input ``[1 3 height width]``, and two class indices.
    """
    if arch is None:
        network = load("efficientnet-lite0", None, torch.device("cpu"))
    else:
        network = _torchvision_network(arch)
    size = (shape, shape) if isinstance(shape, int) else tuple(shape)
    kept = network.preprocessing
    preprocessing = Preprocessing((size[0], size[1]), kept.mean, kept.std, 1.0, kept.interpolation)
    (skimage,) = needed("demo", "skimage")
    pixels = read(Path(skimage.data_dir) / "chelsea.png", preprocessing)
    return network.model, prepare(pixels, preprocessing, torch.device("cpu")), _CAT, _TABBY


def plot_example(
    input: Tensor,
    saliency: Tensor,
    method: str,
    category_id: Any,
    show_plot: bool = False,
    save_path: str | os.PathLike[str] | None = None,
) -> None:
    """Draw inputs beside their maps.

    Args:
        input: ``[batch 3 height width]``.
        saliency: ``[batch 1 height width]``.
        method: Name of the method, for the titles.
        category_id: Class index, one for all or one each, for the titles.
        show_plot: Show the figure.
        save_path: File to write it to.
    """
    plt = importlib.import_module("matplotlib.pyplot")
    classes = category_id if isinstance(category_id, list | tuple | Tensor) else [category_id] * len(input)
    figure = plt.figure(figsize=(6, 3 * len(input)))
    for i, (x, m, c) in enumerate(zip(input, saliency, classes, strict=True)):
        for j, (image, title) in enumerate(((x, "input image"), (m, f"{method}, class {int(c)}"))):
            plt.subplot(len(input), 2, 2 * i + j + 1)
            imsc(image[None])
            plt.title(title)
    if save_path is not None:
        figure.savefig(save_path)
    if show_plot:
        plt.show()
    plt.close(figure)
