"""The CSV's columns, and the last table: every side against dense, and against the bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ssprop_patch._text import table

COLUMNS = (
    *("name", "device", "dtype", "memory_format", "shape", "drop_rate", "side", "mode"),
    *("p25_ms", "p50_ms", "p75_ms", "of_dense", "of_compiled", "peak_memory_mib", "joules"),
    *("iterations", "torch", "cuda", "timm", "python"),
)
#: Shares of dense that sparse sides are meant to reach.
BACKWARD_OF_DENSE, STEP_OF_COMPILED = 0.40, 0.70
BARS = (
    f"Bars: backward at most {BACKWARD_OF_DENSE:.2f} of dense eager; step of a compiled side at "
    f"most {STEP_OF_COMPILED:.2f} of dense compiled; nothing slower than dense."
)


def show(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a line for each side: of what was measured several times, the last."""
    shares = ["backward/dense", "step/dense", "step/compiled"]
    cells = [["network", "side", "backward", "step ms", *shares, "bars", "MiB", "J"]]
    found = {(r["name"], r["side"], r["mode"]): r for r in rows}
    for name, side in dict.fromkeys((r["name"], r["side"]) for r in rows):
        backward, step = found[name, side, "backward"], found[name, side, "step"]
        cells.append(
            [
                name,
                side,
                f"{float(backward['p50_ms']):.1f}",
                f"{float(step['p50_ms']):.1f}",
                backward["of_dense"],
                step["of_dense"],
                step["of_compiled"],
                "" if side.startswith("dense") else _bars(side, backward, step),
                step["peak_memory_mib"],
                step["joules"],
            ]
        )
    return table(cells, "llr") if len(cells) > 1 else "Nothing was measured."


def _bars(side: str, backward: Mapping[str, str], step: Mapping[str, str]) -> str:
    """Return which bars a sparse side reaches: those of its own kind, eager or compiled."""
    if "compiled" in side.split():
        share, bar, name = step["of_compiled"], STEP_OF_COMPILED, "step"
        slower = step["of_compiled"]
    else:
        share, bar, name = backward["of_dense"], BACKWARD_OF_DENSE, "backward"
        slower = step["of_dense"]
    if not share or not slower:
        return "?"
    if float(slower) > 1:
        return "slower"
    return f"{name} {'reached' if float(share) <= bar else 'missed'}"
