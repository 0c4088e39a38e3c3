"""How the times of layers and steps are shown: a table, or the rows of a CSV."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .._text import sizes, table
from ..timing import LayerTime, StepTime

FIELDS = (
    "kind",
    "name",
    "class",
    "calls",
    "input_shape",
    "weight_shape",
    "output_shape",
    "kernel",
    "dense_p20",
    "dense_p50",
    "dense_p80",
    "sparse_p20",
    "sparse_p50",
    "sparse_p80",
    "unit",
    "share_of_dense",
    "pays",
)


def text(
    layers: list[LayerTime], steps: list[StepTime], joules: dict[str, float], reason: str
) -> str:
    rows = [
        (
            "layer",
            "class",
            "input",
            "weight",
            "calls",
            "kernel",
            "dense ms",
            "sparse ms",
            "share",
            "pays",
        )
    ]
    rows += [
        (
            t.name or "(model)",
            t.cls,
            sizes(t.input_shape),
            sizes(t.weight_shape),
            str(t.calls),
            t.kernel,
            f"{t.dense_ms.p50:.3f}",
            f"{t.sparse_ms.p50:.3f}",
            f"{t.share:.2f}",
            "yes" if t.pays else "no",
        )
        for t in layers
    ]
    dense = sum(t.calls * t.dense_ms.p50 for t in layers)
    sparse = sum(t.calls * t.sparse_ms.p50 for t in layers)
    lines = [
        table(rows, "llllr"),
        "",
        f"layers alone: {dense:.1f} ms dense, {sparse:.1f} ms sparse ({sparse / dense:.2f}); the "
        f"sparse backward pays in {sum(t.pays for t in layers)} of {len(layers)}",
        "",
    ]
    whole = [("whole step", "dense s", "sparse s", "share")]
    whole += [
        (s.mode, f"{s.dense_s.p50:.4f}", f"{s.sparse_s.p50:.4f}", f"{s.share:.2f}") for s in steps
    ]
    lines += [table(whole, "lr"), ""]
    if joules:
        share = f" ({joules['sparse'] / joules['dense']:.2f})" if joules["dense"] else ""
        lines.append(
            f"energy: {joules['dense']:.2f} J a step dense, {joules['sparse']:.2f} J sparse{share}"
        )
    else:
        lines.append(f"energy: not measured: {reason}")
    return "\n".join(lines)


def csv_rows(
    layers: list[LayerTime], steps: list[StepTime], joules: dict[str, float]
) -> Iterator[dict[str, Any]]:
    for t in layers:
        shapes = {
            name: sizes(getattr(t, name))
            for name in ("input_shape", "weight_shape", "output_shape")
        }
        yield {
            "kind": "layer",
            "name": t.name,
            "class": t.cls,
            "calls": t.calls,
            **shapes,
            "kernel": t.kernel,
            **_sides(t.dense_ms, t.sparse_ms),
            "unit": "ms",
            "share_of_dense": t.share,
            "pays": t.pays,
        }
    for s in steps:
        yield {
            "kind": "step",
            "name": s.mode,
            **_sides(s.dense_s, s.sparse_s),
            "unit": "s",
            "share_of_dense": s.share,
        }
    if joules:
        yield {
            "kind": "step",
            "name": "energy",
            "dense_p50": joules["dense"],
            "sparse_p50": joules["sparse"],
            "unit": "J",
            "share_of_dense": joules["sparse"] / (joules["dense"] or 1),
        }


def _sides(dense: Any, sparse: Any) -> dict[str, float]:
    return {
        f"{side}_{name}": value
        for side, q in (("dense", dense), ("sparse", sparse))
        for name, value in q._asdict().items()
    }
