"""What the TorchRay dialect costs above the pure functions that it calls: each call beside its pure counterpart.

python benchmarks/torchray_dialect.py --network resnet18
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _measure import agree, arguments, finish, milliseconds, network, ratio, seconds, table, with_spread
from torch import Tensor

import pullback
from pullback.compat.torchray.attribution.common import Probe, ReLUContext, gradient_to_saliency, saliency
from pullback.compat.torchray.attribution.grad_cam import grad_cam
from pullback.compat.torchray.attribution.guided_backprop import (
    GuidedBackpropContext,
    GuidedBackpropReLU,
    guided_backprop,
)

LAYERS = {"tiny": "3", "resnet18": "layer4", "resnet50": "layer4", "vgg16": "features.29"}


def cases(model: torch.nn.Module, x: Tensor, layer: str) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Give pairs: the dialect's call, the pure one."""
    params = pullback.params_of(model)

    def pure(**options: Any) -> Callable[[], Tensor]:
        return lambda: pullback.saliency(params, model, x, 3, **options)

    def manual() -> Tensor:
        leaf = x.clone()
        probe = Probe(model, target="input")
        with GuidedBackpropContext():
            model(leaf)[:, 3].sum().backward()
        return gradient_to_saliency(probe.data[0])

    return {
        "saliency": (lambda: saliency(model, x, 3), pure()),
        "saliency at a layer": (lambda: saliency(model, x, 3, layer), pure(layer=layer)),
        "guided_backprop": (lambda: guided_backprop(model, x, 3), pure(rules="guided_torchray")),
        "guided_backprop, manual style": (manual, pure(rules="guided_torchray")),
        "ReLUContext of a user's function": (
            lambda: saliency(model, x, 3, context_builder=lambda: ReLUContext(GuidedBackpropReLU)),
            pure(rules="guided_torchray"),
        ),
        "grad_cam": (
            lambda: grad_cam(model, x, 3, saliency_layer=layer),
            lambda: pullback.grad_cam(params, model, x, 3, layer=layer),
        ),
    }


def main() -> None:
    options = arguments(__doc__ or "", network="resnet18")
    if options.smoke:
        options.network = "tiny"
    model, size = network(options.network, options.device)
    x = torch.randn(1, 3, size, size, device=options.device)
    pairs = cases(model, x, LAYERS[options.network])
    rows, results = [], {}
    for name, (dialect, pure) in pairs.items():
        agree(dialect(), pure())
        taken = seconds({"dialect": dialect, "pure": pure}, options.rounds, options.device)
        of_pure = ratio(taken["dialect"], taken["pure"])
        rows.append((name, milliseconds(taken["dialect"]), milliseconds(taken["pure"]), with_spread(of_pure)))
        results[name] = {**taken, "of the pure function": of_pure}
    header = ("call", "dialect, ms", "pure function, ms", "of the pure function")
    finish(options, "torchray_dialect", f"{options.network}, {size} px, batch 1\n\n{table(header, rows)}", results)


if __name__ == "__main__":
    main()
