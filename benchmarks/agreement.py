"""Values of path, noise and CAM methods beside those of captum, pytorch-grad-cam, torchcam and PAIR saliency.

    python benchmarks/agreement.py

For each method and each library that is installed: the largest difference over the largest value, on a network of
modules in sequence, in float64 where the library can. Rows with a remark differ by what the remark says; the others
must stay below the tolerance, or the exit code is 1.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import _measure
import numpy as np
import torch
from torch import Tensor, nn

import pullback
from pullback import Layer, maps, params_of
from pullback._networks import import_torchvision

T = 1  # the class explained


class Row(NamedTuple):
    method: str
    ours: Tensor
    theirs: Any
    tolerance: float = 1e-5
    remark: str = ""


def network(dtype: torch.dtype) -> tuple[nn.Sequential, Tensor]:
    """Convolutions with module ReLUs, then a classifier over positions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(8 * 5 * 5, 5)),
        )
        return model.to(dtype).eval(), torch.randn(1, 3, 16, 16).to(dtype)


def captum(smoke: bool) -> Iterator[Row]:
    attr = importlib.import_module("captum.attr")
    model, x = network(torch.float64)
    params, steps = params_of(model), 8 if smoke else 50
    layer, name = model[3], "3"
    best = int(pullback.activation(params, model, x, layer=name)[0].argmax())
    place = (best // 25, best // 5 % 5, best % 5)

    def unit(y: Tensor) -> Tensor:
        return y[(slice(None), *place)]

    yield Row("gradient", pullback.gradient(params, model, x, T).abs(), attr.Saliency(model).attribute(x, T))
    yield Row(
        "input_x_gradient", pullback.input_x_gradient(params, model, x, T), attr.InputXGradient(model).attribute(x, T)
    )
    yield Row(
        "guided_backprop", pullback.guided_backprop(params, model, x, T), attr.GuidedBackprop(model).attribute(x, T)
    )
    yield Row("deconvnet", pullback.deconvnet(params, model, x, T), attr.Deconvolution(model).attribute(x, T))
    yield Row(
        "guided_grad_cam",
        pullback.guided_grad_cam(params, model, x, T, layer=name, resize_mode="nearest"),
        attr.GuidedGradCam(model, layer).attribute(x, T),
    )
    for rule, method in {
        "gauss_legendre": "gausslegendre",
        "riemann_left": "riemann_left",
        "riemann_right": "riemann_right",
        "riemann_middle": "riemann_middle",
        "trapezoid": "riemann_trapezoid",
    }.items():
        theirs = attr.IntegratedGradients(model).attribute(x, target=T, n_steps=steps, method=method)
        ours = pullback.integrated_gradients(params, model, x, T, steps=steps, quadrature=rule)  # pyright: ignore[reportArgumentType]
        remark = "captum's weights add up to (n - 1)/n" if rule == "trapezoid" else ""
        yield Row(f"integrated_gradients, {rule}", ours, theirs, 1e-5, remark)
        if remark:
            yield Row("the same, times (n - 1)/n", ours * (steps - 1) / steps, theirs, 1e-5)
    at = {"target": T, "n_steps": steps}
    yield Row(
        "integrated_gradients, layer",
        pullback.integrated_gradients(params, model, x, T, layer=name, steps=steps),
        attr.LayerIntegratedGradients(model, layer).attribute(x, **at),
    )
    yield Row(
        "integrated_gradients, neuron",
        pullback.integrated_gradients(params, model, x, unit, output=Layer(name), steps=steps),
        attr.NeuronIntegratedGradients(model, layer).attribute(x, place, n_steps=steps),
    )
    yield Row(
        "internal_influence",
        pullback.internal_influence(params, model, x, T, layer=name, steps=steps),
        attr.InternalInfluence(model, layer).attribute(x, **at),
    )
    many = {**at, "n_steps": 20 if smoke else 2000}
    theirs = attr.LayerConductance(model, layer).attribute(x, **many)
    ours = pullback.conductance(params, model, x, T, layer=name, steps=many["n_steps"], chunk_size=100)
    yield Row("conductance", ours, theirs, math.inf if smoke else 1e-2, "captum takes differences of activations")
    yield Row(
        "neuron_conductance",
        pullback.neuron_conductance(params, model, x, T, layer=name, neuron=place, steps=steps),
        attr.NeuronConductance(model, layer).attribute(x, place, method="gausslegendre", **at),
    )
    signed = pullback.saliency(params, model, x, T, layer=name, reduce=_signed)
    yield Row("Grad-CAM without clamp", signed, attr.LayerGradCam(model, layer).attribute(x, T))
    samples = 50 if smoke else 4000
    data = torch.linspace(-1, 1, 4, dtype=x.dtype).reshape(4, 1, 1, 1).expand(4, *x.shape[1:])
    ours = pullback.expected_gradients(params, model, x, T, baselines=data, samples=samples, chunk_size=100)
    torch.manual_seed(0)
    theirs = attr.GradientShap(model).attribute(x, target=T, baselines=data, n_samples=samples, stdevs=0.0)
    yield Row("expected_gradients", ours, theirs, math.inf if smoke else 0.1, "random on both sides")


def _signed(activation: Tensor, gradient: Tensor) -> Tensor:
    return maps.weighted_sum(activation, gradient.flatten(2).mean(2))


def _scaled(map: Tensor, x: Tensor) -> Tensor:
    return maps.normalise(maps.resize(map.clamp(min=0), x.shape[2:]))[:, 0]


def pytorch_grad_cam(smoke: bool) -> Iterator[Row]:
    import_torchvision()  # with what it needs on any build of torch
    peer = importlib.import_module("pytorch_grad_cam")
    target = importlib.import_module("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget(T)
    model, x = network(torch.float32)
    params, at = params_of(model), {"layer": "3"}
    for ours, theirs, remark in (
        ("grad_cam", "GradCAM", ""),
        ("hires_cam", "HiResCAM", ""),
        ("elementwise_grad_cam", "GradCAMElementWise", ""),
        ("layer_cam", "LayerCAM", ""),
        ("xgrad_cam", "XGradCAM", ""),
        ("grad_cam_plus_plus", "GradCAMPlusPlus", ""),
        ("score_cam", "ScoreCAM", "they resize masks corner to corner"),
        ("ablation_cam", "AblationCAM", ""),
        ("eigen_cam", "EigenCAM", "sign of the component"),
        ("eigen_grad_cam", "EigenGradCAM", "sign of the component"),
    ):
        map = getattr(pullback, ours)(params, model, x, T, **at)
        found = getattr(peer, theirs)(model=model, target_layers=[model[3]])(input_tensor=x, targets=[target])
        found = torch.from_numpy(found)
        if remark.startswith("sign"):  # whichever they got
            map = min((map, -map), key=lambda m: float((_scaled(m, x) - found).abs().max()))
        yield Row(ours, _scaled(map, x), found, 1e-3, remark)
    full, found = pullback.full_grad(params, model, x, T), peer.FullGrad(model, [])(input_tensor=x, targets=[target])
    yield Row(
        "full_grad", maps.normalise(full)[:, 0], torch.from_numpy(found), math.inf, "they scale channel by channel"
    )


def torchcam(smoke: bool) -> Iterator[Row]:
    peer = importlib.import_module("torchcam.methods")
    model, x = network(torch.float32)
    params, at = params_of(model), {"layer": "3"}
    for ours, theirs, options, remark in (
        ("grad_cam", "GradCAM", {}, ""),
        ("layer_cam", "LayerCAM", {}, ""),
        ("xgrad_cam", "XGradCAM", {}, ""),
        ("grad_cam_plus_plus", "GradCAMpp", {}, "they sum activation times third derivative over positions"),
        ("score_cam", "ScoreCAM", {}, "they scale to [0, 1] before resizing"),
        ("is_cam", "ISCAM", {"samples": 3}, "as above"),
    ):
        map = getattr(pullback, ours)(params, model, x, T, **at, **options)
        settings = {"num_samples": options["samples"]} if options else {}
        with getattr(peer, theirs)(model, "3", input_shape=(3, 16, 16), **settings) as extractor:
            found = extractor(T, model(x))[0].detach()
        yield Row(ours, maps.normalise(map)[:, 0], found, 1e-3 if not remark else math.inf, remark)


def _quantile(values: Any, q: float, interpolation: str) -> Any:
    """The name that an argument of NumPy had when PAIR saliency was written."""
    return _numpy_quantile(values, q, method=interpolation)  # pyright: ignore[reportArgumentType, reportCallIssue]


_numpy_quantile = np.quantile


def pair(smoke: bool) -> Iterator[Row]:
    core = importlib.import_module("saliency.core")
    model, x = network(torch.float64)
    params, steps = params_of(model), 5 if smoke else 50
    image = x[0].permute(1, 2, 0).numpy()

    def call(batch: Any, call_model_args: Any = None, expected_keys: Any = None) -> dict[str, Any]:
        inputs = torch.as_tensor(batch).to(x.dtype).permute(0, 3, 1, 2).requires_grad_()
        (slopes,) = torch.autograd.grad(model(inputs)[:, T].sum(), inputs)
        return {core.base.INPUT_OUTPUT_GRADIENTS: slopes.permute(0, 2, 3, 1).numpy()}

    def theirs(result: Any) -> Tensor:
        return torch.as_tensor(result).permute(2, 0, 1).unsqueeze(0)

    yield Row("gradient", pullback.gradient(params, model, x, T), theirs(core.GradientSaliency().GetMask(image, call)))
    found = theirs(core.IntegratedGradients().GetMask(image, call, x_steps=steps, x_baseline=0 * image))
    ours = pullback.integrated_gradients(params, model, x, T, steps=steps + 1, quadrature="trapezoid")
    yield Row("integrated_gradients", ours, found, math.inf, "they count both ends of the path in full")
    for fraction, distance in ((0.25, 0.1), (0.1, 1.0)):
        with mock.patch("numpy.quantile", _quantile):
            found = core.GuidedIG().GetMask(
                image, call, x_steps=steps, x_baseline=0 * image, fraction=fraction, max_dist=distance
            )
        ours = pullback.guided_integrated_gradients(
            params, model, x, T, steps=steps, fraction=fraction, max_distance=distance
        )
        yield Row(f"guided_integrated_gradients, {fraction}, {distance}", ours, theirs(found), 1e-2)
    found = theirs(core.BlurIG().GetMask(image, call, max_sigma=4, steps=steps, grad_step=0.001))
    ours = pullback.blur_integrated_gradients(
        params, model, x, T, sigma=4 / 16, steps=steps, quadrature="riemann_right", padding="zeros"
    )
    yield Row("blur_integrated_gradients", ours, found, math.inf, "they take differences, and cut each blur at 4 sigma")
    segments = [torch.rand(16, 16, generator=torch.Generator().manual_seed(k)) > 0.7 for k in range(12)]
    attribution = pullback.gradient(params, model, x, T)
    parameters = core.XRAIParameters(area_threshold=1.0, steps=steps)
    found = core.XRAI().GetMaskWithDetails(
        image, call, segments=[s.numpy() for s in segments], extra_parameters=parameters,
        base_attribution=attribution[0].permute(1, 2, 0).numpy(),
    )  # fmt: skip
    ours = pullback.xrai(
        params, model, x, T, segments=torch.stack(segments), method=pullback.gradient,
        least_area=parameters.experimental_params["min_pixel_diff"],
    )  # fmt: skip
    yield Row("xrai", ours[0, 0], torch.as_tensor(found.attribution_mask), 1e-5)


def main() -> int:
    options = _measure.arguments(__doc__ or "")
    rows, failed = [], False
    for library, module in (
        (captum, "captum"),
        (pytorch_grad_cam, "pytorch_grad_cam"),
        (torchcam, "torchcam"),
        (pair, "saliency"),
    ):
        if importlib.util.find_spec(module) is None:
            rows.append([library.__name__, "not installed", "", "", ""])
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for row in library(options.smoke):
                theirs = row.theirs.detach().double().reshape(row.ours.shape)
                error = float((row.ours.double() - theirs).abs().max() / theirs.abs().max())
                failed |= error > row.tolerance and not row.remark
                limit = "" if row.remark else f"{row.tolerance:.0e}"
                rows.append([library.__name__, row.method, f"{error:.1e}", limit, row.remark])
    print(_measure.table(["library", "method", "difference / largest value", "tolerance", "differs because"], rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
