"""What every benchmark shares: interleaved timing, peak memory, the machine, tables and JSON.

Times are medians over rounds in which every case runs once, so that a slow moment of the machine hits all of them. A
ratio is the median of the rounds' ratios, with its quartiles. Peak memory is what a fresh process needs above its state
after loading model and input: the resident set on a CPU, the allocator's peak on CUDA.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
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

Run = Callable[[], Any]


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


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(cases: Mapping[str, Run], rounds: int, device: str) -> dict[str, list[float]]:
    """Time each case once a round, all cases in turn, after one run of each."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for run in cases.values():
        run()
    for _ in range(rounds):
        for name, run in cases.items():
            gc.collect()
            _synchronise(device)
            start = time.perf_counter()
            run()
            _synchronise(device)
            taken[name].append(time.perf_counter() - start)
    return taken


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4)
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
    command = [sys.executable, *sys.argv, "--case", case]
    # fixed thresholds keep the allocator from holding back what was freed
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return int(done.stdout.split()[-1])


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lay rows out as a Markdown table."""
    cells = [[str(cell) for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(values: Sequence[float]) -> str:
    return f"{quartiles(values)[1] * 1e3:.1f}"


def with_spread(values: tuple[float, float, float]) -> str:
    low, middle, high = values
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def megabytes(size: int) -> str:
    return f"{size / 2**20:.0f}"


def finish(options: argparse.Namespace, name: str, text: str, results: Any) -> None:
    """Print a table and what it was measured on; write both as JSON where asked."""
    about = machine(options.device)
    print(text)
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    print(f"\n{about['device']}, {about['threads']} threads, Python {about['python']}, {versions}, {about['date']}.")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"benchmark": name, "machine": about, "results": results, "text": text}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def agree(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> None:
    """A faster wrong answer is no win: raise unless `a` equals `b` up to a fraction of the largest entry."""
    gap = (a.detach() - b.detach()).abs().max().item() / max(b.abs().max().item(), 1e-30)
    if not gap <= tolerance:
        raise AssertionError(f"the values differ by {gap:.1e} of the largest")


def network(name: str, device: str) -> tuple[nn.Module, int]:
    """Give a network with frozen weights, and its image size: torchvision's names with random weights, or the trained
    EfficientNet-Lite0 as ``lite0``."""
    torch.manual_seed(0)
    if name == "tiny":
        layers = (nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        model: nn.Module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10))
        size = 32
    else:
        from pullback._networks import import_torchvision, load

        if name == "lite0":
            loaded = load("efficientnet-lite0", None, torch.device(device))
            model, size = loaded.model, 224
        else:
            import_torchvision()
            import torchvision

            model, size = getattr(torchvision.models, name)(weights=None), 224
    return model.eval().requires_grad_(False).to(device), size
