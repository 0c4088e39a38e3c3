"""How all pictures of this package, and of its benchmarks, look.

A picture is as wide as the column of a README, its letters are readable there, and its background
is opaque, so that a dark page does not swallow them. The style is the picture's own, whatever
``matplotlib.rcParams`` say; nothing of theirs is changed.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "DENSE",
    "DPI",
    "INK",
    "MARKERS",
    "SPARSE",
    "TEXT",
    "WIDTH",
    "context",
    "figure",
    "legend_room",
    "look",
    "panels",
    "shown_range",
    "tidy",
    "unit",
    "wrapped",
    "write",
]

WIDTH = 8.3  # inches: 880 pixels of a README show a point as 1.5 pixels
DPI = 150
TEXT = 8.0  # points of the smallest letters: 12 pixels there
INK, _LINES = "#333333", "#8A8A8A"
#: Told apart by eyes that see few colours (after Okabe and Ito), and in grey by the markers.
COLOURS = (
    "#555555",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7B3294",
    "#9A9A9A",
)
MARKERS = "os^DvPXhp"
DENSE, SPARSE = COLOURS[:2]
_LEGEND = 0.3  # inches: a legend of one line
_EM = 0.6  # of the letters' size: the width of most of them


def look(i: int) -> tuple[str, str]:
    """Return the colour and the marker of the i-th of some methods; dense ones come first."""
    return COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]


@contextmanager
def context() -> Iterator[None]:
    """Draw in this style inside of the ``with`` block.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            'pictures need matplotlib: pip install "ssprop_patch[plot]"', name="matplotlib"
        ) from error
    ours = {
        "text.color": INK,
        "axes.edgecolor": _LINES,
        "axes.facecolor": "white",
        "axes.grid": False,
        "axes.labelcolor": INK,
        "axes.labelsize": 9,
        "axes.linewidth": 0.8,
        "axes.titlecolor": INK,
        "axes.titlesize": 9,
        "axes.titleweight": "normal",
        "figure.titlesize": 10,
        "figure.titleweight": "normal",
        "font.size": 9,
        "legend.edgecolor": "#CCCCCC",
        "legend.facecolor": "white",
        "legend.fontsize": TEXT,
        "legend.framealpha": 0.9,
        "legend.labelcolor": INK,
    }
    with matplotlib.rc_context(ours):
        yield


def figure(height: float) -> Figure:
    """Return an empty picture of ``WIDTH`` x ``height`` inches that a notebook shows.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    with context():
        from .._picture import Picture

        return Picture(
            figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white", edgecolor="w"
        )


def tidy(axes: Axes) -> None:
    """Give axes of a picture of :func:`figure` their grid and ticks.

    Said once for all, as matplotlib makes ticks when it draws, with the rcParams of that moment.
    """
    axes.tick_params(which="both", color=_LINES, labelcolor=INK, labelsize=TEXT)
    axes.grid(color="#B0B0B0", alpha=0.35, linewidth=0.8, linestyle="-")
    axes.set_axisbelow(True)


@contextmanager
def panels(
    ax: Axes | Sequence[Axes] | None,
    count: int,
    height: float,
    *,
    columns: int | None = None,
    **options: Any,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Draw into new panels of one width in this style, or into those of ``ax`` in theirs.

    Args:
        ax: What a caller gave: axes, or several of them in a sequence or an array.
        count: How many panels are needed.
        height: Inches of a new picture.
        columns: Of new panels. Default: ``count``.
        **options: For ``Figure.subplots``.

    Yields:
        The figure, and its ``count`` panels, row by row.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are more or fewer axes in ``ax``.
    """
    if ax is not None:
        given = list(getattr(ax, "flat", [ax] if hasattr(ax, "plot") else ax))
        if len(given) != count:
            raise ValueError(f"ax= has {len(given)} axes, and {count} panels are to be drawn")
        yield given[0].figure, given
        return
    with context():
        picture = figure(height)
        columns = columns or count
        grid = picture.subplots(-(-count // columns), columns, squeeze=False, **options)
        for axes in grid.flat[:count]:
            tidy(axes)
        for axes in grid.flat[count:]:
            axes.remove()
        yield picture, list(grid.flat[:count])


def inches(axes: Axes) -> tuple[float, float]:
    """Return the width and the height of axes, before a layout has changed them."""
    box = axes.get_window_extent()
    return box.width / axes.figure.dpi, box.height / axes.figure.dpi


def legend_room(axes: Axes, length: float) -> float:
    """Return how much longer an axis of ``length`` has to be for a legend of one line above all."""
    return length * _LEGEND / max(inches(axes)[1] - _LEGEND, _LEGEND)


def wrapped(text: str, width: float = WIDTH, size: float = 9, lines: int = 3) -> str:
    """Break text into lines that fit.

    Args:
        text: May have lines already.
        width: Inches that there are.
        size: Points of the letters.
        lines: At most so many of each line of ``text``; what is left out is an ellipsis.
    """
    letters = max(8, int(72 * width / (_EM * size)))
    return "\n".join(
        textwrap.fill(line, letters, max_lines=lines, placeholder=" …")
        for line in text.splitlines()
    )


def unit(largest: float, of: str = "FLOP") -> tuple[float, str]:
    """Return a unit that suits ``largest``, as (its size, its name).

    One to three digits stand before the point of FLOPs; seconds stay seconds up to 10 000 and are
    hours then, joules stay joules up to 10 000.
    """
    if of == "s":
        return (3600.0, "h") if largest >= 1e4 else (1.0, "s")
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= (size if of == "FLOP" else 10 * size):
            return size, f"{prefix}{of}"
    return 1.0, of


def shown_range(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return what to show of accuracies in percent: where curves end up, not where they start."""
    later = sorted(value for curve in curves for value in curve[len(curve) // 4 :])
    low, high = later[len(later) // 20], max(value for curve in curves for value in curve)
    room = max(0.5, 0.08 * (high - low))
    return max(0.0, low - room), min(100.0 + 0.2 * room, high + room)


def write(picture: Figure, path: str | os.PathLike[str]) -> None:
    """Write a picture as the end of its name says, ``.png`` without one; whole or not at all.

    Raises:
        OSError: If it cannot be written.
        ValueError: If there is no such format.
    """
    path = Path(path)
    with replacing(path) as beside:
        picture.savefig(beside, format=path.suffix[1:] or "png")
