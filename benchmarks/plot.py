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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display is looked for
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rows import Row, Setting, read

from ssprop_patch._files import replacing
from ssprop_patch.cli.options import Parser

# Told apart by eyes that see few colours (Okabe and Ito); the sides by their markers, in grey too.
_COLOURS = {"backward": "#0072B2", "step": "#D55E00", "both": "#D55E00"}
_MARKERS = {"sparse": "o", "plan": "s"}
_LABELS = {"backward": "backward", "step": "whole step", "both": "forward and backward"}
_WIDTH, _LINE, _AROUND = 9.5, 0.42, 1.2  # inches: the picture, a line of it, a panel's title, axis


class Point(NamedTuple):
    """One side in one mode."""

    side: str
    mode: str


Lines = dict[tuple[str, str], dict[Point, Row]]  # by name and shape


def panels(rows: Sequence[Row]) -> dict[str, Lines]:
    """Return what each panel shows, by its title.

    Raises:
        ValueError: If no row is of a side that is drawn.
    """
    found: dict[str, Lines] = {}
    layers = {row.setting for row in rows if row.mode == "both"}
    for row in rows:
        if row.side in _MARKERS and row.mode in _COLOURS:
            kind = "single layers" if row.setting in layers else "networks"
            lines = found.setdefault(f"{kind}; {_title(row)}", {})
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
    heights = [_LINE * len(lines) + _AROUND for lines in shown.values()]
    figure = Figure(figsize=(_WIDTH, sum(heights)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(shown), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, lines) in zip(all_axes, shown.items(), strict=True):
        axes.set_title(title, fontsize=9)
        _panel(axes, lines)
    return figure


def _title(setting: Setting) -> str:
    machine = (setting.device, f"threads: {setting.threads}", f"torch {setting.torch}")
    how = (
        setting.dtype,
        setting.memory_format,
        f"drop rate {setting.drop_rate:g} by {setting.selection}",
        setting.options,
    )
    return ", ".join(machine) + "\n" + ", ".join(filter(None, how))


def _panel(axes: Axes, lines: Lines) -> None:
    points = sorted({point for line in lines.values() for point in line})
    for at, line in enumerate(lines.values()):
        for i, point in enumerate(points):
            if point in line:
                _mark(axes, line[point], at + 0.6 * ((i + 0.5) / len(points) - 0.5))
    axes.axvline(1.0, color="#444444", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(lines)), [f"{name}\n{shape}" for name, shape in lines], fontsize=7)
    axes.set_ylim(len(lines) - 0.5, -0.5)  # the first on top
    axes.set_xlim(left=0)
    axes.set_xlabel("share of dense")
    axes.grid(axis="x", alpha=0.25)
    # Beside the panel: inside, it would hide a limit or a median.
    axes.legend(handles=_legend(points), fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


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
        axes.plot(row.limit, y, color=colour, marker="|", markersize=9, markeredgewidth=1.8)


def _legend(points: Sequence[Point]) -> list[Line2D]:
    sides: Mapping[str, str] = {"sparse": "", "plan": ", layers of a plan"}
    handles = [
        Line2D(
            [],
            [],
            color=_COLOURS[p.mode],
            marker=_MARKERS[p.side],
            markersize=4.5,
            linestyle="none",
            label=_LABELS[p.mode] + sides[p.side],
        )
        for p in points
    ]
    return [
        *handles,
        Line2D(
            [],
            [],
            color="#444444",
            marker="|",
            markersize=9,
            markeredgewidth=1.8,
            linestyle="none",
            label="limit",
        ),
    ]


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
        with replacing(output) as beside:
            figure.savefig(beside, format=output.suffix[1:] or "png")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
