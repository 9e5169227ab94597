"""The measured curves of `targets` and `memory`, as a figure, from the results that are kept."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

NETWORK = "resnet50"


def draw(folder: Path) -> Any:
    """Draw time and peak memory against the number of targets, beside the bound and the fastest ways of others."""
    import matplotlib.pyplot as plt

    times = json.loads((folder / f"targets-{NETWORK}.json").read_text())["results"]
    peaks = json.loads((folder / "memory.json").read_text())["results"]

    def against_targets(method: str, case: str) -> tuple[list[int], list[float]]:
        start, end = f"{NETWORK}/{method}/", f"/{case}"
        found = {int(key.split("/")[2]): times[key]["seconds"] for key in times if (key + "/").startswith(start)
                 and key.endswith(end)}  # fmt: skip
        return sorted(found), [statistics.median(found[k]) for k in sorted(found)]

    def memory(way: str) -> tuple[list[int], list[float]]:
        start, end = f"{way}/gradient/", "/auto/224"
        found = {int(key.split("/")[2]): peaks[key]["bytes"] / 2**20 for key in peaks if key.startswith(start)
                 and key.endswith(end)}  # fmt: skip
        return sorted(found), [found[k] for k in sorted(found)]

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    panels = (
        ("gradient", {"captum, loop": "C1o-", "captum, batches of 8": "C2s-", "pullback": "C0o-", "bound": "k--"}),
        ("grad_cam", {"captum, loop": "C1o-", "torchcam, one forward": "C3s-", "pullback": "C0o-", "bound": "k--"}),
    )
    for ax, (method, cases) in zip(axes, panels, strict=False):
        for case, style in cases.items():
            bound = "the bound, F + K B" if method == "gradient" else "the bound, F"
            counts, values = against_targets(method, case)
            if counts:
                ax.loglog(counts, values, style, label=bound if case == "bound" else case)
        ax.set(title=f"{method}, ResNet-50", ylabel="seconds")
    for way, style in {"captum, repeated batch": "C2s-", "pullback": "C0o-"}.items():
        counts, values = memory(way)
        if counts:
            axes[2].loglog(counts, values, style, label=way)
    axes[2].set(title="gradient, ResNet-50", ylabel="peak memory, MB")
    for ax in axes:
        ax.set_xlabel("targets")
        ax.legend(frameon=False)
        ax.grid(alpha=0.3)
    return figure
