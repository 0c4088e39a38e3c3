"""The picture of trainings: accuracy against what it took."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from . import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COSTS = {
    "flops": ("forward + backward", "FLOP"),
    "seconds": ("training", "s"),
    "joules": ("energy", "J"),
}
_Point = tuple[float, float]
_Curves = dict[str, dict[Any, list[dict[str, float]]]]  # of each method: of each seed


def accuracy(
    runs: Iterable[Mapping[str, Any]] | str | os.PathLike[str],
    *,
    labels: Mapping[str, str] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Draw accuracy against FLOPs, seconds and joules, as far as the runs tell.

    Args:
        runs: Rows, or a CSV file of them: ``method`` (runs of one method are drawn alike),
            ``accuracy`` (0 to 1), and what it took until then: ``flops``, ``seconds``, ``joules``,
            one at least. Rows of one ``method`` and ``seed`` are one run's, in order, such as one
            an epoch; of several seeds the mean is drawn.
        labels: Names to show for methods.
        ax: Where to draw: an axes for each of FLOPs, seconds and joules that the runs have.
            Default: a new figure.

    Returns:
        The new figure, or that of ``ax``.

    Raises:
        ValueError: If there are no rows, a column is missing or no number, or ``ax`` has more or
            fewer axes.
    """
    if isinstance(runs, (str, os.PathLike)):
        with Path(runs).open(newline="", encoding="utf-8") as file:
            runs = list(csv.DictReader(file))
    curves, costs = _curves(list(runs))
    height = 3.4 if len(costs) > 1 else 4.2
    with style.panels(ax, len(costs), height, sharey=True) as (figure, panels):
        for axes, cost in zip(panels, costs, strict=True):
            _against(axes, curves, cost, labels or {})
        panels[0].set_ylabel("test accuracy (%)")
        panels[-1].legend(loc="best")
        most = max(map(len, curves.values()))
        if most > 1 and ax is None:
            figure.supxlabel(
                f"mean of {most} seeds; bars: sample standard deviation; thin lines: single seeds",
                fontsize=style.TEXT,
            )
    return figure


def _curves(rows: Sequence[Mapping[str, Any]]) -> tuple[_Curves, list[str]]:
    """Return what is to be drawn, and against which costs.

    Raises:
        ValueError: If a column is missing or no number.
    """
    costs = [cost for cost in _COSTS if rows and all(_given(row.get(cost)) for row in rows)]
    if not costs or not all(_given(row.get(c)) for row in rows for c in ("method", "accuracy")):
        raise ValueError(
            "rows must have method, accuracy, and flops, seconds or joules, in every row"
        )
    curves: _Curves = {}
    for row in rows:
        point = {name: _number(row, name) for name in ("accuracy", *costs)}
        if not 0 <= point["accuracy"] <= 1:
            raise ValueError(f"accuracy must be in [0, 1], got {row['accuracy']!r}")
        curves.setdefault(str(row["method"]), {}).setdefault(row.get("seed"), []).append(point)
    return curves, costs


def _against(axes: Any, curves: _Curves, cost: str, labels: Mapping[str, str]) -> None:
    what, name = _COSTS[cost]
    runs = [run for seeds in curves.values() for run in seeds.values()]
    size, name = style.unit(max(point[cost] for run in runs for point in run), name)
    for i, (method, seeds) in enumerate(curves.items()):
        points = [[(p[cost] / size, 100 * p["accuracy"]) for p in run] for run in seeds.values()]
        _method(axes, points, i, labels.get(method, method))
    axes.set_xlim(left=0)
    axes.set_ylim(*style.shown_range([[100 * p["accuracy"] for p in run] for run in runs]))
    axes.set_xlabel(f"{what} so far ({name})", fontsize=style.TEXT)


def _method(axes: Any, runs: Sequence[Sequence[_Point]], i: int, label: str) -> None:
    colour, marker = style.look(i)
    for run in runs if len(runs) > 1 else ():
        axes.plot(*zip(*run, strict=True), color=colour, alpha=0.2, linewidth=0.8)
    whole = zip(*(run for run in runs if len(run) == max(map(len, runs))), strict=True)
    mean = [tuple(map(fmean, zip(*points, strict=True))) for points in whole]
    axes.plot(*zip(*mean, strict=True), color=colour, linewidth=1.5)
    ends = list(zip(*(run[-1] for run in runs), strict=True))
    spread = dict(zip(("xerr", "yerr"), map(stdev, ends), strict=True)) if len(runs) > 1 else {}
    end = list(map(fmean, ends))
    axes.errorbar(*end, **spread, color=colour, capsize=3, linestyle="none", zorder=3)
    # By itself, so that the legend shows the marker and no bars.
    axes.plot(
        *end, color=colour, marker=marker, markersize=7, linestyle="none", label=label, zorder=3
    )


def _given(value: Any) -> bool:
    return value is not None and value != ""


def _number(row: Mapping[str, Any], name: str) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {row[name]!r}")
    return value
