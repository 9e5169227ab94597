"""Values of path, noise and CAM methods beside those of captum, pytorch-grad-cam, torchcam and PAIR saliency.

    python benchmarks/agreement.py

For each method and each library that is installed: the largest difference over the largest value, on a network of
modules in sequence, in float64 where the library can. pytorch-grad-cam and torchcam return maps scaled to [0, 1], by
their least and greatest value, and ours are compared scaled as well, at the size of the input for the former.

A row with a remark differs by what the remark says, and the row after it shows that it does: ours, with that one thing
changed, is theirs. Rows without a remark must stay below the tolerance, or the exit code is 1.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
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
from pullback._networks.models import import_torchvision
from pullback.attribution.paths._quadrature import quadrature_of

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


class Transformer(nn.Module):
    """A class token and 16 patches through one block; the class is read from the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x).flatten(2).mT], 1)
        normal = self.norm(h)
        return self.head((h + self.attention(normal, normal, normal)[0])[:, 0])


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
        remark = "captum's weights add up to (n - 1)/n" if rule == "trapezoid" else "captum's numbers are float32"
        yield Row(f"integrated_gradients, {rule}", ours, theirs, 1e-5, remark)
        with mock.patch.object(importlib.import_module("pullback.paths.integrated"), "quadrature_of", _in_float32):
            ours = pullback.integrated_gradients(params, model, x, T, steps=steps, quadrature=rule)  # pyright: ignore[reportArgumentType]
        yield Row("the same, by such weights", ours, theirs, 1e-12)
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
    theirs = attr.LayerConductance(model, layer).attribute(x, **at)
    ours = pullback.conductance(params, model, x, T, layer=name, steps=steps)
    yield Row("conductance", ours, theirs, remark="captum takes differences of activations between points")
    yield Row("the same, by differences", _by_differences(params, model, x, name, steps), theirs)
    yield Row(
        "neuron_conductance",
        pullback.neuron_conductance(params, model, x, T, layer=name, neuron=place, steps=steps),
        attr.NeuronConductance(model, layer).attribute(x, place, method="gausslegendre", **at),
    )
    signed = pullback.saliency(params, model, x, T, layer=name, reduce=_signed)
    yield Row("Grad-CAM without clamp", signed, attr.LayerGradCam(model, layer).attribute(x, T))
    data = torch.linspace(-1, 1, 4, dtype=x.dtype).reshape(4, 1, 1, 1).expand(4, *x.shape[1:])
    with _recorded("choice") as chosen, _recorded("uniform") as alphas:
        theirs = attr.GradientShap(model).attribute(x, target=T, baselines=data, n_samples=steps, stdevs=0.0)

    def explained() -> Tensor:
        return pullback.expected_gradients(params, model, x, T, baselines=data, samples=steps)

    yield Row("expected_gradients", explained(), theirs, remark="other random numbers")
    drawn = np.stack([np.ravel(alphas), (np.ravel(chosen) + 0.5) / len(data)])

    def uniform(seed: Any, index: Tensor, shape: Any, dtype: torch.dtype, stream: int = 0) -> Tensor:
        return torch.as_tensor(drawn[stream])[index]

    with mock.patch.object(importlib.import_module("pullback.paths.integrated"), "uniform", uniform):
        yield Row("the same, by their draws", explained(), theirs)
    yield from noise_tunnel(attr, model, x, steps)


