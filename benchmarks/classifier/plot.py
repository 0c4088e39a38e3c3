"""The picture: accuracy against FLOPs and against seconds, and the drop rate over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, or looked for

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from classifier.options import METHODS
from ssprop_patch._files import replacing

# Told apart by eyes that see few colours, and in grey by their markers.
_LOOKS = {
    "dense": ("#444444", "o"),
    "ssprop": ("#0072B2", "s"),
    "dense-equal": ("#D55E00", "^"),
    "whole-gradient": ("#009E73", "D"),
}


def draw(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write the picture of finished runs to ``path``."""
    drawn = figure(results)
    with replacing(path) as temporary:
        drawn.savefig(temporary, dpi=150, format="png")
    plt.close(drawn)


def figure(results: Sequence[dict[str, Any]]) -> Figure:
    """Return the picture of finished runs."""
    drawn = plt.figure(figsize=(10, 6.6), layout="constrained")
    top, bottom = drawn.subfigures(2, 1, height_ratios=(2.6, 1))
    left, right = top.subplots(1, 2, sharey=True)
    row = results[0]["row"]
    most = max(r["row"]["total_flops"] for r in results)
    unit, name = (1e15, "P") if most >= 1e15 else (1e12, "T") if most >= 1e12 else (1e9, "G")
    methods = [m for m in METHODS if any(r["row"]["method"] == m for r in results)]
    for method in methods:
        runs = [r for r in results if r["row"]["method"] == method]
        _curve(left, method, runs, "flops", 1 / unit)
        _curve(right, method, runs, "seconds", 1.0)
    left.set_xlabel(f"forward and backward FLOPs of the training so far ({name}FLOP)")
    right.set_xlabel("seconds of training so far (without evaluation)")
    left.set_ylabel("test accuracy (%)")
    left.set_ylim(*_limits(results))
    for axes in (left, right):
        axes.set_xlim(left=0)
    right.legend(loc="lower right", frameon=False)
    seeds = len({r["row"]["seed"] for r in results})
    over = "one seed"
    if seeds > 1:
        over = f"mean of {seeds} seeds, bars: sample standard deviation, thin lines: single seeds"
    drawn.suptitle(f"{row['model']} on {row['data']}, {row['device_name']}\n{over}", fontsize=11)
    _rates(bottom.subplots(), methods, results)
    return drawn


def _curve(axes: Any, method: str, runs: Sequence[dict[str, Any]], x: str, scale: float) -> None:
    colour, marker = _LOOKS[method]
    xs = np.array([[e[x] * scale for e in r["epochs"]] for r in runs])
    ys = np.array([[e["accuracy"] * 100 for e in r["epochs"]] for r in runs])
    for i in range(len(runs)):
        axes.plot(xs[i], ys[i], color=colour, alpha=0.2, linewidth=0.8)
    axes.plot(xs.mean(0), ys.mean(0), color=colour, linewidth=1.5)
    spread = {"xerr": xs[:, -1].std(ddof=1), "yerr": ys[:, -1].std(ddof=1)} if len(runs) > 1 else {}
    axes.errorbar(
        xs[:, -1].mean(),
        ys[:, -1].mean(),
        **spread,
        color=colour,
        marker=marker,
        markersize=8,
        capsize=3,
        linestyle="none",
        label=METHODS[method].label,
        zorder=3,
    )
    axes.grid(alpha=0.25)


def _limits(results: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return the range of accuracy to show: where the runs end up, not where they start."""
    accuracies = [100 * e["accuracy"] for r in results for e in r["epochs"]]
    later = [100 * e["accuracy"] for r in results for e in r["epochs"][len(r["epochs"]) // 4 :]]
    low, high = np.percentile(later, 5), max(accuracies)
    room = max(1.0, 0.08 * (high - low))
    return max(0.0, low - room), min(100.0 + 0.1 * room, high + room)


def _rates(axes: Any, methods: Sequence[str], results: Sequence[dict[str, Any]]) -> None:
    last = 0.0
    for method in methods:
        result = next(r for r in results if r["row"]["method"] == method)
        row = result["row"]
        per_epoch = row["steps"] / row["epochs"]
        starts = [step / per_epoch for step, _ in result["rates"]]
        rates = [rate for _, rate in result["rates"]]
        axes.step(
            [*starts, row["epochs"]],
            [*rates, rates[-1]],
            where="post",
            color=_LOOKS[method][0],
            label=METHODS[method].label,
        )
        last = max(last, row["epochs"])
    axes.set_xlim(0, last)
    axes.set_ylim(-0.05, 1.0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("drop rate")
    axes.grid(alpha=0.25)
