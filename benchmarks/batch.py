"""Throughput against batch size: images a second for one target each, and without `keep_memory`.

python benchmarks/batch.py --networks resnet18,lite0
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _measure import (
    agree,
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
from _peers import peers
from torch import Tensor

from pullback import gradient, guided_backprop, params_of

Run = Callable[[], Any]
FLIPS = 0.05  # in float32 a rectifier close to zero may go the other way, in plain autograd as well


def cases(model: Any, x: Tensor, name: str) -> dict[str, Run]:
    params = params_of(model)
    runs: dict[str, Run] = {
        "autograd": lambda: plain_gradient(model, x),
        "gradient": lambda: gradient(params, model, x, 0),
        "guided_backprop": lambda: guided_backprop(params, model, x, 0),
    }
    for method in ("gradient", "guided_backprop"):
        for library, peer in peers(method, model, x, name).items():
            if library in ("captum", "zennit"):  # the others explain one image at a time
                runs[f"{library}, {method}"] = lambda peer=peer: peer.one(0)
                if not peer.remark:
                    agree(peer.one(0), runs[method](), FLIPS)
    agree(runs["gradient"](), runs["autograd"](), FLIPS)
    return runs


def main() -> None:
    options = arguments(__doc__ or "", networks="resnet18,lite0", batches="1,2,4,8,16", limit=20.0)
    if options.smoke:
        options.networks, options.batches = "tiny", "1,2"
    rows, results = [], {}
    for name in options.networks.split(","):
        model, size = network(name, options.device)
        runs = {}
        for batch in map(int, options.batches.split(",")):
            x = example(model, size, options.device, batch)
            runs |= {(batch, case): run for case, run in cases(model, x, name).items()}
        taken = seconds({f"{b}/{case}": run for (b, case), run in runs.items()}, options.rounds, options.device,
                        limit=options.limit, warm=True)  # fmt: skip
        anew = {f"{b}/{case}, memory not kept": runs[b, case] for b, case in runs if case in ("autograd", "gradient")}
        taken |= seconds(anew, options.rounds, options.device, limit=options.limit, warm=True, keep=False)
        for key, times in taken.items():
            number, case = key.split("/")
            batch = int(number)
            how = ", memory not kept" if case.endswith("not kept") else ""
            of_plain, speed = ratio(times, taken[f"{batch}/autograd{how}"]), batch / quartiles(times)[1]
            rows.append([name, str(batch), case, milliseconds(times), f"{speed:.3g}", with_spread(of_plain)])
            results[f"{name}/{batch}/{case}"] = {"seconds": times, "images a second": speed, "of autograd": of_plain}
    text = table(("network", "batch", "case", "ms", "images a second", "of autograd"), rows)
    finish(options, "batch", text, results)


if __name__ == "__main__":
    main()
