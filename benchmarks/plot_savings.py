"""Draws what a sparse step saves in each network: the picture at the top of the project's README.

python benchmarks/plot_savings.py    # benchmarks/results/savings.png

Bars: the times of the backward and of the whole step as shares of the same network's dense ones,
by the paper's rule (rows ``l1``), contiguous, not compiled; a panel for each device, and the
networks that were measured on all of them. Diamonds: the FLOPs of the whole step.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rows import Row, read

from ssprop_patch.cli.options import Parser
from ssprop_patch.plots import style

_RESULTS = Path(__file__).parent / "results"
_MODES = {"backward": (style.SPARSE, "backward"), "step": (style.COLOURS[2], "whole step")}
_BAR = 0.36  # of the distance from network to network
_ROOM = 0.9  # such distances, for a legend of one line; for one of three lines twice that


def draw(rows: Sequence[Row], flops: dict[str, float]) -> Figure:
    """Draw the rows of the rule ``l1``.

    Args:
        rows: Of a comparison of rules.
        flops: What share of its dense FLOPs a network's step has.

    Raises:
        ValueError: If there is no such row.
    """
    shares = {
        (r.device, r.name, r.mode): r.share_of_dense
        for r in rows
        if r.side == "l1" and r.mode in _MODES
    }
    rate = {r.drop_rate for r in rows}
    if not shares or len(rate) > 1:
        raise ValueError("rows of one drop rate with the side l1 are needed")
    devices = list(dict.fromkeys(device for device, _, _ in shares))
    everywhere = [{name for device, name, _ in shares if device == d} for d in devices]
    names = sorted(  # what saves most on top
        set.intersection(*everywhere),
        key=lambda name: max(shares[d, name, "step"] for d in devices),
    )
    in_a_line = len(devices) < 3
    room = _ROOM if in_a_line else 2 * _ROOM
    height = 1.2 + 0.42 * len(names) + 0.42 * (room - _ROOM)
    with style.panels(None, len(devices), height, sharex=True, sharey=True) as (figure, panels):
        for axes, device in zip(panels, devices, strict=True):
            for i, (mode, (colour, label)) in enumerate(_MODES.items()):
                bars = [shares[device, name, mode] for name in names]
                _bars(axes, bars, (i - 0.5) * _BAR, colour, label)
            _marks(axes, [flops[name] for name in names], 0.5 * _BAR)
            axes.vlines(1, -0.5, len(names), color=style.INK, linewidth=0.8, linestyle="--")
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
            axes.set_xlabel("share of dense")
            axes.set_title(device.replace("(R)", "").replace(" Processor", ""), loc="left")
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.5, -0.5 - room)
        panels[0].set_xlim(0, 1.05 * max(1, *shares.values()))
        handles, labels = panels[0].get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: labels[i] == "its FLOPs")
        panels[0].legend(
            [handles[i] for i in order],
            [labels[i] for i in order],
            loc="upper left",
            ncols=3 if in_a_line else 1,
            frameon=False,
            borderaxespad=0.2,
            handlelength=1.2,
        )
        figure.suptitle(
            f"What a training step takes at drop rate {rate.pop():g}, as a share of the dense step"
        )
    return figure


def _bars(axes: Axes, shares: Sequence[float], shift: float, colour: str, label: str) -> None:
    places = [at + shift for at in range(len(shares))]
    axes.barh(places, shares, _BAR, color=colour, label=label)
    for share, y in zip(shares, places, strict=True):
        # At its beginning: at its end the marks of FLOPs would be in the way.
        axes.annotate(
            f"{share:.2f}",
            (0, y),
            (4, 0),
            textcoords="offset points",
            va="center_baseline",
            fontsize=style.TEXT,
            weight="bold",
            color="white",
        )


def _marks(axes: Axes, flops: Sequence[float], shift: float) -> None:
    axes.plot(
        flops,
        [at + shift for at in range(len(flops))],
        color="white",
        marker="D",
        markersize=4.5,
        markeredgecolor=style.INK,
        linestyle="none",
        label="its FLOPs",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--times", type=Path, default=_RESULTS / "bench_step_rules.csv", metavar="CSV")
    add("--flops", type=Path, default=_RESULTS / "step_flops.csv", metavar="CSV")
    add("-o", "--output", type=Path, default=_RESULTS / "savings.png", metavar="PICTURE")
    args = parser.parse_args(arguments)
    try:
        with args.flops.open(newline="", encoding="utf-8") as file:
            flops = {r["network"]: float(r["step_share"]) for r in csv.DictReader(file)}
        style.write(draw(read(args.times), flops), args.output)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
