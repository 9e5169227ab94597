"""Perturbation methods against the loops that other libraries run: TorchRay's, one image and one target at a time, and
captum's, one perturbation at a time or as many together as ours.

The same masks and the same iterations on either side, and values that agree, or the script stops.

    pip install --no-deps --no-build-isolation torchray  # its build imports torch
    python benchmarks/perturbations.py --network lite0 --threads 2 --family occlusion --memory 0  # a part of it
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _measure import (
    agree,
    arguments,
    finish,
    megabytes,
    milliseconds,
    network,
    peak_in_process,
    peak_of,
    ratio,
    seconds,
    table,
    with_spread,
)
from torch import Tensor

from pullback import extremal_perturbation, feature_ablation, occlusion, over_targets, params_of, rise
from pullback.masks import cells

AREAS = [0.025, 0.05, 0.1, 0.2]
Run = Callable[[], Any]


def found(module: str) -> Any:
    """Import a peer, or go without."""
    from pullback._networks.models import import_torchvision

    try:
        import_torchvision()  # TorchRay asks for it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except Exception:
        return None


def extremal_cases(model: torch.nn.Module, x: Tensor, options: Any) -> dict[str, Run]:
    params, targets = params_of(model), torch.arange(2, device=x.device)
    how = {"step": 2, "sigma": 4.0} if options.smoke else {}
    peer = found("torchray.attribution.extremal_perturbation")

    def ours() -> Tensor:
        many = over_targets(extremal_perturbation)
        return many(params, model, x, targets, areas=AREAS, iterations=options.iterations, **how)

    def ours_as_rows() -> Tensor:
        """Image and target in the place of one example each, which spares the network a batched backward."""
        images, classes = x.repeat(len(targets), 1, 1, 1), targets.repeat_interleave(len(x))
        masks = extremal_perturbation(params, model, images, classes, areas=AREAS, iterations=options.iterations, **how)
        return masks.unflatten(1, (len(targets), len(x))).movedim(1, 0)

    def torchray() -> Tensor:
        rows = [
            peer.extremal_perturbation(model, one[None], int(t), areas=AREAS, max_iter=options.iterations, **how)[0]
            for t in targets
            for one in x
        ]
        return torch.stack(rows).unflatten(0, (len(targets), len(x))).movedim(1, 2)

    cases = {"pullback": ours_as_rows, "pullback, over_targets": ours}
    return {**cases, **({"TorchRay": torchray} if peer else {})}


def rise_cases(model: torch.nn.Module, x: Tensor, options: Any) -> dict[str, Run]:
    """All classes of one image from the same masks; TorchRay draws its own, as many."""
    params, count = params_of(model), options.samples
    with torch.no_grad():
        classes = torch.arange(model(x[:1]).shape[1], device=x.device)
    peer = found("torchray.attribution.rise")

    def ours() -> Tensor:
        many = over_targets(rise)
        return many(params, model, x[:1], classes, samples=count, link="sigmoid", normalise=False)[:, 0]

    def torchray() -> Tensor:
        return peer.rise(model, x[:1], num_masks=count)[0].unsqueeze(1)

    return {"pullback": ours, **({"TorchRay": torchray} if peer else {})}


def occlusion_cases(model: torch.nn.Module, x: Tensor, options: Any) -> dict[str, Run]:
    params, side = params_of(model), x.shape[-1]
    window, stride = side // 4, side // 8
    peer = found("captum.attr")

    def ours() -> Tensor:
        return occlusion(params, model, x[:1], 0, window=window, stride=stride)

    def captum(together: int) -> Tensor:
        shape, strides = (x.shape[1], window, window), (1, stride, stride)
        method = peer.Occlusion(model)
        return method.attribute(x[:1], shape, strides=strides, target=0, perturbations_per_eval=together)[:, :1]

    peers = {"captum": lambda: captum(1), "captum, 16 together": lambda: captum(16)} if peer else {}
    return {"pullback": ours, **peers}


def ablation_cases(model: torch.nn.Module, x: Tensor, options: Any) -> dict[str, Run]:
    params = params_of(model)
    features = cells(x.shape[2:], (8, 8)).to(x.device)
    peer = found("captum.attr")

    def ours() -> Tensor:
        return feature_ablation(params, model, x[:1], 0, feature_mask=features)

    def captum(together: int) -> Tensor:
        method, ids = peer.FeatureAblation(model), features[None]
        return method.attribute(x[:1], target=0, feature_mask=ids, perturbations_per_eval=together)

    peers = {"captum": lambda: captum(1), "captum, 16 together": lambda: captum(16)} if peer else {}
    return {"pullback": ours, **peers}


FAMILIES = {
    "extremal perturbation, 4 images, 2 targets, 4 areas": (extremal_cases, 5e-2),
    "RISE, all classes": (rise_cases, math.inf),  # other random masks
    "occlusion": (occlusion_cases, 1e-3),
    "feature ablation": (ablation_cases, 1e-3),
}


def main() -> None:
    options = arguments(__doc__ or "", network="lite0", iterations=10, samples=256, family="", memory=1)
    if options.smoke:
        options.network, options.iterations, options.samples = "tiny", 2, 8
    model, side = network(options.network, options.device)
    torch.manual_seed(1)
    x = torch.rand(4, 3, side, side, device=options.device)
    if options.case:
        family, _, name = options.case.partition("/")
        run = FAMILIES[family][0](model, x, options)[name]
        run()
        print(peak_of(run, options.device))
        return
    rows, results = [], {}
    for family, (make, tolerance) in FAMILIES.items():
        if options.family not in family:
            continue
        cases = make(model, x, options)
        values = {name: run() for name, run in cases.items()}
        for name, value in values.items():
            if math.isfinite(tolerance):
                agree(values["pullback"], value, tolerance)
            assert value.shape == values["pullback"].shape, name
        taken = seconds(cases, options.rounds, options.device)
        for name, times in taken.items():
            speed = ratio(times, taken["pullback"])
            peak = 0 if options.smoke or not options.memory else peak_in_process(f"{family}/{name}")
            rows.append([family, name, milliseconds(times), with_spread(speed), megabytes(peak)])
            results[f"{family}/{name}"] = {"seconds": times, "ratio": speed, "peak": peak}
    text = table(["method", "library", "ms", "times ours (quartiles)", "peak MB"], rows)
    finish(options, "perturbations", text, results)


if __name__ == "__main__":
    main()
