"""Whole methods through `torch.compile`: eager against compiled, cold and warm.

Each method becomes one graph, or the script stops; values are compared with the eager call. Cold is the first call,
with an empty cache of the compiler. What the compiler makes of plain autograd stands beside it.

    python benchmarks/compile.py --networks resnet18
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cache.name

import torch
from _measure import (
    arguments,
    example,
    finish,
    gap,
    milliseconds,
    network,
    once,
    plain_gradient,
    ratio,
    seconds,
    table,
    with_spread,
)
from torch import Tensor

import pullback
from pullback import compiled, params_of

Run = Callable[[], Any]


def main() -> None:
    options = arguments(__doc__ or "", networks="resnet18,lite0", backend="inductor", limit=20.0)
    if options.smoke:
        options.networks, options.backend = "tiny", "aot_eager"
    warnings.simplefilter("ignore")  # the compiler's own
    rows, results = [], {}
    for name in options.networks.split(","):
        model, size = network(name, options.device)
        x, params = example(model, size, options.device), params_of(model)
        fast_model: Any = torch.compile(model, fullgraph=True, backend=options.backend)
        runs: dict[str, tuple[Run, Run]] = {
            "autograd": (lambda m=model, x=x: plain_gradient(m, x), lambda m=fast_model, x=x: plain_gradient(m, x))
        }
        for method in ("saliency", "guided_backprop"):
            eager, fast = getattr(pullback, method), compiled(getattr(pullback, method), backend=options.backend)

            def call(run: Any, params: Any = params, model: Any = model, x: Tensor = x) -> Run:
                return lambda: run(params, model, x, 0)

            runs[method] = call(eager), call(fast)
        cold, difference = {}, {}
        for case, (eager, fast) in runs.items():
            cold[case] = once(fast, options.device)
            difference[case] = gap(fast(), eager())
            if not difference[case] <= 2e-3:
                raise AssertionError(f"{name}, {case}: the values differ by {difference[case]:.1e} of the largest")
        both = {f"{case}/{i}": run for case, pair in runs.items() for i, run in enumerate(pair)}
        taken = seconds(both, options.rounds, options.device, limit=options.limit, warm=True)
        for case in runs:
            eager, warm = taken[f"{case}/0"], taken[f"{case}/1"]
            times = [milliseconds(eager), f"{cold[case]:.1f}", milliseconds(warm)]
            rows.append([name, case, *times, with_spread(ratio(eager, warm)), f"{difference[case]:.0e}"])
            results[f"{name}/{case}"] = {"eager": eager, "cold": cold[case], "warm": warm, "gap": difference[case]}
    header = ("network", "case", "eager, ms", "cold, s", "warm, ms", "eager / warm", "difference")
    text = f"Batch 1, 224 px, backend {options.backend}\n\n{table(header, rows)}"
    headlines = []
    for name in options.networks.split(","):
        if f"{name}/saliency" in results and not options.smoke:
            eager, warm = results[f"{name}/saliency"]["eager"], results[f"{name}/saliency"]["warm"]
            row = [f"{name}: `saliency`, compiled", f"{milliseconds(warm)} ms", f"eager, {milliseconds(eager)} ms"]
            headlines.append([*row, with_spread(ratio(eager, warm))])
    finish(options, "compile", text, results, headlines)


if __name__ == "__main__":
    main()