def noise_tunnel(attr: Any, model: nn.Module, x: Tensor, samples: int) -> Iterator[Row]:
    drawn: list[Tensor] = []

    def drawing(*args: Any) -> Tensor:
        drawn.append(_torch_normal(*args))
        return drawn[-1]

    def normal(seed: Any, index: Tensor, shape: Any, dtype: torch.dtype, stream: int = 0) -> Tensor:
        return drawn[-1][index]

    def smoothed(statistic: str) -> Tensor:
        given: dict[str, Any] = {"samples": samples, "noise": 1.0, "absolute": True, "statistic": statistic}
        return pullback.smooth_grad(params_of(model), model, x, T, **given)

    for statistic, kind in {"mean": "smoothgrad", "squared": "smoothgrad_sq", "variance": "vargrad"}.items():
        tunnel = attr.NoiseTunnel(attr.Saliency(model))
        with mock.patch("torch.normal", drawing), torch.random.fork_rng():
            theirs = tunnel.attribute(x, nt_type=kind, nt_samples=samples, target=T, abs=False)
        yield Row(f"smooth_grad, {statistic}", smoothed(statistic), theirs, remark="other random numbers")
        with mock.patch.object(importlib.import_module("pullback.noise"), "normal", normal):
            found = smoothed(statistic)
        if statistic == "variance":
            yield Row("the same, by their draws", found, theirs, remark="captum divides by n, not by n - 1")
            found = found * (samples - 1) / samples
        yield Row("the same, by their draws" + (" and by n" if statistic == "variance" else ""), found, theirs)


_torch_normal = torch.normal


