"""What every benchmark shares: interleaved timing, peak memory, the machine, tables and JSON.

Times are medians over rounds in which every case runs once, in a new order each, so that a slow moment of the machine
hits all of them. A ratio is the median of the rounds' ratios, with its quartiles. On CUDA times are between device
events. Peak memory is what a fresh process needs above its state after loading model and input: the resident set on a
CPU, the allocator's peak on CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pullback import keep_memory

Run = Callable[[], Any]
SHORT = 1.0  # seconds

# where Grad-CAM is taken
LAYERS = {
    "tiny": "3",
    "resnet18": "layer4",
    "resnet50": "layer4",
    "vgg16": "features.29",
    "vit_b_16": "encoder.layers.encoder_layer_11.ln_1",
    "lite0": "_bn1",
}


def arguments(description: str, **flags: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7, help="times each case runs, after one warm-up")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch on a CPU")
    parser.add_argument("--json", type=Path, default=None, help="write the results here")
    parser.add_argument("--smoke", action="store_true", help="run everything once on the smallest inputs")
    parser.add_argument("--case", default=None, help=argparse.SUPPRESS)  # one case, in a process of its own
    for name, default in flags.items():
        kind = type(default) if default is not None else str
        parser.add_argument("--" + name.replace("_", "-"), default=default, type=kind)
    options = parser.parse_args()
    if options.smoke:
        options.rounds = 1
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: str) -> dict[str, Any]:
    """Describe what a figure was measured on: kind and versions, nothing that names the machine."""
    packages = ("torch", "torchvision", "timm", "captum", "zennit", "grad-cam", "torchcam", "torchray")
    found = {package: version_of(package) for package in packages}
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version for package, version in found.items() if version},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def once(run: Run, device: str) -> float:
    """Give the seconds that one run takes."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def seconds(
    cases: Mapping[str, Run],
    rounds: int,
    device: str,
    *,
    limit: float = float("inf"),
    least: float = 0.0,
    warm: bool = False,
    keep: bool = True,
) -> dict[str, list[float]]:
    """Time each case once a round, after one run of each unless they are `warm`.

    Memory that a case frees is kept for all, or each would pay for what those before it happened to leave at the end of
    the heap; not with `keep` off, as in a process where nobody thought of that.

    The order is drawn anew for each round, and a case that takes less than `SHORT` seconds runs once untimed in its
    turn: one that follows a large one would pay for a cold cache, or for memory that was given back. After `limit`
    seconds no round begins, but for the first two. A case that takes less than `least` seconds is repeated, and its
    mean taken.
    """
    with keep_memory() if keep else contextlib.nullcontext():
        begun, order = time.perf_counter(), random.Random(0)
        for run in () if warm else cases.values():
            run()
        first = {name: once(run, device) if least else math.inf for name, run in cases.items()}
        repeats = {name: max(1, round(least / took)) for name, took in first.items()}
        taken: dict[str, list[float]] = {name: [] for name in cases}
        for done in range(rounds):
            if done >= 2 and time.perf_counter() - begun > limit:
                break
            for name in order.sample(list(cases), len(cases)):
                gc.collect()
                if first[name] < SHORT:
                    cases[name]()
                taken[name].append(once(_repeated(cases[name], repeats[name]), device) / repeats[name])
        return taken


