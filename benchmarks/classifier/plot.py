"""The picture: accuracy against FLOPs and against seconds, and the drop rate over time."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import ssprop_patch as ssp
from classifier.options import METHODS
from ssprop_patch.plots import style

_PANELS, _ROW, _AROUND = 3.6, 0.28, 0.6  # inches: accuracy, a row of drop rates, what is around
Rows = Sequence[Mapping[str, Any]]


def draw(path: Path, runs: Path, history: Path) -> None:
    """Write the picture of finished runs.

    Args:
        path: Where to.
        runs: runs.csv, a row a run.
        history: history.csv, a row an epoch.
    """
    tables = []
    for table in (runs, history):
        with table.open(newline="", encoding="utf-8") as file:
            tables.append(list(csv.DictReader(file)))
    style.write(figure(*tables), path)


def figure(runs: Rows, history: Rows) -> Figure:
    """Return the picture of finished runs.

    Raises:
        ValueError: If a run has no epoch.
    """
    methods = [m for m in METHODS if any(row["method"] == m for row in runs)]
    labels = {name: method.label for name, method in METHODS.items()}
    epochs = [row for m in methods for row in history if row["method"] == m]
    heights = (_PANELS, _AROUND + _ROW * len(methods))
    with style.context():
        drawn = style.figure(0.5 + sum(heights))
        top, bottom = drawn.subfigures(2, 1, height_ratios=heights)
        panels = top.subplots(1, 2, sharey=True)
        rates = bottom.subplots()
        for axes in (*panels, rates):
            style.tidy(axes)
        ssp.plots.accuracy(epochs, labels=labels, ax=panels)
        _rates(rates, [next(row for row in runs if row["method"] == m) for m in methods])
        rates.set_yticks([i + 0.4 for i in range(len(methods))], [labels[m] for m in methods])
        over, first = "one seed", runs[0]
        if (seeds := len({row["seed"] for row in runs})) > 1:
            over = (
                f"mean of {seeds} seeds, bars: sample standard deviation, thin lines: single seeds"
            )
        what = f"{first['model']} on {first['data']}, {first['device_name']}"
        drawn.suptitle(style.wrapped(f"{what}\n{over}", style.WIDTH, 10))
    return drawn


def rate_pieces(row: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Return the drop rates of a run, and the epochs at which each begins and the last ends."""
    steps, epochs = int(row["steps"]), float(row["epochs"])
    rates = [0.0] * steps
    if row["schedule"]:
        schedule = ssp.parse_schedule(row["schedule"])
        whole = 1 if schedule.interval == "step" else round(steps / epochs)
        rates = [schedule(step // whole) for step in range(steps)]
    pieces = [(rate, len(list(same))) for rate, same in groupby(rates)]
    edges = [0.0]
    for _, length in pieces:
        edges.append(edges[-1] + length * epochs / steps)
    return [rate for rate, _ in pieces], edges


def _rates(axes: Any, rows: Rows) -> None:
    """Draw a row for each method: as high as the drop rate, as long as the training."""
    for i, row in enumerate(rows):
        rates, edges = rate_pieces(row)
        colour, _ = style.look(i)
        axes.stairs(
            [i + 0.8 * (1 - r) for r in rates], edges, baseline=i + 0.8, fill=True, color=colour
        )
        axes.plot([0, edges[-1]], [i + 0.8] * 2, color=colour, linewidth=1)
    axes.set_xlim(0, max(float(row["epochs"]) for row in rows))
    axes.set_ylim(len(rows), -0.1)  # the first on top
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("epoch")
    axes.set_title("drop rate (1 would fill a row)", loc="left", fontsize=style.TEXT)
