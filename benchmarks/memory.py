"""Peak memory against the number of targets, the chunk and the image size, each in a fresh process.

Counted from the state after loading network and input; the result, one map a target, is in it. The repeated batch is
what other libraries offer for many targets at once: here captum's, where it is installed. The time is that of this one
run, the first of its process.

    python benchmarks/memory.py --network resnet50
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _measure import (
    arguments,
    example,
    finish,
    in_process,
    megabytes,
    milliseconds,
    network,
    once,
    peak_of,
    plain_gradient,
    table,
)
from _peers import found, peers

import pullback
from pullback import over_targets


def runner(model: torch.nn.Module, case: str, device: str) -> Callable[[], Any]:
    """Make the run of a case, ``way/method/targets/chunk/size``."""
    way, method, count, chunk, size = case.split("/")
    x, targets = example(model, int(size), device), torch.arange(int(count), device=device)
    if way == "autograd":
        return lambda: plain_gradient(model, x)
    if way == "captum, repeated batch":
        many = peers(method, model, x, "")["captum"].many
        assert many is not None
        return lambda: many(targets)
    chunk_size: Any = chunk if chunk == "auto" else None if chunk == "none" else int(chunk)
    params, ours = pullback.params_of(model), over_targets(getattr(pullback, method), chunk_size=chunk_size)
    return lambda: ours(params, model, x, targets)


def main() -> None:
    options = arguments(__doc__ or "", network="resnet50")
    if options.smoke:
        options.network = "tiny"
    many, size = (4, 32) if options.smoke else (64, 224)
    if options.case:
        warm, side = network("tiny", options.device)  # what torch and others load on their first call is not counted
        way, method, _, chunk, _ = options.case.split("/")
        runner(warm, f"{way}/{method}/2/{chunk}/{side}", options.device)()
        model, _ = network(options.network, options.device)
        run, taken = runner(model, options.case, options.device), []
        peak = peak_of(lambda: taken.append(once(run, options.device)), options.device)
        print(*taken, peak)
        return

    def cases(method: str, counts: tuple[int, ...], chunks: tuple[str, ...], sizes: tuple[int, ...]) -> list[str]:
        ways = ["pullback"] + ["captum, repeated batch"] * (found("captum.attr") is not None and chunks == ("auto",))
        return [f"{w}/{method}/{k}/{c}/{s}" for w in ways for k in counts for c in chunks for s in sizes]

    chosen = [f"autograd/gradient/1/-/{size}"]
    chosen += cases("gradient", (1, 8, many), ("auto",), (size,))
    chosen += cases("guided_backprop", (1, many), ("auto",), (size,))
    chosen += cases("gradient", (many,), ("1", "4", "16", "none"), (size,))
    chosen += cases("gradient", (1, 8), ("auto",), (size // 2, size * 2))
    if options.smoke:
        chosen = chosen[:3]
    found_in = {case: in_process(case) for case in chosen}
    peaks = {case: int(found_in[case][1]) for case in chosen}
    rows, results = [], {}
    for case, peak in peaks.items():
        way, method, count, chunk, side = case.split("/")
        one = peaks.get(f"{way}/{method}/1/{'auto' if chunk != '-' else chunk}/{side}", peak)
        of_one = f"{peak / one:.2f}" if one else ""
        time, asked = found_in[case][0], chunk if way == "pullback" else ""
        rows.append([way, method, side, count, asked, megabytes(peak), of_one, milliseconds([time])])
        results[case] = {"bytes": peak, "of one target": peak / one if one else None, "seconds": time}
    header = ("library", "method", "px", "K", "chunk", "peak MB", "of its own for one target", "ms, first run")
    headlines = []
    mine, theirs = (peaks.get(f"{way}/gradient/{many}/auto/{size}") for way in ("pullback", "captum, repeated batch"))
    if mine and theirs:
        row = [f"{options.network}: peak memory of `gradient`, {many} targets", f"{megabytes(mine)} MB"]
        headlines.append([*row, f"captum, one batch, {megabytes(theirs)} MB", f"{theirs / mine:.1f}"])
    finish(options, "memory", f"{options.network}, batch 1\n\n{table(header, rows)}", results, headlines)


if __name__ == "__main__":
    main()
