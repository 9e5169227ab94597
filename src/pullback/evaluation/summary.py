"""From the tidy table to what it says: means with intervals, a Markdown table, a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pullback.evaluation.runner import Row
from pullback.metrics import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Summary:
    """What a method reaches in a metric: the mean, its 95 % interval, and what it is the mean of.

    `count` targets of `groups` groups have a value; of `undefined` more the metric has nothing to say. `chance` is the
    objects' mean share of the image.
    """

    method: str
    options: str
    metric: str
    mean: float
    low: float
    high: float
    count: int
    groups: int
    undefined: int
    chance: float


def summarise(
    rows: Sequence[Row],
    *,
    per: Literal["target", "class"] = "target",
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> list[Summary]:
    """Average each method's results in each metric, with a bootstrap over groups.

    Targets of one group, such as crops of one photograph, are no independent trials: whole groups are drawn, with all
    their targets. The interval says how the mean would vary with other photographs *like these*; with a handful of
    groups it is too narrow, and the percentiles of a bootstrap do not mend that.

    Args:
        rows: See `run`.
        per: ``"target"`` averages over targets; ``"class"`` first over the targets of each class, as the pointing game
            on VOC and COCO does.
        level: Of the interval.
        samples: Draws of the bootstrap.
        seed: Of these draws.

    Returns:
        A summary for each method, its options and metric, in the order of `rows`.

    Example:
        >>> row = {"method": "m", "options": "", "metric": "pointing_game", "chance": 0.25}
        >>> rows = [{**row, "value": float(k < 8), "target": 0, "group": str(k)} for k in range(10)]
        >>> (found,) = summarise(rows)
        >>> found.mean == 0.8 and found.low < 0.8 < found.high
        True
    """
    if per not in ("target", "class"):
        raise ValueError(f"`per` must be 'target' or 'class', got {per!r}.")
    tables: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        tables.setdefault((row["method"], row["options"], row["metric"]), []).append(row)
    found = []
    for (method, options, metric), table in tables.items():
        defined = [row for row in table if not np.isnan(row["value"])]
        chance = float(np.mean([row["chance"] for row in table]))
        groups = sorted({row["group"] for row in defined})
        if not defined:
            nan = float("nan")
            found.append(Summary(method, options, metric, nan, nan, nan, 0, 0, len(table), chance))
            continue
        kinds = sorted({int(row["target"]) if per == "class" else 0 for row in defined})
        sums, counts = np.zeros((2, len(groups), len(kinds)))
        for row in defined:
            place = groups.index(row["group"]), kinds.index(int(row["target"]) if per == "class" else 0)
            sums[place] += row["value"]
            counts[place] += 1
        draws = np.random.default_rng(seed).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), samples)
        drawn = _mean(draws @ sums, draws @ counts)
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        mean = float(_mean(sums.sum(0, keepdims=True), counts.sum(0, keepdims=True))[0])
        undefined = len(table) - len(defined)
        found.append(
            Summary(
                method, options, metric, mean, float(low), float(high), len(defined), len(groups), undefined, chance
            )
        )
    return found


def _mean(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean over classes that were drawn, of their means."""
    drawn = counts > 0
    return np.divide(sums, counts, out=np.zeros_like(sums), where=drawn).sum(1) / drawn.sum(1)


def markdown(
    columns: Mapping[str, Sequence[Summary]], *, digits: int = 2, notes: Mapping[str, Mapping[str, str]] | None = None
) -> str:
    """Lay summaries out as a Markdown table, a row for each method, best first in the first column.

    Args:
        columns: From a heading to summaries of one metric, one for each method.
        digits: After the point.
        notes: More columns, from a heading to a text for each method.

    Returns:
        The table. A mean over one group has no interval.
    """
    notes = notes or {}
    tables = {head: {s.method: s for s in column} for head, column in columns.items()}
    first = next(iter(tables.values()))
    names = sorted({name for table in tables.values() for name in table}, key=lambda n: _rank(first.get(n)))
    lines = ["| method | " + " | ".join([*columns, *notes]) + " |", "|---" * (1 + len(columns) + len(notes)) + "|"]
    for name in names:
        cells = [_cell(table.get(name), digits) for table in tables.values()]
        cells += [note.get(name, "") for note in notes.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rank(summary: Summary | None) -> tuple[bool, float]:
    if summary is None or np.isnan(summary.mean):
        return True, 0.0
    return False, -summary.mean if METRICS[summary.metric].higher else summary.mean


def _cell(summary: Summary | None, digits: int) -> str:
    if summary is None or np.isnan(summary.mean):
        return "–"
    if summary.groups < 2:
        return f"{summary.mean:.{digits}f}"
    return f"{summary.mean:.{digits}f} ({summary.low:.{digits}f} to {summary.high:.{digits}f})"


def figure(columns: Mapping[str, Sequence[Summary]], *, figure: Figure | None = None) -> Figure:
    """Draw summaries: a row for each method, a panel for each metric, with intervals and the chance level.

    Args:
        columns: See `markdown`.
        figure: Where to draw; it is resized to fit. A new one if omitted.
    """
    from matplotlib.figure import Figure as New

    tables = {head: {s.method: s for s in column} for head, column in columns.items()}
    first = next(iter(tables.values()))
    names = sorted({name for table in tables.values() for name in table}, key=lambda n: _rank(first.get(n)))
    figure = New(layout="constrained") if figure is None else figure
    figure.set_size_inches(2.6 + 2.6 * len(tables), 0.9 + 0.19 * len(names))
    panels: Any = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for ax, (head, table) in zip(panels, tables.items(), strict=True):
        shown = [(place, table[n]) for place, n in enumerate(names) if n in table and not np.isnan(table[n].mean)]
        places, found = [place for place, _ in shown], [s for _, s in shown]
        means = np.array([s.mean for s in found])
        spread = np.array([[s.mean - s.low for s in found], [s.high - s.mean for s in found]]).clip(min=0)
        ax.errorbar(means, places, xerr=spread, fmt="o", ms=3.5, lw=1, color="#1f4e79", ecolor="#8fb1d0")
        about = METRICS[found[0].metric] if found else None
        if about is not None and about.chance == "share":
            chance = float(np.mean([s.chance for s in found]))
            ax.axvline(chance, color="0.6", lw=1, ls=":")
            ax.annotate("chance", (chance, len(names)), fontsize=7, color="0.4", ha="left")
        ax.set_title(head, fontsize=9)
        ax.set_ylim(len(names) + 0.2, -0.7)
        ax.set_yticks(range(len(names)), names, fontsize=7.5)
        ax.tick_params(axis="x", labelsize=7.5)
        ax.grid(axis="y", color="0.93", lw=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
    return figure
