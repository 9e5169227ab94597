"""Many targets of one image: `over_targets` beside the loops and repeated batches that other libraries run.

F is a forward and B a backward of the same network on the same image in plain autograd, weights frozen, B in the batch
in which it is cheapest: both are measured in the same rounds. K targets cannot cost less than the *bound*: F + K B, the
fewer of K and the width of a linear head in the place of K where the pull is linear; as often as there are steps for
integrated gradients; F for Grad-CAM at the last layer. Loops take as long a target whatever their number, so they are
measured over a few, and the time is that times K.

    python benchmarks/targets.py --networks resnet50 --methods gradient --targets 8,64
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from _measure import (
    agree,
    arguments,
    example,
    finish,
    milliseconds,
    network,
    once,
    quartiles,
    ratio,
    seconds,
    table,
    with_spread,
)
from _peers import STEPS, absent, gaps, options_of, peers, suits
from torch import Tensor

import pullback
from pullback import over_targets

Run = Callable[[], Any]


def backward_in(model: torch.nn.Module, x: Tensor, batch: int) -> Run:
    leaf = x.repeat(batch, *[1] * (x.ndim - 1)).requires_grad_()
    scores = model(leaf)[:, 0].sum()
    return lambda: torch.autograd.grad(scores, leaf, retain_graph=True)


def cheapest_batch(model: torch.nn.Module, x: Tensor, device: str) -> int:
    """Give the batch in which a backward costs least an example."""

    def cost(batch: int) -> float:
        run = backward_in(model, x, batch)
        return min(once(run, device) for _ in range(2)) / batch

    return min((1, 2, 4, 8), key=cost)


@cache
def setting(name: str, device: str) -> tuple[torch.nn.Module, Tensor, int]:
    """Give a network, an input, and the cheapest batch of a backward, the same for all methods."""
    model, size = network(name, device)
    x = example(model, size, device)
    return model, x, cheapest_batch(model, x, device)


def measure(name: str, method: str, options: Any) -> tuple[list[list[str]], dict[str, Any], list[list[str]]]:
    device = options.device
    model, x, batch = setting(name, device)
    params, how, ours = pullback.params_of(model), options_of(method, name), getattr(pullback, method)
    few = options.batch if method != "integrated_gradients" else 2
    with torch.no_grad():
        classes = model(x).shape[1]

    def many(count: int) -> Tensor:
        return over_targets(ours)(params, model, x, torch.arange(count, device=device), **how)

    def forward() -> Tensor:
        with torch.no_grad():
            return model(x)

    def retained_loop() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        return [torch.autograd.grad(y[:, k].sum(), leaf, retain_graph=True)[0] for k in range(few)]

    # what each gives is compared, which warms it up
    others, notes = peers(method, model, x, name), {}
    mine = many(2)
    agree(mine, torch.stack([ours(params, model, x, k, **how) for k in range(2)]), 2e-3)
    for library, gap in gaps(others, mine, [0, 1]):
        if not (gap <= 2e-3 or others[library].remark):
            raise AssertionError(f"{name}, {method}: {library}'s values differ by {gap:.1e} of the largest")
        notes[library] = f"{gap:.0e}" + (f": {others[library].remark}" if others[library].remark else "")

    base: dict[str, Run] = {"forward": forward, "backward": backward_in(model, x, batch)}
    f, b = (min(once(run, device) for _ in range(2)) for run in base.values())
    width = {"gradient": head_width(model)}.get(method, classes)
    work = {"grad_cam": (1, 0), "integrated_gradients": (STEPS, STEPS)}.get(method, (1, 1))  # in F and in B
    counts = sorted({classes if count == "all" else min(int(count), classes) for count in options.targets.split(",")})
    counts = [k for k in counts if work[0] * f + work[1] * min(k, width) * b / batch < options.longest]

    runs = dict(base)
    for k in counts:
        runs[f"pullback {k}"] = lambda k=k: many(k)
    per_target: dict[str, tuple[Run, int]] = {}
    for library, peer in others.items():
        per_target[f"{library}, loop"] = (lambda peer=peer: peer.one(0)), 1
        if peer.many is not None and peer.shared == "batch":
            chosen = torch.arange(few, device=device)
            per_target[f"{library}, batches of {few}"] = (lambda f=peer.many, t=chosen: f(t)), few
        elif peer.many is not None:
            for k in counts:
                chosen = torch.arange(k, device=device)
                runs[f"{library}, one forward {k}"] = lambda f=peer.many, t=chosen: f(t)
    if method == "gradient":
        per_target["autograd, graph kept"] = retained_loop, few
    runs |= {case: run for case, (run, _) in per_target.items()}
    least = 0.0 if options.smoke else 0.01
    taken = seconds(runs, options.rounds, device, limit=options.limit, least=least, warm=True)

    rows, results, headlines = [], {}, []
    for k in counts:
        bound = [
            work[0] * f + work[1] * min(k, width) * b / batch
            for f, b in zip(taken["forward"], taken["backward"], strict=True)
        ]
        mine = taken[f"pullback {k}"]
        times = {"bound": bound, "pullback": mine}
        times |= {case.rsplit(" ", 1)[0]: t for case, t in taken.items() if case.endswith(f"one forward {k}")}
        fit = {case: n for case, (_, n) in per_target.items() if "batches" not in case or n <= k}
        times |= {case: [t * k / n for t in taken[case]] for case, n in fit.items()}
        for case, t in times.items():
            key = f"{name}/{method}/{k}/{case}"
            results[key] = {"seconds": t, "of the bound": ratio(t, bound), "of pullback": ratio(t, mine)}
        loop = fastest(times, [case for case in times if case.endswith(", loop")])
        together = fastest(times, [case for case in times if case.endswith("one forward") or "batches" in case])
        kept = [case for case in times if case.endswith("graph kept")]
        row = [name, method, str(k), milliseconds(bound), milliseconds(mine), with_spread(ratio(mine, bound))]
        for case in (loop, together, *kept):
            row.append(f"{case} {with_spread(ratio(times[case], mine))}" if case else "")
        rows.append([*row, *[""] * (9 - len(row)), "; ".join(f"{who} {note}" for who, note in notes.items())])
        for case in (loop, together):
            if case and (name, k) in HEADLINES.get(method, ()):
                row = [f"{name}: `{method}`, {k} targets", f"{milliseconds(mine)} ms"]
                beside = f"{case}, {milliseconds(times[case])} ms"
                headlines.append([*row, beside, with_spread(ratio(times[case], mine))])
    results[f"{name}/{method}"] = {"batch of B": batch, "forward": taken["forward"], "backward": taken["backward"]}
    return rows, results, headlines


HEADLINES = {
    "gradient": [("mlp", 10), ("resnet50", 64), ("vit_b_16", 64), ("lite0", 64), ("resnet18", 1000)],
    "guided_backprop": [("resnet50", 64), ("vgg16", 64)],
    "integrated_gradients": [("resnet50", 8)],
    "grad_cam": [("resnet50", 1000)],
}


def fastest(times: dict[str, list[float]], cases: list[str]) -> str | None:
    return min(cases, key=lambda case: quartiles(times[case])[1], default=None)


def head_width(model: torch.nn.Module) -> int:
    """Give the number of units that the last linear layer reads."""
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1].in_features


def main() -> None:
    options = arguments(
        __doc__ or "",
        networks="mlp,resnet18,resnet50,vgg16,vit_b_16,lite0",
        methods="gradient,guided_backprop,integrated_gradients,grad_cam",
        targets="1,8,64,all",
        batch=8,
        longest=15.0,
        limit=20.0,
    )
    if options.smoke:
        options.networks, options.targets, options.batch = "tiny,mlp", "1,4,all", 2
    rows, results, headlines = [], {}, []
    for name in options.networks.split(","):
        for method in options.methods.split(","):
            if not suits(method, name):
                continue
            more_rows, more_results, more_headlines = measure(name, method, options)
            rows += more_rows
            results |= more_results
            headlines += more_headlines
    header = ("network", "method", "K", "bound, ms", "pullback, ms", "of the bound", "fastest loop, of pullback")
    header += ("fastest together, of pullback", "autograd, of pullback", "difference")
    text = f"Batch 1, 224 px (a vector for `mlp`), {STEPS} steps of integrated gradients.\n\n{table(header, rows)}"
    if absent():
        text += f"\n\nNot installed: {', '.join(absent())}."
    finish(options, "targets", text, results, headlines)


if __name__ == "__main__":
    main()
