"""What bench_growth.py measures, and its picture: a panel for each thing that is varied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display is looked for
from matplotlib.figure import Figure
from networks import Network
from rows import Row

from ssprop_patch._text import sizes

#: NAME:BATCH:PIXELS by what is varied; the first ones share their middle, which is measured once.
PANELS: dict[str, tuple[str, ...]] = {
    "batch": tuple(f"resnet50:{n}:112" for n in (1, 2, 4, 8, 16, 32)),
    "resolution": tuple(f"resnet50:8:{n}" for n in (64, 96, 112, 160, 224)),
    "network": tuple(
        f"{name}:8:112" for name in ("resnet18", "resnet50", "resnet101", "wide_resnet50_2")
    ),
    "small network, batch": tuple(f"resnet18:{n}:64" for n in (1, 2, 4, 8, 16, 32)),
    "3-D, resolution": tuple(f"unet3d_16:1:{n}" for n in (16, 32, 48, 64)),
    "3-D, width": tuple(f"unet3d_{n}:1:32" for n in (8, 16, 32)),
}
_VARIED = {"batch": "batch", "resolution": "pixels", "width": "width", "network": "name"}
# Told apart by eyes that see few colours (Okabe and Ito), and in grey by their markers.
_STYLES: dict[str, Any] = {
    "backward": {"color": "#0072B2", "marker": "o"},
    "step": {"color": "#D55E00", "marker": "s"},
    "limit": {"color": "#444444", "marker": "_", "linestyle": "none", "markersize": 9},
}
_LABELS = {
    "backward": "backward",
    "step": "whole step",
    "limit": "what FLOPs leave of the backward",
}


def _points(rows: Sequence[Row], panel: str) -> tuple[list[str], list[dict[str, Row]]]:
    """Return the ticks of a panel, and the sparse rows of each by mode, as far as there are any."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:  # of what was measured several times, the last counts
        if row.side == "sparse":
            found.setdefault((row.name, row.shape), {})[row.mode] = row
    varied = _VARIED[panel.rpartition(" ")[2]]
    ticks, points = [], []
    for text in PANELS[panel]:
        network = Network.parse(text)
        if (at := (network.name, sizes(network.shape))) in found:
            ticks.append(str(getattr(network, varied)).replace("resnet", "resnet\n"))
            points.append(found[at])
    return ticks, points


def draw(rows: Sequence[Row]) -> Figure:
    """Draw a panel for each thing that was varied.

    Raises:
        ValueError: If the rows are of none of :data:`PANELS`.
    """
    shown = {panel: _points(rows, panel) for panel in PANELS}
    shown = {panel: found for panel, found in shown.items() if found[0]}
    if not shown:
        raise ValueError("there is no row of a network that this draws")
    lines = -(-len(shown) // 3)
    figure = Figure(figsize=(8.3, 0.9 + 2.3 * lines), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(lines, min(3, len(shown)), squeeze=False, sharey=True)
    for axes in all_axes.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, (panel, (ticks, points)) in zip(all_axes.flat, shown.items(), strict=False):
        _panel(axes, ticks, points)
        axes.set_title(_title(panel), fontsize=9)
    for axes in all_axes[:, 0]:
        axes.set_ylabel("share of dense")
        axes.set_ylim(bottom=0)
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    first = rows[0]
    figure.suptitle(
        f"{first.device}, {first.threads} threads, drop rate {first.drop_rate:g}", fontsize=9
    )
    return figure


def _title(panel: str) -> str:
    fixed, varied = Network.parse(PANELS[panel][0]), _VARIED[panel.rpartition(" ")[2]]
    words = {
        "name": fixed.name,
        "batch": f"batch {fixed.batch}",
        "pixels": f"{fixed.pixels}³" if fixed.width else f"{fixed.pixels}²",
    }
    words.pop("name" if varied == "width" else varied)
    return f"{panel}\n{', '.join(words.values())}"


def _panel(axes: Any, ticks: Sequence[str], points: Sequence[dict[str, Row]]) -> None:
    x = range(len(points))
    for mode in ("backward", "step"):
        rows = [point[mode] for point in points]
        shares = [row.share_of_dense for row in rows]
        around = [
            [
                share * abs(edge - row.p50_ms) / row.p50_ms
                for share, row, edge in zip(shares, rows, edges, strict=True)
            ]
            for edges in ([r.p20_ms for r in rows], [r.p80_ms for r in rows])
        ]
        style = {**_STYLES[mode], "markersize": 4, "linewidth": 1.2, "capsize": 2}
        axes.errorbar(x, shares, yerr=around, label=_LABELS[mode], **style)
    limits = [point["backward"].limit for point in points]
    axes.plot(x, limits, label=_LABELS["limit"], **_STYLES["limit"])
    axes.axhline(1.0, color="#444444", linewidth=0.8, zorder=0)
    axes.set_xticks(x, ticks, fontsize=7)
    axes.grid(axis="y", alpha=0.25)
