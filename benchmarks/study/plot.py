"""The picture: accuracy against FLOPs and against seconds, with what nothing beats drawn."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, or looked for

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ssprop_patch._files import replacing
from study.frontier import frontier
from study.groups import Condition, Method

# Told apart by eyes that see few colours, and in grey by their markers.
_LOOKS = {
    "dense": ("#444444", "o"),
    "dense, other regulariser": ("#8a8a8a", "D"),
    "dense, equal compute": ("#D55E00", "^"),
    "ssProp": ("#0072B2", "s"),
    "ssProp, other selection": ("#4a93c4", "v"),
    "ssProp + regulariser": ("#009E73", "h"),
    "ssProp + coarse remainder": ("#56B4E9", "8"),
    "principal": ("#E69F00", "H"),
    "principal + coarse remainder": ("#7B3294", "D"),
    "dense, lower layers frozen": ("#8a8a8a", "p"),
    "principal + coarse remainder, lower layers frozen": ("#C51B7D", "p"),
}
_LINE = 0.16  # inches of a line of the list of methods


def draw(path: Path, conditions: Sequence[Condition], name: str) -> None:
    """Write the picture to ``path``."""
    drawn = figure(conditions, name)
    with replacing(path) as temporary:
        drawn.savefig(temporary, dpi=130, format="png")
    plt.close(drawn)


def figure(conditions: Sequence[Condition], name: str) -> Figure:
    """Return the picture: for each condition two panels and the list of its methods."""
    heights = [max(3.6, 0.4 + _LINE * _lines(condition)) for condition in conditions]
    drawn, axes = plt.subplots(
        len(conditions),
        3,
        figsize=(13.5, 0.8 + sum(heights)),
        sharey="row",
        squeeze=False,
        layout="constrained",
        height_ratios=heights,
        width_ratios=(1, 1, 0.75),
    )
    shown: dict[str, Any] = {}
    for condition, (left, right, names) in zip(conditions, axes, strict=True):
        _panel(left, condition, "total_flops", shown)
        _panel(right, condition, "train_s", shown)
        left.set_xlabel("forward and backward FLOPs of the whole training")
        right.set_xlabel("seconds of training, without evaluation")
        left.set_ylabel("test accuracy (%)")
        left.set_title(condition.label, fontsize=8, loc="left")
        _list(names, condition)
    drawn.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False)
    drawn.suptitle(f"{name}: mean over seeds, bars: sample standard deviation", fontsize=10)
    return drawn


def _panel(axes: Any, condition: Condition, cost: str, shown: dict[str, Any]) -> None:
    points = [(m.mean(cost), 100 * m.mean("accuracy")) for m in condition.methods]
    for number, (method, (x, y)) in enumerate(zip(condition.methods, points, strict=True), 1):
        kind = _kind(method)
        colour, marker = _LOOKS[kind]
        axes.errorbar(
            x,
            y,
            xerr=_spread(method, cost),
            yerr=100 * _spread(method, "accuracy"),
            color=colour,
            alpha=0.35,
            linestyle="none",
            zorder=2,
        )
        # The number in the marker is the method's in the list: labels would cover each other.
        (shown[kind],) = axes.plot(
            x,
            y,
            color=colour,
            marker=marker,
            markersize=12 if marker in "^v" else 11,
            markeredgecolor="white",
            linestyle="none",
            zorder=3,
        )
        middle = {"^": -1.5, "v": 1.5}.get(marker, 0)  # of a triangle
        axes.annotate(
            str(number),
            (x, y),
            (0, middle),
            textcoords="offset points",
            color="white",
            fontsize=6.5,
            weight="bold",
            zorder=4,
            ha="center",
            va="center_baseline",
        )
    dense = [m for m in condition.methods if _kind(m) == "dense"]
    if len(dense) > 1:
        line = sorted((m.mean(cost), 100 * m.mean("accuracy")) for m in dense)
        (shown["dense, stopped earlier"],) = axes.plot(
            *zip(*line, strict=True), color=_LOOKS["dense"][0], linestyle="--", linewidth=1
        )
    best = frontier(points)
    # To the dearest point: what costs more than the best one is worth no more.
    corners = [points[i] for i in best] + [(max(x for x, _ in points), points[best[-1]][1])]
    (line,) = axes.plot(
        [x for x, _ in corners],
        [y for _, y in corners],
        drawstyle="steps-post",
        color="#CC79A7",
        linewidth=1.5,
        zorder=1,
    )
    shown["Pareto frontier"] = line
    axes.margins(0.12)
    axes.grid(alpha=0.25)


def _list(axes: Any, condition: Condition) -> None:
    """Write which number is which method, those on a frontier with a mark for each."""
    axes.axis("off")
    marks = {"total_flops": "F", "train_s": "s"}
    on = {cost: {*_frontier_of(condition, cost)} for cost in marks}
    lines = []
    for number, method in enumerate(condition.methods):
        best = "".join(mark for cost, mark in marks.items() if number in on[cost])
        text = f"{number + 1:>2} {method.label}" + (f" [{best}]" if best else "")
        lines.append((_wrapped(text), _LOOKS[_kind(method)][0]))
    lines.append(("[F], [s]: on the frontier of FLOPs, of seconds", "black"))
    down = 0.0
    for text, colour in lines:
        axes.annotate(
            text,
            (0, 1),
            (0, down),
            xycoords="axes fraction",
            textcoords="offset points",
            va="top",
            fontsize=7,
            family="monospace",
            color=colour,
        )
        down -= 72 * _LINE * len(text.splitlines())


def _frontier_of(condition: Condition, cost: str) -> list[int]:
    return frontier([(m.mean(cost), m.mean("accuracy")) for m in condition.methods])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 56, subsequent_indent="   ", break_long_words=False)


def _lines(condition: Condition) -> int:
    return 2 + sum(len(_wrapped(f"   {m.label} [Fs]").splitlines()) for m in condition.methods)


def _spread(method: Method, name: str) -> float:
    values = method.values(name)
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _kind(method: Method) -> str:
    settings = method.settings
    others = method.regularised
    if settings.method == "dense-equal-compute":
        return "dense, equal compute"
    if settings.method == "dense" and settings.frozen:
        return "dense, lower layers frozen"
    if settings.method == "dense":
        return "dense, other regulariser" if others else "dense"
    if others:
        return "ssProp + regulariser"
    rule = {
        ("l1", "none"): "ssProp",
        ("l1", "coarse"): "ssProp + coarse remainder",
        ("principal", "none"): "principal",
        ("principal", "coarse"): "principal + coarse remainder",
    }.get((settings.selection, settings.remainder), "ssProp, other selection")
    return f"{rule}, lower layers frozen" if settings.frozen else rule