def _in_float32(name: str, steps: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nodes and weights as captum rounds them: weights of any rule, nodes of those that are evenly spaced."""
    nodes, weights = quadrature_of(name, steps)
    if name == "trapezoid":
        weights = tuple(weight * (steps - 1) / steps for weight in weights)
    if name != "gauss_legendre":
        nodes = tuple(torch.linspace(nodes[0], nodes[-1], steps).tolist())
    return nodes, tuple(torch.tensor(weights, dtype=torch.float32).tolist())


def _by_differences(params: Any, model: nn.Module, x: Tensor, layer: str, steps: int) -> Tensor:
    """Sum gradients at one point more than `steps`, each times the way of the activation from the point before."""
    nodes = (1 + np.polynomial.legendre.leggauss(steps + 1)[0]) / 2
    at = [float(a) * x for a in nodes]
    places = [pullback.activation(params, model, point, layer=layer) for point in at]
    slopes = [pullback.gradient(params, model, point, T, layer=layer) for point in at]
    return sum(
        (g * (b - a) for g, a, b in zip(slopes[:-1], places, places[1:], strict=False)), torch.zeros_like(places[0])
    )


@contextlib.contextmanager
def _recorded(name: str) -> Iterator[list[Any]]:
    """Keep what a function of `numpy.random` gives while another library draws from it."""
    drawn: list[Any] = []
    function = getattr(np.random, name)

    def recording(*args: Any, **kwargs: Any) -> Any:
        drawn.append(function(*args, **kwargs))
        return drawn[-1]

    with mock.patch.object(np.random, name, recording):
        yield drawn


def _signed(activation: Tensor, gradient: Tensor) -> Tensor:
    return maps.weighted_sum(activation, gradient.flatten(2).mean(2))


def _scaled(map: Tensor, x: Tensor) -> Tensor:
    return maps.normalise(maps.resize(map.clamp(min=0), x.shape[2:]))[:, 0]


def pytorch_grad_cam(smoke: bool) -> Iterator[Row]:
    import_torchvision()  # with what it needs on any build of torch
    peer = importlib.import_module("pytorch_grad_cam")
    target = importlib.import_module("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget(T)
    model, x = network(torch.float32)
    params = params_of(model)
    at: dict[str, Any] = {"layer": "3"}
    for ours, theirs, remark in (
        ("grad_cam", "GradCAM", ""),
        ("hires_cam", "HiResCAM", ""),
        ("elementwise_grad_cam", "GradCAMElementWise", ""),
        ("layer_cam", "LayerCAM", ""),
        ("xgrad_cam", "XGradCAM", ""),
        ("grad_cam_plus_plus", "GradCAMPlusPlus", "they add 1e-6 to the denominator"),
        ("score_cam", "ScoreCAM", "they resize masks corner to corner"),
        ("ablation_cam", "AblationCAM", ""),
        ("eigen_cam", "EigenCAM", ""),
        ("eigen_grad_cam", "EigenGradCAM", ""),
    ):
        found = getattr(peer, theirs)(model=model, target_layers=[model[3]])(input_tensor=x, targets=[target])
        found = torch.from_numpy(found)
        map = getattr(pullback, ours)(params, model, x, T, **at)
        if not ours.startswith("eigen"):
            yield Row(ours, _scaled(map, x), found, 1e-5, remark)
            if ours == "grad_cam_plus_plus":
                map = pullback.saliency(params, model, x, T, **at, reduce=_with_epsilon)
                yield Row("the same, with 1e-6", _scaled(map, x), found)
            continue
        gaps = [float((_scaled(m, x) - found).abs().max()) for m in (map, -map)]
        yield Row(ours, _scaled(map, x), found, 1e-3, "" if gaps[0] < gaps[1] else "a component has no sign: theirs is")
        if gaps[0] >= gaps[1]:
            yield Row("the same, with the other sign", _scaled(-map, x), found, 1e-3)
    found = peer.ScoreCAM(model=model, target_layers=[model[3]])(input_tensor=x, targets=[target])
    with mock.patch.object(maps, "resize", _corner_to_corner):
        map = pullback.score_cam(params, model, x, T, **at)
    yield Row("score_cam, masks corner to corner", _scaled(map, x), torch.from_numpy(found), 1e-3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = Transformer().eval()

    def grid(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].mT.unflatten(2, (4, 4))

    for ours, theirs in (("grad_cam", "GradCAM"), ("hires_cam", "HiResCAM"), ("layer_cam", "LayerCAM")):
        found = getattr(peer, theirs)(model=vit, target_layers=[vit.norm], reshape_transform=grid)(x, [target])
        map = getattr(pullback, ours)(params_of(vit), vit, x, T, layer="norm")
        yield Row(f"{ours}, tokens", _scaled(map, x), torch.from_numpy(found))
    found = peer.FinerCAM(model, [model[3]])(input_tensor=x, target_idx=T)
    remark = "they weight the other classes by their probabilities"
    yield Row(
        "finer_cam", _scaled(pullback.finer_cam(params, model, x, T, **at), x), torch.from_numpy(found), 1e-5, remark
    )
    map = pullback.grad_cam(params, model, x, _by_probability, **at)
    yield Row("the same, by probability", _scaled(map, x), torch.from_numpy(found))
    full, info = pullback.full_grad(params, model, x, T, return_info=True)
    found = torch.from_numpy(peer.FullGrad(model, [])(input_tensor=x, targets=[target]))
    yield Row(
        "full_grad", maps.normalise(full)[:, 0], found, remark="they scale channel by channel, not share by share"
    )
    shares = [info["input"], *(b for b in info["biases"] if b.ndim == x.ndim)]
    channels = torch.cat([_each_channel(share.abs(), x) for share in shares], 1)
    yield Row("the same, channel by channel", maps.normalise(channels.sum(1)), found, 1e-3)


def _by_probability(y: Tensor) -> Tensor:
    """The target less the mean of the three nearest classes, weighted by their probabilities."""
    near = (y - y[:, [T]]).abs().detach().argsort(1)[:, 1:4]
    shares = y.softmax(1).gather(1, near)
    return y[:, T] - (shares * y.gather(1, near)).sum(1) / shares.sum(1)


def _with_epsilon(activation: Tensor, g: Tensor) -> Tensor:
    """Grad-CAM++ with 1e-6 in the denominator of alpha."""
    below = 2 * g**2 + activation.sum((2, 3), keepdim=True) * g**3 + 1e-6
    return maps.weighted_sum(activation, (torch.where(g == 0, g, g**2 / below) * g.clamp(min=0)).sum((2, 3)))


def _corner_to_corner(map: Tensor, size: Any, mode: str = "bilinear") -> Tensor:
    return torch.nn.functional.interpolate(map, tuple(size), mode=mode, align_corners=True)


def _each_channel(share: Tensor, x: Tensor) -> Tensor:
    """Scale each channel to [0, 1], then to the size of `x`."""
    flat = maps.normalise(share.flatten(0, 1).unsqueeze(1))
    return maps.resize(flat, x.shape[2:]).unflatten(0, share.shape[:2]).squeeze(2)


def torchcam(smoke: bool) -> Iterator[Row]:
    peer = importlib.import_module("torchcam.methods")
    model, x = network(torch.float32)
    params = params_of(model)
    at: dict[str, Any] = {"layer": "3"}
    before = "they scale to [0, 1] before resizing"
    for ours, theirs, options, remark in (
        ("grad_cam", "GradCAM", {}, ""),
        ("layer_cam", "LayerCAM", {}, ""),
        ("xgrad_cam", "XGradCAM", {}, ""),
        ("grad_cam_plus_plus", "GradCAMpp", {}, "their division by the denominator, in place on a copy, is lost"),
        ("score_cam", "ScoreCAM", {}, before),
        ("is_cam", "ISCAM", {"samples": 3}, before),
    ):
        settings = {"num_samples": options["samples"]} if options else {}
        with getattr(peer, theirs)(model, "3", input_shape=(3, 16, 16), **settings) as extractor:
            found = extractor(T, model(x))[0].detach()

        def explained(ours: str = ours, options: dict[str, Any] = options) -> Tensor:
            return maps.normalise(getattr(pullback, ours)(params, model, x, T, **at, **options))[:, 0]

        yield Row(ours, explained(), found, 1e-3, remark)
        if remark == before:
            with mock.patch.object(importlib.import_module("pullback.cam.by_score"), "_channel_masks", _each_channel):
                yield Row("the same, scaled before", explained(), found, 1e-3)
        elif remark:
            map = pullback.saliency(params, model, x, T, **at, reduce=_undivided).clamp(min=0)
            yield Row("the same, undivided", maps.normalise(map)[:, 0], found, 1e-3)

    yield from torchcam_joined(peer, model, x)


def torchcam_joined(peer: Any, model: nn.Sequential, x: Tensor) -> Iterator[Row]:
    """Several layers, several noisy inputs, and a network that ends in pooling."""
    params = params_of(model)
    with peer.LayerCAM(model, ["0", "3"], input_shape=(3, 16, 16)) as extractor:
        found = extractor.fuse_cams(extractor(T, model(x))).detach()
    map = pullback.fused_cam(params, model, x, T, layers=["0", "3"])[:, 0]
    yield Row("fused_cam", map, found, remark="they take off the least value too, and scale before resizing")
    parts = [maps.normalise(pullback.layer_cam(params, model, x, T, layer=name)) for name in ("0", "3")]
    parts = [maps.resize(torch.tanh(2 * part), found.shape[1:]) for part in parts]
    yield Row("the same, scaled before", torch.maximum(*parts)[:, 0], found)
    with peer.SmoothGradCAMpp(model, "3", num_samples=4, std=0.3, input_shape=(3, 16, 16)) as extractor:
        drawn, sample = [], extractor._distrib.sample
        extractor._distrib.sample = lambda shape: drawn.append(sample(shape)) or drawn[-1]
        with torch.random.fork_rng():
            found = extractor(T, model(x))[0].detach()
    settings: dict[str, Any] = {"layer": "3", "samples": 4, "noise": 0.3, "absolute": True}
    map = pullback.smooth_grad_cam_plus_plus(params, model, x, T, **settings)
    remark = "they multiply the third derivative before the sum, and take the last sample where the mean is due"
    yield Row("smooth_grad_cam_plus_plus", maps.normalise(map)[:, 0], found, remark=remark)
    slopes = torch.stack([pullback.gradient(params, model, x + draw, T, layer="3") for draw in drawn])
    activation, last = (pullback.activation(params, model, place, layer="3") for place in (x, x + drawn[-1]))
    below = 2 * (slopes**2).mean(0) + ((slopes**3).mean(0) * activation).sum((2, 3), keepdim=True) + 1e-8
    weights = ((slopes**2).mean(0) / below * slopes[-1].clamp(min=0)).sum((2, 3))
    map = maps.weighted_sum(last, weights).clamp(min=0)
    yield Row("the same, by such sums and their draws", maps.normalise(map)[:, 0], found)
    pooled = nn.Sequential(*list(model)[:5], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    with peer.CAM(pooled, "4", fc_layer="7", input_shape=(3, 16, 16)) as extractor:
        found = extractor(T, pooled(x))[0].detach()
    map = pullback.cam(params_of(pooled), pooled, x, T, layer="4", head="7")
    yield Row("cam", maps.normalise(map)[:, 0], found)


def _undivided(activation: Tensor, g: Tensor) -> Tensor:
    """Grad-CAM++ with the numerator of alpha alone."""
    return maps.weighted_sum(activation, (g**2 * g.clamp(min=0)).sum((2, 3)))


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
    ours = pullback.integrated_gradients(params, model, x, T, steps=steps, quadrature="trapezoid")
    yield Row("integrated_gradients", ours, found, remark="they count both ends of the path in full")
    slopes = [pullback.gradient(params, model, k / (steps - 1) * x, T) for k in range(steps)]
    yield Row("the same, ends in full", x * torch.stack(slopes).mean(0), found)
    for squared in (False, True):
        with _recorded("normal") as noise:
            found = core.GradientSaliency().GetSmoothedMask(image, call, nsamples=steps, magnitude=squared)
        drawn = torch.stack([theirs(draw)[0] for draw in noise]) / (0.15 * float(x.max() - x.min()))

        def normal(
            seed: Any, index: Tensor, shape: Any, dtype: torch.dtype, stream: int = 0, drawn: Tensor = drawn
        ) -> Tensor:
            return drawn[index]

        def smoothed(squared: bool = squared) -> Tensor:
            return pullback.smooth_grad(params, model, x, T, samples=steps, statistic="squared" if squared else "mean")

        name = f"smooth_grad{', squared: their default' if squared else ''}"
        yield Row(name, smoothed(), theirs(found), remark="other random numbers")
        with mock.patch.object(importlib.import_module("pullback.noise"), "normal", normal):
            yield Row("the same, by their draws", smoothed(), theirs(found))
    for fraction, distance in ((0.25, 0.1), (0.1, 1.0)):
        with mock.patch("numpy.quantile", _quantile):
            found = core.GuidedIG().GetMask(
                image, call, x_steps=steps, x_baseline=0 * image, fraction=fraction, max_dist=distance
            )
        ours = pullback.guided_integrated_gradients(
            params, model, x, T, steps=steps, fraction=fraction, max_distance=distance
        )
        yield Row(f"guided_integrated_gradients, {fraction}, {distance}", ours, theirs(found))
    found = theirs(core.BlurIG().GetMask(image, call, max_sigma=4, steps=steps, grad_step=0.001))
    ours = pullback.blur_integrated_gradients(
        params, model, x, T, sigma=4 / 16, steps=steps, quadrature="riemann_right", padding="zeros"
    )
    yield Row("blur_integrated_gradients", ours, found, remark="they take differences, and cut each blur at 4 sigma")
    total = torch.zeros_like(x)
    for sigma in (4 * k / steps for k in range(steps)):
        here, further = _blurred(x, sigma), _blurred(x, sigma + 0.001)
        total = total - 4 / steps * (further - here) / 0.001 * pullback.gradient(params, model, here, T)
    yield Row("the same, by such differences", total, found)
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


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """As scipy blurs: by weights up to 4 sigma, rounded."""
    reach = int(4 * sigma + 0.5)
    return maps.blurred(x, torch.tensor(sigma, dtype=x.dtype), reach, "zeros") if sigma else x


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
