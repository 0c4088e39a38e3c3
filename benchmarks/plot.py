"""Draws what bench_step.py and bench_conv.py measured: the sparse side as a share of dense.

python benchmarks/plot.py benchmarks/results/bench_step.csv -o benchmarks/results/bench_step.png
python benchmarks/plot.py benchmarks/results/bench_conv.csv    # bench_conv.png beside it

A line for each network or layer, with the backward and the whole (step, or both passes): median,
whiskers from the 20th to the 80th percentile, and a tick where the limit is. Left of 1 the sparse
side is faster. Each setting (device, dtype, memory format, drop rate, ...) has a panel of its own;
of what was measured several times in one, the last counts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rows import Row, Setting, read

from ssprop_patch.cli.options import Parser
from ssprop_patch.plots import style

_COLOURS = {"backward": style.SPARSE, "step": style.COLOURS[2], "both": style.COLOURS[2]}
_MARKERS = {"sparse": "o", "plan": "s"}
_LABELS = {"backward": "backward", "step": "whole step", "both": "both passes"}
_COLUMNS, _MOST = 3, 40  # panels side by side, lines in one
_LINE, _AROUND = 0.34, 1.2  # inches: a line, and what is above and below all lines
_LEGEND = 1.4  # lines
_LIMIT = {"marker": "|", "markersize": 9, "markeredgewidth": 1.8, "linestyle": "none"}


class Point(NamedTuple):
    """One side in one mode."""

    side: str
    mode: str


class Panel(NamedTuple):
    """What all that is in a panel has in common, in words."""

    kind: str
    device: str
    threads: str
    torch: str
    dtype: str
    memory_format: str
    rule: str
    options: str

    @classmethod
    def of(cls, setting: Setting, kind: str) -> Panel:
        """Return where rows of a setting belong."""
        return cls(
            kind,
            setting.device,
            f"threads: {setting.threads}",
            f"torch {setting.torch}",
            setting.dtype,
            setting.memory_format,
            f"drop rate {setting.drop_rate:g} by {setting.selection}",
            setting.options,
        )


Name = tuple[str, str]  # and shape
Lines = dict[Name, dict[Point, Row]]


def panels(rows: Sequence[Row]) -> dict[Panel, Lines]:
    """Return what each panel shows.

    Raises:
        ValueError: If no row is of a side that is drawn.
    """
    found: dict[Panel, Lines] = {}
    layers = {row.setting for row in rows if row.mode == "both"}
    for row in rows:
        if row.side in _MARKERS and row.mode in _COLOURS:
            panel = Panel.of(row.setting, "layers" if row.setting in layers else "networks")
            lines = found.setdefault(panel, {})
            lines.setdefault((row.name, row.shape), {})[Point(row.side, row.mode)] = row
    if not found:
        raise ValueError("there is no row of a sparse side to draw")
    return found


def draw(rows: Sequence[Row]) -> Figure:
    """Draw all rows, a panel for each setting.

    Raises:
        ValueError: If no row is of a side that is drawn.
    """
    shown = panels(rows)
    most = max(row.share_of_dense * row.p80_ms / row.p50_ms for row in _rows(shown))
    groups = list(_grouped(shown))
    heights = [_LINE * len(names) + _AROUND for names, _ in groups]
    columns = max(len(some) for _, some in groups)
    with style.context():
        figure = style.figure(0.4 + sum(heights))
        grid = figure.subplots(
            len(groups),
            columns,
            squeeze=False,
            sharex=True,
            sharey="row",
            height_ratios=heights,
        )
        for (names, some), line in zip(groups, grid, strict=True):
            for axes, panel in zip(line, some, strict=False):
                style.tidy(axes)
                axes.tick_params(labelbottom=True)
                _panel(axes, names, shown[panel])
                title = style.wrapped(_words(panel, shown), 2.2, style.TEXT)
                axes.set_title(title, fontsize=style.TEXT, loc="left")
            for axes in line[len(some) :]:
                axes.remove()
            points = {point for panel in some for each in shown[panel].values() for point in each}
            _legend(line[0], len(names), sorted(points))
        grid[0][0].set_xlim(0, 1.04 * max(most, 1))
        same = ", ".join(
            part for part, *others in zip(*shown, strict=True) if part and _alike(part, others)
        )
        figure.suptitle(style.wrapped(f"Times as a share of dense: {same}", style.WIDTH, 10))
    return figure


def _rows(shown: dict[Panel, Lines]) -> Iterator[Row]:
    for lines in shown.values():
        for line in lines.values():
            yield from line.values()


def _grouped(shown: dict[Panel, Lines]) -> Iterator[tuple[list[Name], list[Panel]]]:
    """Yield what stands side by side: the names of its lines, and its panels."""
    places: dict[tuple[str, ...], list[Panel]] = {}
    for panel in shown:
        places.setdefault(panel[:4], []).append(panel)
    for some in places.values():
        for at in range(0, len(some), _COLUMNS):
            beside = some[at : at + _COLUMNS]
            names = list(dict.fromkeys(name for panel in beside for name in shown[panel]))
            for first in range(0, len(names), _MOST):
                yield names[first : first + _MOST], beside


def _alike(part: str, others: Sequence[str]) -> bool:
    return all(other == part for other in others)


def _words(panel: Panel, shown: dict[Panel, Lines]) -> str:
    """Return what a panel does not share with all others."""
    parts = zip(panel, zip(*shown, strict=True), strict=True)
    return ", ".join(part for part, all_parts in parts if part and not _alike(part, all_parts))


def _panel(axes: Axes, names: Sequence[Name], lines: Lines) -> None:
    points = sorted({point for line in lines.values() for point in line})
    for at, name in enumerate(names):
        line = lines.get(name, {})
        for i, point in enumerate(points):
            if point in line:
                _mark(axes, line[point], at + 0.7 * ((i + 0.5) / len(points) - 0.5))
    axes.axvline(1.0, color=style.INK, linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(names)), [f"{name}\n{shape}" for name, shape in names])
    axes.set_xlabel("share of dense")
    axes.grid(visible=False, axis="y")


def _mark(axes: Axes, row: Row, y: float) -> None:
    share = row.share_of_dense
    low, high = (share * abs(p - row.p50_ms) / row.p50_ms for p in (row.p20_ms, row.p80_ms))
    colour = _COLOURS[row.mode]
    axes.errorbar(
        share,
        y,
        xerr=[[low], [high]],
        color=colour,
        marker=_MARKERS[row.side],
        markersize=4.5,
        capsize=2,
        linewidth=1,
        linestyle="none",
    )
    if row.limit is not None:
        axes.plot(row.limit, y, color=colour, **_LIMIT)


def _legend(axes: Axes, lines: int, points: Sequence[Point]) -> None:
    """Say what is what above the first line, where nothing is hidden; for a row of panels."""
    marks = [(_LABELS[m], _COLOURS[m], "o") for m in dict.fromkeys(p.mode for p in points)]
    if any(point.side == "plan" for point in points):
        marks.append(("of a plan", style.INK, "s"))
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=4.5, linestyle="none", label=label)
        for label, colour, marker in marks
    ]
    handles.append(Line2D([], [], color=style.INK, label="limit", **_LIMIT))
    axes.set_ylim(lines - 0.5, -0.5 - _LEGEND)  # the first on top
    axes.legend(
        handles=handles,
        loc="upper left",
        ncols=2,
        frameon=False,
        borderaxespad=0.2,
        handletextpad=0.1,
        columnspacing=0.8,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(description=__doc__)
    parser.add_argument("csv", type=Path, nargs="+", help="what the benchmarks wrote")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PICTURE",
        help="default: the name of the first CSV, with .png",
    )
    args = parser.parse_args(arguments)
    output = args.output or args.csv[0].with_suffix(".png")
    try:
        figure = draw([row for path in args.csv for row in read(path)])
        style.write(figure, output)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
