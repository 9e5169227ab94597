"""One target: what a call costs beside plain autograd and beside each peer.

Plain autograd is one forward and one backward of the same network and image, weights frozen; for integrated gradients
and Grad-CAM it is the unit as well. Values are compared in the same run: the column `difference` is the largest one
over the largest value, and a case without a remark must agree, or the script stops.

    python benchmarks/overhead.py --networks resnet50,mlp
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _measure import (
    arguments,
    example,
    finish,
    milliseconds,
    network,
    plain_gradient,
    quartiles,
    ratio,
    seconds,
    table,
    with_spread,
)
from _peers import METHODS, STEPS, absent, gaps, options_of, peers, suits
from torch import Tensor

import pullback


def measure(name: str, options: Any) -> tuple[list[list[str]], dict[str, Any], list[list[str]]]:
    model, size = network(name, options.device)
    x, params = example(model, size, options.device), pullback.params_of(model)
    methods = [method for method in METHODS if suits(method, name)]
    cases: dict[str, Callable[[], Any]] = {"autograd/": lambda: plain_gradient(model, x)}
    notes = {}
    for method in methods:
        ours = getattr(pullback, method)
        how = options_of(method, name)

        def run(ours: Any = ours, how: Any = how) -> Tensor:
            return ours(params, model, x, 0, **how)

        cases[f"{method}/pullback"] = run
        others = peers(method, model, x, name)
        for library, gap in gaps(others, torch.stack([run()]), [0]):
            remark = others[library].remark
            if not (gap <= 2e-3 or remark):
                raise AssertionError(f"{name}, {method}: {library}'s values differ by {gap:.1e} of the largest")
            notes[f"{method}/{library}"] = f"{gap:.0e}" + (f": {remark}" if remark else "")
            cases[f"{method}/{library}"] = lambda peer=others[library]: peer.one(0)
    taken = seconds(cases, options.rounds, options.device, limit=options.limit, least=0.0 if options.smoke else 0.01)
    rows, results, headlines = [], {}, []
    for case, times in taken.items():
        method, library = case.split("/")
        mine = taken.get(f"{method}/pullback", times)
        of_plain, of_ours = ratio(times, taken["autograd/"]), ratio(times, mine)
        rows.append([name, method, library or "", milliseconds(times), with_spread(of_plain)])
        rows[-1] += [with_spread(of_ours) if library not in ("", "pullback") else "", notes.get(case, "")]
        results[f"{name}/{case}"] = {"seconds": times, "of autograd": of_plain, "of pullback": of_ours}
    for method in methods:
        best = min(
            (c for c in taken if c.startswith(method + "/") and c != f"{method}/pullback"),
            key=lambda c: quartiles(taken[c])[1],
            default=None,
        )
        if best and name in ("mlp", "resnet50"):
            mine, theirs = taken[f"{method}/pullback"], taken[best]
            beside = f"{best.split('/')[1]}, {milliseconds(theirs)} ms"
            headlines.append(
                [
                    f"{name}: `{method}`, one target",
                    f"{milliseconds(mine)} ms",
                    beside,
                    with_spread(ratio(theirs, mine)),
                ]
            )
    return rows, results, headlines


def main() -> None:
    options = arguments(__doc__ or "", networks="resnet50,vgg16,vit_b_16,lite0,mlp", limit=45.0)
    names = ["tiny", "mlp"] if options.smoke else options.networks.split(",")
    rows, results, headlines = [], {}, []
    for name in names:
        more_rows, more_results, more_headlines = measure(name, options)
        rows += more_rows
        results |= more_results
        headlines += more_headlines
    header = ("network", "method", "library", "ms", "of one autograd gradient", "of pullback", "difference")
    text = f"Batch 1, 224 px (a vector for `mlp`), {STEPS} steps of integrated gradients.\n\n{table(header, rows)}"
    if absent():
        text += f"\n\nNot installed: {', '.join(absent())}."
    finish(options, "overhead", text, results, headlines)


if __name__ == "__main__":
    main()
