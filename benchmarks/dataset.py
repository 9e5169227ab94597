"""A run over a dataset: its throughput against the bare loop over batches, and what an image costs by each method.

The bare loop has its batches in memory and drops its results; the run reads examples one by one, and writes a store. On
a CPU the run keeps memory from batch to batch: the loop is measured as it is, and with `keep_memory` around it.

    python benchmarks/dataset.py --part throughput
    python benchmarks/dataset.py --part cost --batch 2
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _measure import arguments, finish, network, quartiles, ratio, seconds, table, with_spread
from torch import Tensor

import pullback
from pullback.dataset import explain_dataset

LAYERS = {"tiny": "2", "lite0": "_conv_head", "resnet50": "layer4"}


def methods(network: str) -> dict[str, Callable[..., Tensor]]:
    return {
        "gradient": pullback.gradient,
        "guided_backprop": pullback.guided_backprop,
        "grad_cam": partial(pullback.grad_cam, layer=LAYERS[network]),
        "integrated_gradients": partial(pullback.integrated_gradients, steps=20, chunk_size=4),
        "smooth_grad": partial(pullback.smooth_grad, samples=10, chunk_size=4),
    }


def bare(method: Callable[..., Tensor], model: Any, batches: list[Tensor], labels: Tensor, targets: str) -> None:
    params = pullback.params_of(model)
    for x in batches:
        if targets == "label":
            method(params, model, x, labels[: len(x)]).cpu()
        else:
            with torch.no_grad():
                best = model(x).topk(int(targets[3:]), dim=1)
            pullback.over_targets(method)(params, model, x, best.indices.T.contiguous()).cpu()


def whole_run(
    method: Callable[..., Tensor], model: Any, data: list[Any], targets: str, batch: int, device: str, folder: str
) -> None:
    explain_dataset(
        method,
        pullback.params_of(model),
        model,
        data,
        targets=targets,
        out=Path(tempfile.mkdtemp(dir=folder)) / "maps.zarr",
        batch_size=batch,
        scores=targets != "label",  # the bare loop has no scores unless it must
        dtype="float16",
        device=device,
    )


def throughput(options: Any, model: Any, images: Tensor, labels: Tensor, folder: str) -> tuple[str, dict[str, Any]]:
    batches = [x.to(options.device) for x in images.split(options.batch)]
    data = list(zip(images, labels.tolist(), strict=True))
    own = methods(options.network)
    runs: dict[str, Callable[[], None]] = {}
    for name, targets in (("gradient", "label"), ("gradient", "top5"), ("grad_cam", "top5")):
        wanted = labels.to(options.device)
        loop = partial(bare, own[name], model, batches, wanted, targets)
        runs[f"{name}, {targets}, loop"] = loop
        runs[f"{name}, {targets}, kept"] = pullback.keep_memory()(loop)
        runs[f"{name}, {targets}, run"] = partial(
            whole_run, own[name], model, data, targets, options.batch, options.device, folder
        )
    times = seconds(runs, options.rounds, options.device, keep=False)
    rows, results = [], {}
    for name in list(runs)[::3]:
        case = name.removesuffix(", loop")
        loop, kept, run = (times[f"{case}, {how}"] for how in ("loop", "kept", "run"))
        rate = [len(images) / quartiles(t)[1] for t in (loop, kept, run)]
        rows.append((case, *(f"{r:.2f}" for r in rate), *(with_spread(ratio(t, run)) for t in (loop, kept))))
        results[case] = {"loop": loop, "loop, kept": kept, "run": run, "throughput of the run": ratio(loop, run)}
    about = f"{options.network}, {len(images)} images, batch {options.batch}, full attributions in float16"
    columns = ("case", "loop, images/s", "loop, memory kept", "run", "run of loop", "of loop, memory kept")
    return f"{about}\n\n{table(columns, rows)}", results


def cost(options: Any, model: Any, images: Tensor) -> tuple[str, dict[str, Any]]:
    """Seconds an image for each method, for five targets."""
    x = images[: options.batch].to(options.device)
    params, targets = pullback.params_of(model), torch.arange(5, device=options.device)

    def forward() -> Any:
        with torch.no_grad():
            return model(x)

    cases: dict[str, Callable[[], Any]] = {"forward": forward}
    for name, method in methods(options.network).items():
        cases[name] = partial(pullback.over_targets(method), params, model, x, targets)
    times = seconds(cases, options.rounds, options.device)
    each = {name: [t / len(x) for t in taken] for name, taken in times.items()}
    rows = [
        (name, f"{quartiles(taken)[1]:.3f}", with_spread(ratio(taken, each["forward"]))) for name, taken in each.items()
    ]
    about = f"{options.network}, batch {options.batch}, 5 targets together"
    return f"{about}\n\n{table(('method', 'seconds an image', 'of a forward'), rows)}", each


def main() -> None:
    options = arguments(__doc__ or "", network="lite0", part="both", batch=8, images=32)
    if options.smoke:
        options.network, options.batch, options.images = "tiny", 2, 4
    model, size = network(options.network, options.device)
    images = torch.randn(options.images, 3, size, size)
    labels = torch.arange(options.images) % 10
    texts, results = [], {}
    if options.part in ("both", "throughput"):
        with tempfile.TemporaryDirectory() as folder:  # removed when all is measured
            text, results["throughput"] = throughput(options, model, images, labels, folder)
        texts.append(text)
    if options.part in ("both", "cost"):
        text, results["cost"] = cost(options, model, images)
        texts.append(text)
    finish(options, "dataset", "\n\n".join(texts), results)


if __name__ == "__main__":
    main()
