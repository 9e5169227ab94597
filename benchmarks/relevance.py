"""Relevance: what a composite costs in gradients, beside zennit on the same network where it is installed.

A gradient is one forward and one backward of the same network and image in plain autograd, weights frozen. zennit has
its canonizers, which merge batch norm anew at each call, as its documentation has it.

    python benchmarks/relevance.py --network resnet50
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from _measure import agree, arguments, finish, milliseconds, network, ratio, seconds, table, with_spread
from torch import Tensor

from pullback import deep_lift, excitation_backprop, lrp, params_of
from pullback._networks.models import import_torchvision

COMPOSITES = {"epsilon_plus": "EpsilonPlus", "epsilon_alpha2_beta1": "EpsilonAlpha2Beta1"}


def zennit_cases(model: torch.nn.Module, x: Tensor, name: str) -> dict[str, Callable[[], Any]]:
    try:
        import_torchvision()  # zennit asks for it
        from zennit import attribution, composites  # pyright: ignore[reportMissingImports]
        from zennit import torchvision as canonizers  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    kinds = {"resnet": "ResNetCanonizer", "vgg": "VGGCanonizer"}
    kind = next((k for start, k in kinds.items() if name.startswith(start)), None)
    used = [getattr(canonizers, kind)()] if kind else []
    classes = int(model(x).shape[1])

    def runner(composite: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            made = getattr(composites, composite)(canonizers=used)
            with warnings.catch_warnings(), attribution.Gradient(model=model, composite=made) as attributor:
                warnings.simplefilter("ignore")
                seed = torch.eye(classes, device=x.device)[[0]]
                found: Any = attributor(x.clone().requires_grad_(), lambda y: y * seed)
                return found[1]

        return run

    return {f"zennit, {composite}": runner(composite) for composite in COMPOSITES.values()}


def main() -> None:
    options = arguments(__doc__ or "", network="resnet50")
    if options.smoke:
        options.network = "tiny"
    model, size = network(options.network, options.device)
    x = torch.randn(1, 3, size, size, device=options.device)
    params = params_of(model)

    def plain() -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)[0]

    cases: dict[str, Callable[[], Any]] = {"gradient, autograd": plain}
    for rules in ("epsilon", *COMPOSITES, "epsilon_plus_flat"):
        cases[f"lrp, {rules}"] = lambda rules=rules: lrp(params, model, x, 0, rules=rules)
    cases["excitation_backprop"] = lambda: excitation_backprop(params, model, x, 0)
    cases["deep_lift"] = lambda: deep_lift(params, model, x, 0)
    others = zennit_cases(model, x, options.network)
    for rules, composite in COMPOSITES.items():
        if f"zennit, {composite}" in others:  # batch norm's epsilon is counted twice there
            agree(cases[f"lrp, {rules}"](), others[f"zennit, {composite}"](), 0.05)
    cases |= others

    times = seconds(cases, options.rounds, options.device)
    one = times["gradient, autograd"]
    rows = [(name, milliseconds(taken), with_spread(ratio(taken, one))) for name, taken in times.items()]
    results = {name: {"seconds": taken, "of one gradient": ratio(taken, one)} for name, taken in times.items()}
    text = f"{options.network}, {size} px, batch 1\n\n{table(('case', 'ms', 'of one gradient'), rows)}"
    finish(options, "relevance", text, results)


if __name__ == "__main__":
    main()
