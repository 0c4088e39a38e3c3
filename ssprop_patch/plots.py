"""Pictures of a schedule, of FLOPs, of runs, and of which channels are kept.

Each function returns a ``matplotlib.figure.Figure``, made for the width of a README: a notebook
shows it, ``figure.savefig("x.png")`` and ``"x.svg"`` write it. matplotlib comes with
``pip install "ssprop_patch[plot]"``; pyplot, and so the state of a notebook, is left alone.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from ._text import counted, percent
from ._validate import check_count
from .flops.summary import Summary
from .metering import ChannelHistory, MeterReport
from .schedule.schedules import Schedule, as_schedule

__all__ = ["accuracy", "channels", "flops_per_layer", "schedule"]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 8.3  # inches, at 100 dots each
# Told apart by eyes that see few colours (Okabe and Ito), and in grey by their markers.
_COLOURS = ("#444444", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "os^DvPX"
_DENSE, _SPARSE = "#C9CED6", "#0072B2"


def schedule(
    schedule: Schedule | float | Callable[[int], float],
    epochs: int,
    steps_per_epoch: int | None = None,
) -> Figure:
    """Draw the drop rate over a training.

    Args:
        schedule: What :func:`ssprop_patch.convert` takes.
        epochs: How long the training is.
        steps_per_epoch: For a schedule that counts optimizer steps.

    Raises:
        TypeError, ValueError: If an argument is not as described.
    """
    plan = as_schedule(schedule)
    total, per_epoch = check_count(epochs, "epochs", 1), 1
    if plan.interval == "step":
        if steps_per_epoch is None:
            raise ValueError(f"give steps_per_epoch=...: {plan!r} counts optimizer steps")
        per_epoch = check_count(steps_per_epoch, "steps_per_epoch", 1)
        total *= per_epoch
    rates = [plan(t) for t in range(total)]
    figure = _figure(2.6)
    axes = figure.subplots()
    edges = [t / per_epoch for t in range(total + 1)]
    axes.stairs(rates, edges, fill=True, color=_SPARSE, alpha=0.25)
    axes.stairs(rates, edges, color=_SPARSE, linewidth=1.5, baseline=None)
    axes.axhline(fmean(rates), color="#444444", linestyle="--", linewidth=1)
    axes.annotate(
        f"mean {fmean(rates):.2f}",
        (1, fmean(rates)),
        (4, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        color="#444444",
        annotation_clip=False,
    )
    axes.set(xlim=(0, edges[-1]), ylim=(0, 1), xlabel="epoch", ylabel="drop rate")
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # of MaxNLocator
    axes.grid(alpha=0.25)
    axes.set_title(_shortened(repr(plan)))
    return figure


def flops_per_layer(summary: Summary | MeterReport) -> Figure:
    """Draw the backward FLOPs of each layer, dense and sparse, and what share is saved in all.

    The last bar is everything else that the network computes, which is dense.

    Args:
        summary: Of :func:`ssprop_patch.summary`, for one training step; or the report of a
            :class:`ssprop_patch.Meter`, for all that ran.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(summary, Summary):
        rows = [(r.name, r.dense_backward, r.sparse_backward, r.saved) for r in summary.layers]
        what, title = "backward FLOPs of one training step", summary.rate
    elif isinstance(summary, MeterReport):
        rows = [
            (r.name, r.totals.dense_backward_flops, r.totals.backward_flops, r.saved)
            for r in summary.layers
        ]
        what, title = (
            "backward FLOPs of the run",
            f"after {counted(summary.steps, 'optimizer step')}",
        )
    else:
        raise TypeError(f"expected a Summary or a MeterReport, got {type(summary).__name__}")
    if summary.others is not None and summary.others.dense_backward:
        rest = summary.others.dense_backward
        rows.append(("everything else", rest, rest, 0.0))
    longest = max(dense for _, dense, _, _ in rows)
    unit, prefix = _unit(longest)
    figure = _figure(1.3 + 0.19 * len(rows))
    axes = figure.subplots()
    at = range(len(rows))
    axes.barh(at, [r[1] / unit for r in rows], 0.8, color=_DENSE, label="dense")
    axes.barh(at, [r[2] / unit for r in rows], 0.8, color=_SPARSE, label="sparse")
    for i, (_, dense, sparse, saved) in enumerate(rows):
        text = f"{-100 * saved:+.0f} %".replace("-", "\N{MINUS SIGN}") if dense != sparse else "0 %"
        axes.annotate(
            text,
            (max(dense, sparse) / unit, i),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="#444444",
        )
    axes.set_yticks(at, [name or "(model)" for name, *_ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first layer on top
    axes.set_xlim(0, 1.08 * longest / unit or 1)
    axes.set_xlabel(f"{what} ({prefix}FLOP)")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if summary.others is None:
        share = "saved of the whole backward: not known"
    else:
        share = f"{percent(summary.backward_saved or 0.0)} of the whole backward saved"
    figure.suptitle(f"{_shortened(title)}: {share}", fontsize=11)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False
    )
    return figure


_COSTS = {
    "flops": ("forward and backward", "FLOP"),
    "seconds": ("training", "s"),
    "joules": ("energy", "J"),
}


def accuracy(
    runs: Iterable[Mapping[str, Any]] | str | os.PathLike,
    *,
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """Draw accuracy against FLOPs, seconds and joules, as far as the runs tell.

    Args:
        runs: Rows, or a CSV file of them: ``method`` (runs of one method are drawn alike),
            ``accuracy`` (0 to 1), and what it took until then: ``flops``, ``seconds``, ``joules``,
            one at least. Rows of one ``method`` and ``seed`` are one run's, in order, such as one
            an epoch; of several seeds the mean is drawn.
        labels: Names to show for methods.

    Raises:
        ValueError: If there are no rows, or a column is missing or no number.
    """
    if isinstance(runs, (str, os.PathLike)):
        with Path(runs).open(newline="", encoding="utf-8") as file:
            runs = list(csv.DictReader(file))
    rows = list(runs)
    costs = [cost for cost in _COSTS if rows and all(_given(row.get(cost)) for row in rows)]
    if not costs or not all(_given(row.get(c)) for row in rows for c in ("method", "accuracy")):
        raise ValueError(
            "rows must have method, accuracy, and flops, seconds or joules, in every row"
        )
    curves: dict[str, dict[Any, list[dict[str, float]]]] = {}
    for row in rows:
        point = {name: _number(row, name) for name in ("accuracy", *costs)}
        if not 0 <= point["accuracy"] <= 1:
            raise ValueError(f"accuracy must be in [0, 1], got {row['accuracy']!r}")
        curves.setdefault(str(row["method"]), {}).setdefault(row.get("seed"), []).append(point)

    figure = _figure(3.9 if len(costs) > 1 else 4.6)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, cost in zip(panels, costs, strict=True):
        what, name = _COSTS[cost]
        unit, prefix = _unit(max(_number(row, cost) for row in rows), cost != "flops")
        for i, (method, seeds) in enumerate(curves.items()):
            points = [[(p[cost] / unit, 100 * p["accuracy"]) for p in s] for s in seeds.values()]
            _runs(axes, points, i, (labels or {}).get(method, method))
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{what} so far ({prefix}{name})")
        axes.grid(alpha=0.25)
    panels[0].set_ylim(
        *_range(
            [
                100 * p["accuracy"]
                for s in curves.values()
                for run in s.values()
                for p in run[len(run) // 4 :]
            ]
        )
    )
    panels[0].set_ylabel("test accuracy (%)")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(curves),
        frameon=False,
    )
    most = max(len(s) for s in curves.values())
    if most > 1:
        figure.supxlabel(
            f"mean of {most} seeds; bars: sample standard deviation; thin lines: single seeds",
            fontsize=8,
            color="#444444",
        )
    return figure


def _runs(axes: Any, runs: Sequence[Sequence[tuple[float, float]]], i: int, label: str) -> None:
    colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
    for run in runs if len(runs) > 1 else ():
        axes.plot(*zip(*run, strict=True), color=colour, alpha=0.2, linewidth=0.8)
    whole = zip(*(run for run in runs if len(run) == max(map(len, runs))), strict=True)
    mean = [tuple(map(fmean, zip(*points, strict=True))) for points in whole]
    axes.plot(*zip(*mean, strict=True), color=colour, linewidth=1.5)
    ends = list(zip(*(run[-1] for run in runs), strict=True))
    spread = dict(zip(("xerr", "yerr"), map(stdev, ends), strict=True)) if len(runs) > 1 else {}
    axes.errorbar(
        *map(fmean, ends),
        **spread,
        color=colour,
        marker=marker,
        markersize=7,
        capsize=3,
        linestyle="none",
        label=label,
        zorder=3,
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return what to show of the accuracy: where the runs end up, not where they start."""
    low, high = sorted(values)[len(values) // 20], max(values)
    room = max(0.5, 0.08 * (high - low))
    return max(0.0, low - room), min(100.0 + 0.2 * room, high + room)


def channels(history: ChannelHistory, layers: Sequence[str] | None = None) -> Figure:
    """Draw which channels each layer keeps over time, and say whether it is always the same ones.

    A column is a window, a row a channel, the most often kept ones on top; windows without a
    sparse backward are grey. Where all rows are equally dark the channels take turns; where the
    upper ones are dark and the lower ones light the same ones always win. Numbers in the titles:
    see :class:`ssprop_patch.metering.Winners`.

    Args:
        history: Of ``ssprop_patch.Meter(model, channels_every=...)``.
        layers: Names of the layers to draw. Default: twelve at most, evenly from the first to the
            last.

    Raises:
        ValueError: If a layer is not in the history, or nothing is.
    """
    shares = history.shares(sparse_only=True)
    winners = history.winners()
    if not shares:
        raise ValueError(
            "no window is complete yet, or no channel was dropped in any: train longer, or give "
            "Meter(channels_every=...) fewer steps"
        )
    for name in layers or ():
        if name not in shares:
            raise ValueError(f"no layer {name!r} in the history; there are {', '.join(shares)}")
    names = list(layers or _evenly(list(shares), 12))
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = _figure(1.2 + 1.8 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    colours = _colour_map()
    image: Any = None
    for name, axes in zip(names, grid.flat, strict=False):
        share, found = shares[name], winners[name]
        order = share.nanmean(0).argsort(descending=True)
        end = len(share) * history.every
        image = axes.imshow(
            share[:, order].t().numpy(),
            cmap=colours,
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
            extent=(0, end, found.channels, 0),
        )
        axes.set_title(
            f"{name}\nthe same {found.kept} of {found.channels}: {100 * found.top_share:.0f} %"
            + (f"; never trained: {100 * found.never:.0f} %" if found.never else ""),
            fontsize=8,
        )
        axes.tick_params(labelsize=7)
        axes.locator_params(axis="x", nbins=4, integer=True)
        axes.locator_params(axis="y", nbins=4, integer=True)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=grid, aspect=12 * rows, pad=0.01)
    bar.set_label("share of sparse backwards", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.supxlabel("optimizer step (grey: dense)", fontsize=9)
    figure.supylabel("channels, most often kept on top", fontsize=9)
    in_turn = fmean(winners[name].kept / winners[name].channels for name in names)
    some = f"{len(names)} of {len(shares)}" if len(names) < len(shares) else "all"
    figure.suptitle(
        f"How often each channel was kept ({some} layers). "
        f"100 %: always the same ones; about {100 * in_turn:.0f} %: all take turns",
        fontsize=9,
    )
    return figure


def _evenly(names: Sequence[str], most: int) -> list[str]:
    if len(names) <= most:
        return list(names)
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


# --- what all share -------------------------------------------------------------------------------


def _figure(height: float) -> Figure:
    try:
        import matplotlib.figure  # noqa: F401

        from ._picture import Picture
    except ImportError as error:
        raise ImportError(
            'pictures need matplotlib: pip install "ssprop_patch[plot]"', name="matplotlib"
        ) from error
    return Picture(figsize=(_WIDTH, height), dpi=100, layout="constrained", facecolor="white")


def _colour_map() -> Any:
    import matplotlib

    return matplotlib.colormaps["Blues"].with_extremes(bad="#DDDDDD")


def _unit(largest: float, small: bool = False) -> tuple[float, str]:
    """Return a unit in which ``largest`` has one to three digits before the point."""
    for unit, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= unit and not (small and unit > 1e3):
            return (1.0, "") if small and largest < 1e4 else (unit, prefix)
    return 1.0, ""


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


def _shortened(text: str, most: int = 90) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
