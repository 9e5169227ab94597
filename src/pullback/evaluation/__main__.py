"""Run the benchmark.

    python -m pullback.evaluation all                 the run behind docs/results.md: mosaics, digits, sanity
    python -m pullback.evaluation all --quick         the same on little, to see that it works
    python -m pullback.evaluation tables docs/results.md docs/evaluation.md    write the tables into these pages
    python -m pullback.evaluation voc VOCdevkit/VOC2007 --model package:factory --method grad_cam --layer features.29
    python -m pullback.evaluation coco val2014 instances_val2014.json --model package:factory --difficult
    python -m pullback.evaluation folder IMAGES MASKS --method grad_cam

An interrupted run goes on where it was when the same line is entered again.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pullback import cli, evaluation, params_of
from pullback._networks.messages import Problem, say, unknown
from pullback._networks.models import Network, find_device, load
from pullback.cli._asked import chosen_methods, public_methods, settle_layers
from pullback.cli._explain import PEAK_OVER_CHANNELS
from pullback.evaluation import Entry, Example, Summary
from pullback.evaluation.methods import LITE0, SMALL
from pullback.evaluation.runner import Row, read_table

FAILS = 0.5  # likeness of maps before and after all weights are drawn anew, from which a method fails
# mean accuracy over classes in %, VOC 2007 test, all images, VGG-16 and ResNet-50: Fong, Patrick & Vedaldi,
# Understanding Deep Networks via Extremal Perturbations and Smooth Masks, 2019
PUBLISHED = {
    "centre (control)": (69.6, 69.6),
    "deconvnet": (67.5, 68.6),
    "gradient": (76.3, 72.3),
    "guided_backprop": (75.9, 77.2),
    "excitation_backprop": (77.1, 84.5),
    "contrastive_excitation_backprop": (79.9, 90.7),
    "rise": (86.9, 86.4),
    "grad_cam": (86.6, 90.4),
    "extremal_perturbation": (88.0, 88.9),
}
Metrics = Mapping[str, Mapping[str, Any]]

INSIDE: Metrics = {"energy_pointing_game": {}, "pointing_game": {"tolerance": 1}}
ON_INK: Metrics = {**INSIDE, "relevance_rank": {}}
REDRAWN: Metrics = {"parameter_randomisation": {"layers": ("",), "samples": 1, "chunk_size": 1}}
HEADINGS = {
    "energy_pointing_game": "energy",
    "pointing_game": "pointing",
    "relevance_rank": "rank",
    "parameter_randomisation": "likeness",
}


def judge(
    arguments: argparse.Namespace, name: str, model: Any, examples: Sequence[Example], methods: Any, metrics: Metrics
) -> None:
    """Run, and write the tidy table, the summary and the figure."""
    methods = _named(methods, arguments.method)
    out = Path(arguments.out) / (name + ("-quick" if arguments.quick else ""))
    rows = evaluation.run(model, examples, methods, metrics, out=out, dataset=name, progress=True)
    write(rows, out, "class" if name in ("voc", "coco") else "target")


def _named(methods: Mapping[str, Entry], wanted: str | None) -> dict[str, Entry]:
    if not wanted:
        return dict(methods)
    names = [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in methods:
            raise Problem(unknown("method", name, methods))
    return {name: methods[name] for name in names}


def write(rows: Sequence[Row], out: Path, per: Any) -> None:
    if not rows:
        raise Problem("nothing was judged: every method failed, as the warnings say")
    evaluation.write_table(rows, out / "results.csv")
    with contextlib.suppress(ImportError):
        evaluation.write_table(rows, out / "results.parquet")
    columns = columns_of(rows, per)
    table = evaluation.markdown(columns)
    (out / "summary.md").write_text(table + "\n", encoding="utf-8")
    evaluation.figure(columns).savefig(out / "summary.png", dpi=150)
    print(f"{table}\n\n{out}: journal.jsonl, results.csv, summary.md, summary.png")


def columns_of(rows: Sequence[Row], per: Any = "target") -> dict[str, list[Summary]]:
    columns: dict[str, list[Summary]] = {}
    for summary in evaluation.summarise(rows, per=per):
        columns.setdefault(HEADINGS.get(summary.metric, summary.metric), []).append(summary)
    return columns


# -- data sets ---------------------------------------------------------------------------------------------------------


def lite0() -> Network:
    return load("efficientnet-lite0", None, torch.device("cpu"))


def mosaics(arguments: argparse.Namespace) -> None:
    network = lite0()
    cut = evaluation.tiles(network.model, evaluation.photographs(arguments.folder), network.preprocessing)
    examples = evaluation.mosaics(cut, count=1 if arguments.quick else 7)
    steps, samples = (2, 8) if arguments.quick else (12, 64)
    table = evaluation.entries(examples, LITE0, steps=steps, samples=samples, side=4 if arguments.quick else 8)
    judge(arguments, "mosaics", network.model, examples, evaluation.within_budget(table, 0), INSIDE)


def digits(arguments: argparse.Namespace) -> None:
    model, examples = evaluation.digits(count=3 if arguments.quick else 100, epochs=2 if arguments.quick else 14)
    steps, samples = (2, 8) if arguments.quick else (16, 128)
    table = evaluation.entries(examples, SMALL, steps=steps, samples=samples, side=4 if arguments.quick else 8)
    judge(arguments, "digits", model, examples, evaluation.within_budget(table, 1), ON_INK)


def sanity(arguments: argparse.Namespace) -> None:
    network = lite0()
    cut = evaluation.tiles(network.model, evaluation.photographs(arguments.folder), network.preprocessing)
    examples = evaluation.single(cut)[: 1 if arguments.quick else None]
    steps, samples = (2, 8) if arguments.quick else (12, 64)
    table = evaluation.entries(examples, LITE0, steps=steps, samples=samples, side=4 if arguments.quick else 8)
    judge(arguments, "tiles", network.model, examples, evaluation.within_budget(table, 2), REDRAWN)


def everything(arguments: argparse.Namespace) -> None:
    for part in (digits, mosaics, sanity):
        part(arguments)


def local(arguments: argparse.Namespace) -> None:
    """VOC, COCO or a folder with masks, with a network of one's own."""
    device = find_device(arguments.device)
    network = load(arguments.model, arguments.weights, device)
    preprocessing = network.preprocessing
    prepare = evaluation.fitted(preprocessing, arguments.side or min(preprocessing.size))
    chosen = {"difficult": arguments.difficult, "listed": arguments.listed} if arguments.data != "folder" else {}
    if arguments.data == "voc":
        examples = evaluation.voc(arguments.paths[0], prepare, image_set=arguments.image_set, **chosen)
    elif arguments.data == "coco":
        examples = evaluation.coco(arguments.paths[0], arguments.paths[1], prepare, **chosen)
    else:
        examples = evaluation.masked_folder(arguments.paths[0], arguments.paths[1], prepare)
    examples = examples[: arguments.limit or (2 if arguments.quick else None)]
    options = chosen_methods(arguments.method or "gradient,grad_cam", arguments.option, arguments.layer)
    params = params_of(network.model)
    settle_layers(options, params, network.model, examples[0].x[None])
    known = public_methods()
    methods = {
        name: Entry(known[name], own, "peak" if name in PEAK_OVER_CHANNELS else "sum") for name, own in options.items()
    }
    arguments.method = None
    metrics: Metrics = {"pointing_game": {"tolerance": arguments.tolerance}, "energy_pointing_game": {}}
    judge(arguments, arguments.data, network.model, examples, methods, metrics)


