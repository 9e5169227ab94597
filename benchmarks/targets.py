"""Many targets of one image: `over_targets` and `vmap` against the loops that other libraries run.

F is a forward, B a backward of the same network on the same image in plain autograd, weights frozen. K targets cannot
cost less than F + K B where every operation is as efficient on one cotangent as on K.

    python benchmarks/targets.py --network resnet18 --targets 32
"""

from __future__ import annotations

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
    quartiles,
    ratio,
    seconds,
    table,
    with_spread,
)
from torch import Tensor

from pullback import grad_cam, gradient, over_targets, params_of


def cases(model: torch.nn.Module, x: Tensor, count: int, layer: str) -> dict[str, Callable[[], Any]]:
    params, targets = params_of(model), torch.arange(count, device=x.device)

    def forward() -> Tensor:
        with torch.no_grad():
            return model(x)

    def plain() -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)[0]

    def fresh_loop() -> Tensor:
        found = []
        for k in range(count):
            leaf = x.clone().requires_grad_()
            found.append(torch.autograd.grad(model(leaf)[:, k].sum(), leaf)[0])
        return torch.stack(found)

    def retained_loop() -> Tensor:
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        return torch.stack([torch.autograd.grad(y[:, k].sum(), leaf, retain_graph=True)[0] for k in range(count)])

    def replicated() -> Tensor:
        leaf = x.repeat(count, 1, 1, 1).requires_grad_()
        return torch.autograd.grad(model(leaf).gather(1, targets[:, None]).sum(), leaf)[0].unsqueeze(1)

    def chunked(size: Any) -> Callable[[], Tensor]:
        return lambda: over_targets(gradient, chunk_size=size)(params, model, x, targets)

    return {
        "forward": forward,
        "one target, autograd": plain,
        "one target, gradient": lambda: gradient(params, model, x, 0),
        "one target, grad_cam": lambda: grad_cam(params, model, x, 0, layer=layer),
        "loop, fresh forwards": fresh_loop,
        "loop, retained graph": retained_loop,
        "replicated batch": replicated,
        "vmap": lambda: torch.vmap(gradient, (None, None, None, 0))(params, model, x, targets),
        "over_targets": chunked("auto"),
        "over_targets, chunks of 1": chunked(1),
        "over_targets, chunks of 8": chunked(8),
        "grad_cam, all classes": lambda: over_targets(grad_cam, chunk_size=None)(
            params, model, x, torch.arange(model(x).shape[1], device=x.device), layer=layer
        ),
    }


SAME = ("loop, fresh forwards", "loop, retained graph", "replicated batch", "vmap")
LAYERS = {"tiny": "3", "resnet18": "layer4", "resnet50": "layer4", "vgg16": "features", "lite0": "head"}


def main() -> None:
    options = arguments(__doc__ or "", network="resnet18", targets=32)
    if options.smoke:
        options.network, options.targets = "tiny", 4
    model, size = network(options.network, options.device)
    x = torch.randn(1, 3, size, size, device=options.device)
    layer = LAYERS.get(options.network) or [name for name, _ in model.named_children()][-2]
    runs = cases(model, x, options.targets, layer)
    if options.case:
        warm, side = network("tiny", options.device)  # what torch and einops load on their first call is not counted
        cases(warm, torch.randn(1, 3, side, side, device=options.device), 2, "3")[options.case]()
        print(peak_of(runs[options.case], options.device))
        return
    expected = runs["loop, fresh forwards"]()
    for name in (*SAME, "over_targets", "over_targets, chunks of 1", "over_targets, chunks of 8"):
        agree(runs[name](), expected)

    times = seconds(runs, options.rounds, options.device)
    pairs = list(zip(times["forward"], times["one target, autograd"], strict=True))
    bound = [f + options.targets * (g - f) for f, g in pairs]
    rows, results = [], {}
    for name, taken in times.items():
        peak = 0 if options.smoke and name != "over_targets" else peak_in_process(name)
        of_bound = ratio(taken, bound)
        of_one = ratio(taken, times["one target, autograd"])
        rows.append((name, milliseconds(taken), with_spread(of_one), with_spread(of_bound), megabytes(peak)))
        results[name] = {"seconds": taken, "of one gradient": of_one, "of F + K B": of_bound, "peak bytes": peak}
    header = ("case", "ms", "of one gradient", f"of F + {options.targets} B", "peak MB")
    forward, one = (quartiles(times[name])[1] for name in ("forward", "one target, autograd"))
    about = f"{options.network}, {size} px, batch 1, K = {options.targets}: "
    about += f"F = {forward * 1e3:.1f} ms, F + B = {one * 1e3:.1f} ms"
    finish(options, "targets", f"{about}\n\n{table(header, rows)}", results)


if __name__ == "__main__":
    main()
