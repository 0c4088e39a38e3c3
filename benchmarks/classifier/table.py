"""The table that is printed at the end."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from classifier.options import METHODS

Row = dict[str, Any]


def build(rows: Sequence[Row]) -> Table:
    """Return the table of finished runs: a row a method, and each method's ratio to dense."""
    first = rows[0]
    by_method = {m: [r for r in rows if r["method"] == m] for m in METHODS}
    by_method = {m: runs for m, runs in by_method.items() if runs}
    flop, flop_unit = _unit(max(r["total_flops"] for r in rows), 1e12, "TFLOP", 1e9, "GFLOP")
    second, second_unit = _unit(max(r["step_s"] for r in rows) / 10, 1.0, "s", 1e-3, "ms")
    columns: list[tuple[str, Callable[[Row], float], str]] = [
        ("accuracy\n%", lambda r: 100 * r["accuracy"], ".2f"),
        (f"backward\n{flop_unit}", lambda r: r["backward_flops"] / flop, ".4g"),
        (f"total\n{flop_unit}", lambda r: r["total_flops"] / flop, ".4g"),
        (f"forward\n{second_unit}/step", lambda r: r["forward_s"] / second, ".1f"),
        (f"backward\n{second_unit}/step", lambda r: r["backward_s"] / second, ".1f"),
        (f"step\n{second_unit}/step", lambda r: r["step_s"] / second, ".1f"),
        ("training\ns", lambda r: r["train_s"], ".1f"),
    ]
    table = Table(title=_title(first), caption=_caption(rows), caption_justify="left")
    table.add_column("method", no_wrap=True)
    table.add_column("epochs", justify="right")
    for name, _, _ in columns:
        table.add_column(name, justify="right")
    for method, runs in by_method.items():
        cells = [spread([value(r) for r in runs], form) for _, value, form in columns]
        table.add_row(METHODS[method].label, f"{runs[0]['epochs']:.4g}", *cells)
    dense = {r["seed"]: r for r in by_method.get("dense", [])}
    others = {m: runs for m, runs in by_method.items() if m != "dense"}
    if dense and others:
        table.add_section()
    for method, runs in others.items():
        pairs = [(r, dense[r["seed"]]) for r in runs if r["seed"] in dense]
        if not pairs:
            continue
        # Seed by seed, so that what both runs of a pair share does not count as spread.
        gain = spread([100 * (a["accuracy"] - b["accuracy"]) for a, b in pairs], "+.2f")
        ratios = [
            spread([value(a) / value(b) for a, b in pairs], ".3f") for _, value, _ in columns[1:]
        ]
        epochs = f"{pairs[0][0]['epochs'] / pairs[0][1]['epochs']:.3f}"
        table.add_row(f"{METHODS[method].short} / dense", epochs, gain, *ratios)
    return table


def _unit(largest: float, big: float, big_name: str, small: float, name: str) -> tuple[float, str]:
    return (big, big_name) if largest >= big else (small, name)


def spread(values: Sequence[float], form: str) -> str:
    """Return mean ± sample standard deviation; the mean alone where nothing varies."""
    mean = format(statistics.fmean(values), form)
    if len(values) < 2 or max(values) == min(values):
        return mean
    return f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}"


def _title(row: Row) -> str:
    size = f"{row['image_size']}x{row['image_size']}"
    how = [row["device_name"]]
    if row["device"] == "cpu":
        how.append("1 thread" if row["threads"] == 1 else f"{row['threads']} threads")
    how += [name for name in ("compile", "channels_last") if row[name]]
    how += [row["amp"]] if row["amp"] != "off" else []
    return (
        f"{row['model']} on {row['data']}: {row['train_images']} training images of {size}, "
        f"batch {row['batch_size']}\n{', '.join([*how, 'torch ' + row['torch']])}"
    )


def _caption(rows: Sequence[Row]) -> str:
    seeds = len({r["seed"] for r in rows})
    over = f"mean ± sample standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    schedules = (r["schedule"] for r in rows if r["method"] == "ssprop")
    schedule = next(filter(None, schedules), None)
    whole = next((r for r in rows if r["method"] == "whole-gradient" and r["schedule"]), None)
    own = "" if whole is None else _whole_gradient(whole)
    return (
        f"ssProp's schedule: {schedule or 'drops nothing'}.\n{own}"
        f"Values: {over}. / dense: the ratio, seed by seed; of accuracy the difference.\n"
        f"Accuracy: after the last step, on {rows[0]['test_images']} test images.\n"
        f"FLOPs: of the whole training, convolutions and matrix products.\n"
        f"Times: the mean over all steps of a run, dense and sparse ones, warm-up counted as the "
        f"median;\na step is batch, forward, backward and optimizer; training is all steps, "
        f"without evaluation."
    )


def _whole_gradient(row: Row) -> str:
    rule = f"selection={row['selection']!r}, remainder={row['remainder']!r}"
    return f"Whole gradient: {row['schedule']}, {rule}.\n"