# -- tables of the pages -----------------------------------------------------------------------------------------------


def tables(arguments: argparse.Namespace) -> None:
    """Write the results of `all` into the marked blocks of each file."""
    for file in arguments.files:
        _write_blocks(Path(file), Path(arguments.out))


def _write_blocks(file: Path, out: Path) -> None:
    text, found = file.read_text(encoding="utf-8"), False
    for mark, block in (("measured", measured), ("agreement", agreement)):
        between = re.compile(rf"(?<=<!-- {mark} -->\n).*?(?=\n<!-- /{mark} -->)", re.DOTALL)
        if between.search(text):
            found, new = True, block(out)
            text = between.sub(lambda _, new=new: new, text)
    if not found:
        raise Problem(f"{str(file)!r} has no lines <!-- measured --> and <!-- /measured --> to write between")
    file.write_text(text, encoding="utf-8")


def found_in(out: Path, name: str) -> dict[str, list[Summary]]:
    if not (out / name / "results.csv").is_file():
        raise Problem(f"{str(out / name)!r} holds no results: run `python -m pullback.evaluation all` first")
    return columns_of(read_table(out / name / "results.csv"))


def agreement(out: Path) -> str:
    """The published pointing game beside our results, and the rank correlation of the two."""
    ours = {"grid, share": ("mosaics", "energy"), "grid, peak": ("mosaics", "pointing"),
            "digits, share": ("digits", "energy"), "digits, peak": ("digits", "pointing")}  # fmt: skip
    columns = {head: {s.method: s.mean for s in found_in(out, name)[metric]} for head, (name, metric) in ours.items()}
    lines = ["| | VGG-16 | ResNet-50 | " + " | ".join(columns) + " |", "|---" * (3 + len(columns)) + "|"]
    for method, published in PUBLISHED.items():
        cells = [f"{value:.1f}" for value in published]
        cells += [f"{means[method]:.2f}" if method in means else "–" for means in columns.values()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    for place, network in enumerate(("VGG-16", "ResNet-50")):
        cells = ["–", "–"]
        for means in columns.values():
            shared = [m for m in PUBLISHED if m in means and not np.isnan(means[m])]
            cells.append(f"{_likeness([PUBLISHED[m][place] for m in shared], [means[m] for m in shared]):.2f}")
        lines.append(f"| *rank correlation with {network}* | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _likeness(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks."""
    ranks = [[sum(v < w for v in values) + (sum(v == w for v in values) - 1) / 2 for w in values]
             for values in (one, other)]  # fmt: skip
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if min(np.ptp(r) for r in ranks) > 0 else float("nan")


def measured(out: Path) -> str:
    """The block of `docs/results.md`: all methods on grids and digits, and which fail the randomisation test."""
    found = {name: found_in(out, name) for name in ("mosaics", "digits", "tiles")}
    columns = {
        "grid: share in its tile": found["mosaics"]["energy"],
        "grid: peak in its tile": found["mosaics"]["pointing"],
        "digits: share on the ink": found["digits"]["energy"],
        "digits: ink among the highest": found["digits"]["rank"],
        "parameter randomisation": found["tiles"]["likeness"],
    }
    ink = np.mean([summary.chance for summary in columns["digits: share on the ink"]])
    likeness = [s for s in columns["parameter randomisation"] if "control" not in s.method]
    fails = sorted((s for s in likeness if s.mean >= FAILS), key=lambda s: -s.mean)
    unsure = sorted((s for s in likeness if s.mean < FAILS <= s.high), key=lambda s: -s.mean)
    said = ", ".join(f"`{s.method}` ({s.mean:.2f})" for s in fails) or "none"
    close = "; the interval of " + ", ".join(f"`{s.method}`" for s in unsure) + " reaches it" if unsure else ""
    energy = columns["grid: share in its tile"]
    blind = ", ".join(f"`{s.method}`" for s in energy if s.groups > 1 and s.low <= 0.25 and "control" not in s.method)
    counts = [{s.method: s.count + s.undefined for s in found[n][h]} for n, h in
              (("mosaics", "energy"), ("digits", "energy"), ("tiles", "likeness"))]  # fmt: skip
    names = {s.method for table in found.values() for column in table.values() for s in column}
    targets = {name: " / ".join(str(count.get(name, 0)) for count in counts) for name in names}
    table = evaluation.markdown(columns, notes={"targets": targets})
    for name in public_methods():
        table = table.replace(f"\n| {name} |", f"\n| `{name}` |")
    return (
        f"{table}\n\nIn brackets: 95 % intervals, where there is more than one photograph. *Targets* counts the "
        f"classes explained on grids, digits and single tiles. Chance is 0.25 on grids and {ink:.2f} on digits.\n\n"
        f"**Fail the parameter randomisation test** (rank correlation of at least {FAILS}): {said}{close}.\n\n"
        f"**No better than chance on grids** (the interval of the share includes 0.25): {blind or 'none'}."
    )


# -- the command -------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    top = cli.Parser(
        prog="python -m pullback.evaluation", description="Judge methods on data where the truth is known."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    shared = cli.Parser(add_help=False)
    shared.add_argument("--out", default="out/evaluation", metavar="DIR", help="folder for results (%(default)s)")
    shared.add_argument("--quick", action="store_true", help="on very little, to see that it works")
    shared.add_argument("--method", metavar="A,B", help="only these")
    shared.add_argument("--folder", metavar="DIR", help="photographs in a folder for each class of ImageNet")
    for name, run, about in (
        ("all", everything, "mosaics, digits and sanity"),
        ("mosaics", mosaics, "four photographs in one image, with the trained EfficientNet-Lite0"),
        ("digits", digits, "handwritten digits in noise, with a small network trained on the spot"),
        ("sanity", sanity, "do maps change when all weights are drawn anew?"),
    ):
        commands.add_parser(name, parents=[shared], help=about).set_defaults(run=run)
    for name, paths, about in (
        ("voc", ["ROOT"], "a local VOC data set"),
        ("coco", ["IMAGES", "INSTANCES"], "local COCO images and instances"),
        ("folder", ["IMAGES", "MASKS"], "photographs in class folders, masks in a parallel folder"),
    ):
        command = commands.add_parser(name, parents=[shared], help=about)
        command.set_defaults(run=local, data=name)
        add = command.add_argument
        add("paths", nargs=len(paths), metavar=tuple(paths) if len(paths) > 1 else paths[0])
        add("--model", default="efficientnet-lite0", metavar="NAME", help="see `pullback explain --help`")
        add("--weights", metavar="FILE", help="state dict of the model")
        add("--device", default="auto")
        add("--layer", default="auto", metavar="NAME")
        add("--option", action="append", default=[], metavar="KEY=VALUE", help="option of the methods that take it")
        add("--side", type=cli.positive, metavar="N", help="shorter side of an image in pixels (the model's)")
        add("--tolerance", type=float, default=15.0, help="of the pointing game, in the photograph's pixels (15)")
        add("--limit", type=cli.positive, metavar="N", help="only the first so many images")
        add("--difficult", action="store_true", help="only the difficult subset of VOC or COCO")
        add("--listed", metavar="FILE", help="a list of the difficult subset, instead of its definition")
        add("--image-set", default="test", metavar="NAME", help="of VOC (%(default)s)")
    command = commands.add_parser("tables", help="write the tables of results into the marked blocks of files")
    command.add_argument("files", nargs="+", metavar="FILE")
    command.add_argument("--out", default="out/evaluation", metavar="DIR", help="where the results are (%(default)s)")
    command.set_defaults(run=tables)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code, 2 where something could not be done."""
    try:
        parsed = parser().parse_args(arguments)
        with cli.one_line_warnings(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            parsed.run(parsed)
    except (Problem, ValueError, FileNotFoundError) as problem:
        say(f"pullback: error: {problem}")
        return 2
    except KeyboardInterrupt:
        say("pullback: interrupted; the same line goes on from here")
        return 130
    left_out = list(dict.fromkeys(str(w.message) for w in told if "is left out" in str(w.message)))
    for line in left_out:
        say(f"pullback: warning: {line}")
    return 2 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
