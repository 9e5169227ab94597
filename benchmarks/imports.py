"""Import times, each in a fresh process, beyond that of torch; for peers that need it, torchvision is theirs.

python benchmarks/imports.py
"""

from __future__ import annotations

import subprocess
import sys

from _measure import arguments, finish, milliseconds, quartiles, table
from _peers import found

MODULES = {
    "pullback": "pullback",
    "captum": "captum.attr",
    "zennit": "zennit",
    "grad-cam": "pytorch_grad_cam",
    "torchcam": "torchcam.methods",
    "torchray": "torchray.attribution.gradient",
}
CODE = """
import time, torch
{first}
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""
# where the compiled half of torchvision is missing, or was built for another torch, it imports with these declared
DECLARED = """
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> None:
    options = arguments(__doc__ or "")
    chosen = {library: module for library, module in MODULES.items() if library == "pullback" or found(module)}
    if options.smoke:
        chosen = dict(list(chosen.items())[:2])
    taken: dict[str, list[float]] = {library: [] for library in chosen}
    whole = subprocess.run([sys.executable, "-W", "ignore", "-c", "import torchvision"], capture_output=True)
    first = DECLARED if whole.returncode else ""
    for turn in range(1 if options.smoke else 0, options.rounds + 1):
        for library, module in chosen.items():
            command = [sys.executable, "-W", "ignore", "-c", CODE.format(first=first, module=module)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            if turn:  # the first one reads the disk
                taken[library].append(float(done.stdout.split()[-1]))
    rows = [(f"`import {chosen[library]}`", milliseconds(times)) for library, times in taken.items()]
    results = {library: {"seconds": times} for library, times in taken.items()}
    headlines = []
    if len(taken) > 1:
        best = min((library for library in taken if library != "pullback"), key=lambda name: quartiles(taken[name])[1])
        mine, theirs = taken["pullback"], taken[best]
        beside = f"{best}, {milliseconds(theirs)} ms"
        row = ["import, after `import torch`", f"{milliseconds(mine)} ms", beside]
        headlines.append([*row, f"{quartiles(theirs)[1] / quartiles(mine)[1]:.2f}"])
    finish(options, "imports", table(("after `import torch`", "ms"), rows), results, headlines)


if __name__ == "__main__":
    main()