def _repeated(run: Run, times: int) -> Run:
    def runs() -> None:
        for _ in range(times):
            run()

    return runs


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratio(times: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Give lower quartile, median and upper quartile of the rounds' ratios."""
    return quartiles([t / r for t, r in zip(times, reference, strict=True)])


def peak_of(run: Run, device: str) -> int:
    """Give the bytes that a run needs at its peak above what is held now. On a CPU: Linux only, else 0."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of the resident set
    except OSError:
        return 0
    held = _status("VmRSS")
    run()
    return _status("VmHWM") - held


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def peak_in_process(case: str) -> int:
    """Run this script for one case in a fresh process, and read the peak that it prints last."""
    return int(in_process(case)[-1])


def in_process(case: str) -> list[float]:
    """Run this script for one case in a fresh process, and read the numbers that it prints last."""
    command = [sys.executable, *sys.argv, "--case", case]
    # fixed thresholds keep the allocator from holding back what was freed
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return [float(number) for number in done.stdout.splitlines()[-1].split()]


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lay rows out as a Markdown table."""
    cells = [[str(cell) for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(values: Sequence[float]) -> str:
    middle = quartiles(values)[1] * 1e3
    return f"{middle:.1f}" if middle >= 10 else f"{middle:.3g}"


def with_spread(values: tuple[float, float, float]) -> str:
    low, middle, high = values
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def megabytes(size: int) -> str:
    return f"{size / 2**20:.0f}"


def finish(
    options: argparse.Namespace, name: str, text: str, results: Any, headlines: Sequence[Sequence[str]] = ()
) -> None:
    """Print a table and what it was measured on; write both as JSON where asked.

    `headlines` are the rows of `docs/results.md`: what, ours, the best of the others, and the ratio.
    """
    about = machine(options.device)
    print(text)
    print(f"\n{measured_on(about)}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"benchmark": name, "machine": about, "headlines": list(headlines), "text": text}
        head = json.dumps(record, indent=1).removesuffix("\n}")
        lines = ",\n".join(f"  {json.dumps(case)}: {json.dumps(_rounded(found))}" for case, found in results.items())
        options.json.write_text(f'{head},\n "results": {{\n{lines}\n }}\n}}\n')


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def measured_on(about: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    threads = f"{about['threads']} thread{'s' * (about['threads'] != 1)}"
    return f"{about['device']}, {threads}, Python {about['python']}, {versions}, {about['date']}."


def gap(a: Tensor, b: Tensor) -> float:
    """Give the largest difference of two tensors as a fraction of the largest entry of the second."""
    return (a.detach() - b.detach()).abs().max().item() / max(b.detach().abs().max().item(), 1e-30)


def agree(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> None:
    """A faster wrong answer is no win: raise unless `a` equals `b` up to a fraction of the largest entry."""
    if not gap(a, b) <= tolerance:
        raise AssertionError(f"the values differ by {gap(a, b):.1e} of the largest")


def network(name: str, device: str) -> tuple[nn.Module, int]:
    """Give a network with frozen weights, and its image size: torchvision's names with random weights, or the trained
    EfficientNet-Lite0 as ``lite0``. ``mlp`` has three layers and takes a vector."""
    torch.manual_seed(0)
    if name == "mlp":
        layers = (nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        model: nn.Module = nn.Sequential(*layers)
        size = 32
    elif name == "tiny":
        layers = (nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10))
        size = 32
    else:
        from pullback._networks.models import import_torchvision, load

        if name == "lite0":
            loaded = load("efficientnet-lite0", None, torch.device(device))
            model, size = loaded.model, 224
        else:
            import_torchvision()
            import torchvision

            model, size = getattr(torchvision.models, name)(weights=None), 224
            if name.startswith("vit"):
                nn.init.normal_(model.get_parameter("heads.head.weight"))  # it starts at zero, as every gradient would
    return model.eval().requires_grad_(False).to(device), size


def example(model: nn.Module, size: int, device: str, batch: int = 1) -> Tensor:
    """Draw an input of a network: images, or vectors where it begins with a linear layer."""
    vectors = isinstance(next(m for m in model.modules() if not any(m.children())), nn.Linear)
    torch.manual_seed(1)
    return torch.randn(batch, size).to(device) if vectors else torch.randn(batch, 3, size, size).to(device)


def plain_gradient(model: nn.Module, x: Tensor, target: int = 0) -> Tensor:
    """What anyone would write: the reference of every ratio."""
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(model(leaf)[:, target].sum(), leaf)[0]
