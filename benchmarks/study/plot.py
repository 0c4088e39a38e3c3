"""The picture: accuracy against FLOPs and against seconds, with what nothing beats drawn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ssprop_patch.plots import style
from study.frontier import frontier
from study.groups import Condition, Method

_GREY, _BLUE, _RED, _GREEN, _PINK, _YELLOW, _SKY, _PURPLE, _PALE = style.COLOURS
_LOOKS = {
    "dense": (_GREY, "o"),
    "dense, other regulariser": (_PALE, "D"),
    "dense, equal compute": (_RED, "^"),
    "ssProp": (_BLUE, "s"),
    "ssProp, other selection": (_SKY, "v"),
    "ssProp + regulariser": (_GREEN, "h"),
    "ssProp + coarse remainder": (_SKY, "8"),
    "principal": (_YELLOW, "H"),
    "principal + coarse remainder": (_PURPLE, "D"),
    "dense, lower layers frozen": (_PALE, "p"),
    "principal + coarse remainder, lower layers frozen": (_PINK, "p"),
}
_PANELS, _MORE = 2.7, 0.06  # inches: two panels with their title, and for each method above nine
_LINE, _LETTERS = 0.17, 52  # of the list of methods: inches of a line, letters in it
_MARK = 13  # points: a marker with a number in it
Point = tuple[float, float]
_EARLIER = Line2D([], [], color=_GREY, linestyle="--", linewidth=1, label="dense, stopped earlier")
_MOVED = Line2D(
    [],
    [],
    color=style.INK,
    linewidth=0.8,
    marker=".",
    markersize=4,
    label="where a number belongs that was moved",
)
_FRONTIER = Line2D([], [], color=_PINK, linewidth=1.5, label="nothing beats this: Pareto frontier")


def draw(path: Path, conditions: Sequence[Condition], name: str) -> None:
    """Write the picture to ``path``."""
    style.write(figure(conditions, name), path)


def figure(conditions: Sequence[Condition], name: str) -> Figure:
    """Return the picture: two panels for each condition, and the list of the methods.

    One list for all where they have the same methods, else each its own.
    """
    lists = {tuple(m.label for m in condition.methods) for condition in conditions}
    listed = conditions[-1:] if len(lists) == 1 else conditions
    heights = []
    for condition in conditions:
        heights.append(_PANELS + _MORE * max(0, len(condition.methods) - 9))
        heights += [_LINE * _lines(condition) + 0.2] * (condition in listed)
    flops = max(m.mean("total_flops") for c in conditions for m in c.methods)
    seconds = max(m.mean("train_s") for c in conditions for m in c.methods)
    same, titles = _titles([condition.label for condition in conditions])
    with style.context():
        drawn = style.figure(0.7 + sum(heights))
        grid = drawn.add_gridspec(len(heights), 2, height_ratios=heights)
        rows, points = iter(range(len(heights))), {}
        for condition, title in zip(conditions, titles, strict=True):
            row = next(rows)
            left = drawn.add_subplot(grid[row, 0])
            right = drawn.add_subplot(grid[row, 1], sharey=left)
            right.tick_params(labelleft=False)
            for axes, cost, (size, unit), what in (
                (left, "total_flops", style.unit(flops), "forward + backward"),
                (right, "train_s", style.unit(seconds, "s"), "training, without evaluation"),
            ):
                style.tidy(axes)
                points[axes] = condition, _panel(axes, condition, cost, size)
                axes.set_xlabel(f"{what} ({unit})", fontsize=style.TEXT)
            left.set_ylabel("test accuracy (%)")
            left.set_title(style.wrapped(title, 7.4, style.TEXT), loc="left", fontsize=style.TEXT)
            if condition in listed:
                _list(drawn.add_subplot(grid[next(rows), :]), condition)
        words = f"{name}: mean over seeds, bars: sample standard deviation\n{same}"
        drawn.suptitle(style.wrapped(words, style.WIDTH, 9), fontsize=9)
        drawn.draw_without_rendering()  # lays it out: only now it is known what covers what
        for axes, (condition, where) in points.items():
            _numbers(axes, condition, where)
    return drawn


def _titles(labels: Sequence[str]) -> tuple[str, list[str]]:
    """Return what all labels say, and what each says besides."""
    parts = [label.split(", ") for label in labels]
    if len(parts) == 1:
        return labels[0], [""]
    same = [part for part in parts[0] if all(part in other for other in parts)]
    return ", ".join(same), [", ".join(p for p in some if p not in same) for some in parts]


def _panel(axes: Axes, condition: Condition, cost: str, size: float) -> list[Point]:
    """Draw all but the numbers; return where the methods are."""
    points = [(m.mean(cost) / size, 100 * m.mean("accuracy")) for m in condition.methods]
    for method, point in zip(condition.methods, points, strict=True):
        axes.errorbar(
            *point,
            xerr=_spread(method, cost) / size,
            yerr=100 * _spread(method, "accuracy"),
            color=_LOOKS[_kind(method)][0],
            alpha=0.35,
            linestyle="none",
            zorder=2,
        )
    dense = [m for m in condition.methods if _kind(m) == "dense"]
    if len(dense) > 1:
        line = sorted((m.mean(cost) / size, 100 * m.mean("accuracy")) for m in dense)
        axes.plot(*zip(*line, strict=True), color=_GREY, linestyle="--", linewidth=1)
    best = frontier(points)
    # To the dearest point: what costs more than the best one is worth no more.
    corners = [points[i] for i in best] + [(max(x for x, _ in points), points[best[-1]][1])]
    axes.plot(
        [x for x, _ in corners],
        [y for _, y in corners],
        drawstyle="steps-post",
        color=_PINK,
        linewidth=1.5,
        zorder=1,
    )
    axes.margins(0.12)
    axes.set_xlim(left=max(0, axes.get_xlim()[0]))  # a bar may reach below 0, a cost not
    return points


def _numbers(axes: Axes, condition: Condition, points: Sequence[Point]) -> None:
    """Draw each method with its number in the list; beside its point, if another is there."""
    axes.autoscale(False)
    point = axes.figure.dpi / 72  # pixels
    pixels = axes.transData.transform(points) / point
    centers = apart(pixels, _MARK, axes.get_window_extent().padded(-_MARK).extents / point)
    back = axes.transData.inverted()
    for number, (method, center) in enumerate(zip(condition.methods, centers, strict=True), 1):
        colour, marker = _LOOKS[_kind(method)]
        x, y = points[number - 1]
        place = back.transform([c * point for c in center])
        axes.plot([x, place[0]], [y, place[1]], color=colour, linewidth=0.8, zorder=2.5)
        axes.plot(x, y, color=colour, marker=".", markersize=4, linestyle="none", zorder=2.5)
        axes.plot(
            *place,
            color=colour,
            marker=marker,
            markersize=_MARK + 3 * (marker in "^v"),
            markeredgecolor="white",
            linestyle="none",
            zorder=3,
        )
        axes.annotate(
            str(number),
            place,
            (0, {"^": -2, "v": 2}.get(marker, 0)),  # the middle of a triangle
            textcoords="offset points",
            color="white" if sum(to_rgb(colour)) < 1.75 else "black",
            fontsize=style.TEXT,
            weight="bold",
            zorder=4,
            ha="center",
            va="center_baseline",
        )


def apart(
    points: Sequence[Point], distance: float, box: tuple[float, float, float, float]
) -> list[Point]:
    """Move points as little as it takes for all to be so far from each other.

    Args:
        points: The first ones stay where they are.
        distance: Between any two.
        box: Left, lower, right and upper border of where points may be moved to.
    """
    rings = [
        (distance * ring / 2 * math.cos(angle), distance * ring / 2 * math.sin(angle))
        for ring in range(2, 20)
        for angle in (2 * math.pi * i / (8 * ring) for i in range(8 * ring))
    ]
    placed: list[Point] = []
    for x, y in points:
        tries = [(x + a, y + b) for a, b in rings]
        inside = [t for t in tries if box[0] <= t[0] <= box[2] and box[1] <= t[1] <= box[3]]
        free = (t for t in [(x, y), *inside] if all(math.dist(t, p) >= distance for p in placed))
        placed.append(next(free, (x, y)))
    return placed


def _list(axes: Axes, condition: Condition) -> None:
    """Say which number is which method."""
    axes.axis("off")
    handles = []
    for label, method in zip(_labels(condition), condition.methods, strict=True):
        colour, marker = _LOOKS[_kind(method)]
        handles.append(
            Line2D([], [], color=colour, marker=marker, markersize=8, linestyle="none", label=label)
        )
    if sum(_kind(method) == "dense" for method in condition.methods) > 1:
        handles.append(_EARLIER)
    axes.legend(
        handles=[*handles, _MOVED, _FRONTIER],
        loc="upper center",
        ncols=2,
        frameon=False,
        borderaxespad=0,
    )


def _labels(condition: Condition) -> list[str]:
    width = _LETTERS * 0.6 * style.TEXT / 72
    return [
        style.wrapped(f"{number}  {method.label}", width, style.TEXT).replace("\n", "\n     ")
        for number, method in enumerate(condition.methods, 1)
    ]


def _lines(condition: Condition) -> int:
    """Return how many lines the longer column of the list has."""
    lines = [len(label.splitlines()) for label in _labels(condition)] + [1, 1, 1]
    half = -(-len(lines) // 2)
    return max(sum(lines[:half]), sum(lines[half:]))


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
