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
# torchvision registers operators of its compiled half, which need no kernel here
CODE = """
import time, torch
library = torch.library.Library("torchvision", "FRAGMENT")
try:
    import torchvision._C
except Exception:
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""


def main() -> None:
    options = arguments(__doc__ or "")
    chosen = {library: module for library, module in MODULES.items() if library == "pullback" or found(module)}
    taken: dict[str, list[float]] = {library: [] for library in chosen}
    for turn in range(options.rounds + 1):
        for library, module in chosen.items():
            command = [sys.executable, "-W", "ignore", "-c", CODE.format(module=module)]
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
