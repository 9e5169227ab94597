"""Run benchmarks, each in a process of its own, and keep and tabulate what they find.

    python -m benchmarks                     all but perturbations and metrics, printed
    python -m benchmarks targets memory      some of them; also one job, such as targets-resnet50
    python -m benchmarks --record            kept in benchmarks/results/, RESULTS.md and docs/results.md written
    python -m benchmarks --tables            RESULTS.md and the table of docs/results.md, from what is kept
    python -m benchmarks --smoke             all code on the smallest inputs, for tests

What is recorded takes the place of what was kept once all jobs are done: the command, given again, goes on where it was
interrupted. Other options go to the scripts: ``python benchmarks/targets.py --help``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"

# job -> script and what it is given; in the order of the tables
JOBS: dict[str, tuple[str, ...]] = {
    # a second thread takes longer to wake than a small network takes, and its share of the work varies
    "overhead-mlp": ("overhead", "--networks", "mlp", "--threads", "1"),
    "overhead-resnet50": ("overhead", "--networks", "resnet50", "--threads", "1", "--limit", "200"),
    "overhead-vgg16": ("overhead", "--networks", "vgg16", "--limit", "200"),
    "overhead-vit_b_16": ("overhead", "--networks", "vit_b_16", "--limit", "200"),
    "overhead-lite0": ("overhead", "--networks", "lite0", "--threads", "1", "--limit", "100"),
    "targets-mlp": ("targets", "--networks", "mlp", "--targets", "1,8,10", "--threads", "1"),
    "targets-resnet18": ("targets", "--networks", "resnet18"),
    "targets-resnet50": ("targets", "--networks", "resnet50", "--limit", "40"),
    "targets-vgg16": ("targets", "--networks", "vgg16"),
    "targets-vit_b_16": ("targets", "--networks", "vit_b_16"),
    "targets-lite0": ("targets", "--networks", "lite0"),
    "memory": ("memory",),
    "batch": ("batch",),
    "compile": ("compile",),
    "imports": ("imports", "--rounds", "3"),
    "relevance": ("relevance", "--rounds", "3"),
    "torchray_dialect": ("torchray_dialect", "--rounds", "5"),
    "perturbations": ("perturbations", "--rounds", "2"),
    "metrics": ("metrics",),
}
BY_NAME = ("perturbations", "metrics")  # take minutes of their own, and run when they are named


def scripts() -> list[str]:
    """Name all scripts: those of `JOBS`, and those that check or draw."""
    named = dict.fromkeys(script for script, *_ in JOBS.values())
    others = (path.stem for path in sorted(HERE.glob("*.py")) if path.name[0] != "_")
    return [*named, *(name for name in others if name not in named)]


def chosen(names: list[str], smoke: bool) -> dict[str, tuple[str, ...]]:
    """Give the jobs of these names; a smoke run has one for each script."""
    jobs = {name: (name,) for name in scripts()} if smoke else JOBS
    known = {**{name: (name,) for name in scripts()}, **JOBS}
    picked: dict[str, tuple[str, ...]] = {}
    for name in names or [name for name in jobs if smoke or name not in BY_NAME]:
        if name in jobs:
            picked[name] = jobs[name]
        elif found := {job: how for job, how in jobs.items() if how[0] == name}:
            picked |= found
        elif name in known:
            picked[name] = known[name]
        else:
            raise SystemExit(f"no benchmark {name!r}: choose from {', '.join(known)}")
    return picked


def run(jobs: dict[str, tuple[str, ...]], folder: Path | None, more: list[str]) -> list[str]:
    """Run jobs that have no results in `folder` yet; give the names of those that failed."""
    failed = []
    for name, (script, *how) in jobs.items():
        file = folder / f"{name}.json" if folder else None
        if file and file.exists():
            print(f"# {name}: done before", flush=True)
            continue
        print(f"# {name}", flush=True)
        start = time.perf_counter()
        command = [sys.executable, str(HERE / f"{script}.py"), *how, *more]
        if file:
            command += ["--json", str(file)]
        if subprocess.run(command, env={**os.environ, "PYTHONWARNINGS": "ignore"}).returncode:
            failed.append(name)
        print(f"# {name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    return failed


def records() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Give what is kept, machine by machine, in the order of `JOBS`."""
    for folder in sorted(path for path in RESULTS.glob("*") if path.is_dir()):
        for name in JOBS:
            if (file := folder / f"{name}.json").exists():
                yield folder, json.loads(file.read_text())


def write_tables() -> None:
    """Write RESULTS.md, the table of docs/results.md, and the figure of curves, from the results that are kept."""
    from _measure import measured_on, table

    text, summary = (
        ["# Results", "", "Written by `python -m benchmarks --record`; `README.md` beside it explains the tables."],
        [],
    )
    rows: dict[str, list[list[str]]] = {}
    last: tuple[Any, str] = (None, "")
    for folder, record in records():
        on = measured_on(record["machine"])
        rows.setdefault(on, []).extend(record["headlines"])
        head = (folder, record["benchmark"])
        if head != last[0]:
            text += ["", f"## {record['benchmark']}, {folder.name}"]
        if (head, on) != last:
            text += ["", on]
        last = head, on
        text += ["", record["text"]]
    (HERE / "RESULTS.md").write_text("\n".join(text) + "\n")
    for on, found in rows.items():
        if found:
            summary += [table(("", "pullback", "fastest of the others", "times"), found), "", on, ""]
    page = ROOT / "docs" / "results.md"
    between = re.compile(r"(?<=<!-- benchmarks -->\n).*?(?=\n<!-- /benchmarks -->)", re.DOTALL)
    page.write_text(between.sub(lambda _: "\n".join(summary).strip(), page.read_text()))
    if all((RESULTS / "cpu" / f"{job}.json").exists() for job in ("targets-resnet50", "memory")):
        from _curves import draw

        draw(RESULTS / "cpu").savefig(ROOT / "docs" / "many-targets.png", dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(scripts())}; all without")
    parser.add_argument("--smoke", action="store_true", help="run everything once on the smallest inputs")
    parser.add_argument("--json", type=Path, default=None, metavar="DIR", help="write a file for each job there")
    parser.add_argument("--record", action="store_true", help="keep the results and write the tables")
    parser.add_argument("--tables", action="store_true", help="write the tables from what is kept, run nothing")
    options, more = parser.parse_known_args()
    if options.tables:
        write_tables()
        return 0
    jobs = chosen(options.names, options.smoke)
    folder = options.json
    if options.record:
        import torch

        kept = RESULTS / ("cuda" if torch.cuda.is_available() else "cpu")
        folder = kept / "unfinished"
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    failed = run(jobs, folder.resolve() if folder else None, more + ["--smoke"] * options.smoke)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    if options.record and folder:
        for file in folder.glob("*.json"):
            file.replace(folder.parent / file.name)
        folder.rmdir()
        write_tables()
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))  # as for each script run alone
    sys.exit(main())
