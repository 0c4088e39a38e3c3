"""The picture of where the FLOPs of a backward are, and what is left of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .._text import counted, percent
from .._validate import check_count
from ..flops.summary import Summary
from ..metering import MeterReport
from . import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROWS = 40
_ROW = 0.2  # inches
_LETTERS = 36  # of a name
_BEYOND = 0.6  # inches for what is written at the end of the longest bar
_PALE = "#C9CED6"


class _Row(NamedTuple):
    name: str
    dense: float
    sparse: float

    @property
    def change(self) -> str:
        """By how much the bar is shorter, or longer."""
        if self.dense == self.sparse:
            return "0 %"
        return f"{100 * (self.sparse / self.dense - 1):+.0f} %".replace("-", "\N{MINUS SIGN}")


def flops_per_layer(
    summary: Summary | MeterReport, *, top: int | None = None, ax: Axes | None = None
) -> Figure:
    """Draw the backward FLOPs of each layer, dense and sparse, and what share is saved in all.

    The last bar is everything else that the network computes, which is dense.

    Args:
        summary: Of :func:`ssprop_patch.summary`, for one training step; or the report of a
            :class:`ssprop_patch.Meter`, for all that ran.
        top: How many bars there may be. Of more layers those with the most FLOPs have a bar, in
            the network's order, and the others have one together. Default: 40, or what ``ax`` has
            room for.
        ax: Where to draw. Default: a new figure.

    Returns:
        The new figure, or that of ``ax``.

    Raises:
        TypeError, ValueError: If an argument is not as described.
    """
    if isinstance(summary, Summary):
        rows = [_Row(r.name, r.dense_backward, r.sparse_backward) for r in summary.layers]
        what, title = "backward FLOPs of one training step", summary.rate
    elif isinstance(summary, MeterReport):
        rows = [
            _Row(r.name, r.totals.dense_backward_flops, r.totals.backward_flops)
            for r in summary.layers
        ]
        what, title = "backward FLOPs of the run", counted(summary.steps, "optimizer step")
    else:
        raise TypeError(f"expected a Summary or a MeterReport, got {type(summary).__name__}")
    others = summary.others.dense_backward if summary.others is not None else 0
    if top is None:
        top = _ROWS if ax is None else min(_ROWS, max(3, int(style.inches(ax)[1] / _ROW) - 2))
    rows = _largest(rows, check_count(top, "top", 2 + bool(others)) - bool(others))
    if others:
        rows.append(_Row("everything else", others, others))
    if summary.others is None:
        saved = "saved of the whole backward: not known"
    else:
        saved = f"{percent(summary.backward_saved or 0.0)} of the whole backward saved"
    with style.panels(ax, 1, 1.2 + _ROW * len(rows)) as (figure, (axes,)):
        _bars(axes, rows, what)
        width = style.inches(axes)[0] * (1 if ax is not None else 0.85)  # less, with long names
        axes.set_title(style.wrapped(f"{saved}\n{title}", width, lines=2), loc="left")
    return figure


def _largest(rows: Sequence[_Row], most: int) -> list[_Row]:
    """Return ``most`` rows: those of the layers with the most FLOPs, and one for the others."""
    if len(rows) <= most:
        return list(rows)
    order = sorted(range(len(rows)), key=lambda i: (-rows[i].dense, i))
    shown, left = sorted(order[: most - 1]), order[most - 1 :]
    together = _Row(
        f"… and {len(left)} more layers",
        sum(rows[i].dense for i in left),
        sum(rows[i].sparse for i in left),
    )
    return [*(rows[i] for i in shown), together]


def _bars(axes: Any, rows: Sequence[_Row], what: str) -> None:
    longest = max(max(row.dense, row.sparse) for row in rows)
    size, name = style.unit(longest)
    at = range(len(rows))
    axes.barh(at, [row.dense / size for row in rows], 0.8, color=_PALE, label="dense")
    axes.barh(at, [row.sparse / size for row in rows], 0.8, color=style.SPARSE, label="sparse")
    for i, row in enumerate(rows):
        axes.annotate(
            row.change,
            (max(row.dense, row.sparse) / size, i),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=style.TEXT,
        )
    axes.set_yticks(at, [_short(row.name) for row in rows], fontsize=style.TEXT)
    # The first layer on top, and above it room for the legend: the bars leave none that is sure.
    axes.set_ylim(len(rows) - 0.4, -0.6 - style.legend_room(axes, len(rows)))
    width = style.inches(axes)[0]
    axes.set_xlim(0, longest / size * width / max(width - _BEYOND, _BEYOND) or 1)
    axes.set_xlabel(f"{what} ({name})")
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper right", ncols=2, frameon=False, borderaxespad=0)


def _short(name: str) -> str:
    if len(name) > _LETTERS:
        return f"…{name[1 - _LETTERS :]}"
    return name or "(model)"
