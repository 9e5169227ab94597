"""One montage of every path, noise, gradient and CAM method on one photograph, with a trained network.

    make gallery        writes docs/gallery.jpg

A person looks at it after every change: a method that went wrong shows. `discretised_integrated_gradients` takes pixels
for tokens and colours of the photograph for words. `integrated_hessians` is not here: its result is no picture.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _measure
import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

import pullback
from pullback import Layer, maps, params_of
from pullback._networks.messages import needed
from pullback._networks.models import load
from pullback._networks.photographs import prepare, read

Method = Callable[..., Any]


def methods(
    x: Tensor, layer: str, layers: list[str], last: str, head: str, cheap: bool
) -> dict[str, tuple[Method, dict[str, Any]]]:
    """Every method with its options, in the order of the montage."""
    few, steps = (2, 3) if cheap else (4, 12)
    at, chunk = {"layer": layer}, {"chunk_size": 8}
    path, masked = {"steps": steps, **chunk}, {"layer": layers[-2]}  # fewer channels to score, and finer
    grey = maps.blurred(x, torch.tensor(20.0), 40)
    data = torch.cat([grey, x.amin((2, 3), keepdim=True).expand_as(x), x.amax((2, 3), keepdim=True).expand_as(x)])
    labels = torch.arange(x[0, 0].numel()).reshape(x.shape[2:]) // 64 % 16
    segments = labels if cheap else pullback.felzenszwalb_segments(x[0], (150, 500, 1200))
    noise = {"samples": 2 * few, "noise": 0.1, **chunk}
    middle = Layer(layers[-2])
    return {
        "gradient": (pullback.gradient, {}),
        "gradient, of a neuron": (_of_brightest, {"method": pullback.gradient, "output": middle}),
        "input_x_gradient": (pullback.input_x_gradient, {}),
        "guided_backprop": (pullback.guided_backprop, {}),
        "deconvnet": (pullback.deconvnet, {}),
        "smooth_grad": (pullback.smooth_grad, noise),
        "smooth_grad, squared": (pullback.smooth_grad, {**noise, "statistic": "squared"}),
        "smooth_grad, variance": (pullback.smooth_grad, {**noise, "statistic": "variance"}),
        "integrated_gradients": (pullback.integrated_gradients, {**path, "baseline": grey}),
        "integrated_gradients, at a layer": (pullback.integrated_gradients, {**path, **at, "baseline": grey}),
        "expected_gradients": (pullback.expected_gradients, {"samples": steps, "baselines": data, **chunk}),
        "blur_integrated_gradients": (pullback.blur_integrated_gradients, path),
        "guided_integrated_gradients": (pullback.guided_integrated_gradients, {"steps": steps, "baseline": grey}),
        "discretised_integrated_gradients": (_by_colours, {"steps": steps, "baseline": grey, **chunk}),
        "idgi": (pullback.idgi, {**path, "baseline": grey}),
        "neuron_conductance": (pullback.neuron_conductance, {**path, **at, "neuron": torch.ones(()), "baseline": grey}),
        "full_grad": (pullback.full_grad, {}),
        "xrai": (pullback.xrai, {**path, "segments": segments}),
        "conductance": (pullback.conductance, {**path, **at, "baseline": grey}),
        "internal_influence": (pullback.internal_influence, {**path, **at, "baseline": grey}),
        "cam": (pullback.cam, {"layer": last, "head": head}),
        "grad_cam": (pullback.grad_cam, at),
        "grad_cam_plus_plus": (pullback.grad_cam_plus_plus, at),
        "smooth_grad_cam_plus_plus": (pullback.smooth_grad_cam_plus_plus, {**at, **noise}),
        "xgrad_cam": (pullback.xgrad_cam, at),
        "hires_cam": (pullback.hires_cam, at),
        "linear_approx": (pullback.linear_approx, at),
        "elementwise_grad_cam": (pullback.elementwise_grad_cam, at),
        "layer_cam": (pullback.layer_cam, at),
        "fused_cam": (pullback.fused_cam, {"layers": layers}),
        "refine_cam": (pullback.refine_cam, {"layers": layers}),
        "eigen_cam": (pullback.eigen_cam, at),
        "eigen_grad_cam": (pullback.eigen_grad_cam, at),
        "score_cam": (pullback.score_cam, {**masked, **chunk}),
        "ss_cam": (pullback.ss_cam, {**masked, "samples": 2, "noise": 0.5, **chunk}),
        "is_cam": (pullback.is_cam, {**masked, "samples": 2, **chunk}),
        "ablation_cam": (pullback.ablation_cam, {**masked, **chunk}),
        "finer_cam": (pullback.finer_cam, at),
        "guided_grad_cam": (pullback.guided_grad_cam, at),
    }


def _of_brightest(params: Any, model: Any, x: Tensor, target: Any, *, method: Method, output: Layer) -> Tensor:
    """Explain the neuron of a layer that is most active."""
    best = pullback.activation(params, model, x, layer=output.name).flatten(1).argmax(1, keepdim=True)
    return method(params, model, x, lambda y: y.flatten(1).gather(1, best)[:, 0], output=output)


def _by_colours(params: Any, model: Any, x: Tensor, target: Any, *, baseline: Tensor, **options: Any) -> Tensor:
    """Go from the baseline to the image through colours that are in it: pixels are tokens, colours are words."""

    def pixels(image: Tensor) -> Tensor:
        return image.flatten(2).mT

    def run(params: Any, tokens: Tensor) -> Tensor:
        return functional_call(model, params, (tokens.mT.unflatten(2, x.shape[2:]),))

    words = pixels(x)[0, :: x[0, 0].numel() // 200]
    given = {"words": words, "neighbours": 20, "baseline": pixels(baseline)}
    found = pullback.discretised_integrated_gradients(params, run, pixels(x), target, **given, **options)
    return found.mT.unflatten(2, x.shape[2:])


def main() -> None:
    options = _measure.arguments(__doc__ or "", out="docs/gallery.jpg", target=285)
    if options.smoke:
        model, size = _measure.network("tiny", "cpu")
        image = np.random.default_rng(0).random((size, size, 3))
        x = torch.from_numpy(image).permute(2, 0, 1).float().unsqueeze(0)
        layer, layers, last, head, target = "2", ["0", "2"], "2", "6", 3
    else:
        (skimage,) = needed("demo", "skimage")
        network = load("efficientnet-lite0", None, torch.device("cpu"))
        model, target = network.model, options.target
        image = read(Path(skimage.data_dir) / "chelsea.png", network.preprocessing)
        x = prepare(image, network.preprocessing, torch.device("cpu"))
        layer, layers, head = "_blocks.15", ["_blocks.4", "_blocks.10", "_blocks.15"], "_fc"
        last = "_swish#1"  # the rectifier before the pooling
    params, found = params_of(model), {}
    for name, (method, settings) in methods(x, layer, layers, last, head, options.smoke).items():
        start = time.perf_counter()
        attribution = method(params, model, x, target, **settings).detach()
        map = maps.channel_sum(attribution) if attribution.shape[1] > 1 else attribution
        found[name] = maps.resize(map, x.shape[2:])[0, 0] if map.shape[2:] != x.shape[2:] else map[0, 0]
        print(f"{name:30s} {time.perf_counter() - start:6.2f} s", flush=True)
    write(image, found, Path(options.out) if not options.smoke else None)


def write(image: np.ndarray, found: dict[str, Tensor], path: Path | None) -> None:
    pyplot = needed("plot", "matplotlib.pyplot")[0]
    overlay = needed("plot", "pullback.plot")[0].overlay
    columns = 8
    figure, axes = pyplot.subplots(
        math.ceil((len(found) + 1) / columns), columns, figsize=(12, 8.3), layout="constrained"
    )
    for ax in axes.flat:
        ax.set_axis_off()
    axes.flat[0].imshow(image)
    axes.flat[0].set_title("photograph", fontsize=6)
    for ax, (name, map) in zip(axes.flat[1:], found.items(), strict=False):
        ax.imshow(overlay(image, map))
        ax.set_title(name, fontsize=6)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100, pil_kwargs={"quality": 85})
        print(path)


if __name__ == "__main__":
    main()
