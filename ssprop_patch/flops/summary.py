"""The table of a model's FLOPs: rows, totals, and how they print."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .trace import Shape


@dataclass(frozen=True)
class LayerFlops:
    """One layer, all its calls of these shapes in one training step.

    Attributes:
        name: Fully qualified name.
        cls: Name of its class.
        calls: How often it runs in one forward pass; the FLOPs are of all of them.
        input_shape: Of one call.
        weight_shape: (C_out, C_in / groups, *kernel) of a convolution.
        output_shape: Of one call.
        kept: Output channels kept; the fewest, where a schedule is averaged over.
        channels: C_out.
        drop_rate: This layer's drop rate; the mean, where a schedule is averaged over; the true
            one, ``1 - kept / channels``, where ``align`` rounds the number of kept channels up.
        forward, dense_backward, sparse_backward: FLOPs.
    """

    name: str
    cls: str
    calls: int
    input_shape: Shape
    weight_shape: Shape
    output_shape: Shape
    kept: int
    channels: int
    drop_rate: float
    forward: int
    dense_backward: int
    sparse_backward: int

    @property
    def saved(self) -> float:
        """Share of the backward saved; below 0 where the importance costs more than it saves."""
        return 1 - self.sparse_backward / self.dense_backward if self.dense_backward else 0.0


@dataclass(frozen=True, repr=False)
class Summary:
    """FLOPs of the layers of a model in one training step; prints as a table.

    Attributes:
        layers: A row per convolution and shape, in order of the first call.
        rate: What the sparse backward was counted with, in words.
        not_counted: Names of layers that convolve in their own way, whose cost is not known.
    """

    layers: tuple[LayerFlops, ...]
    rate: str
    not_counted: tuple[str, ...] = ()

    @property
    def forward(self) -> int:
        """FLOPs of the forward pass."""
        return sum(layer.forward for layer in self.layers)

    @property
    def dense_backward(self) -> int:
        """FLOPs of the ordinary backward pass."""
        return sum(layer.dense_backward for layer in self.layers)

    @property
    def sparse_backward(self) -> int:
        """FLOPs of the sparse backward pass; the mean, where a schedule is averaged over."""
        return sum(layer.sparse_backward for layer in self.layers)

    @property
    def backward_saved(self) -> float:
        """Share of the backward FLOPs saved."""
        return (self.dense_backward - self.sparse_backward) / (self.dense_backward or 1)

    @property
    def total_saved(self) -> float:
        """Share of the forward and backward FLOPs saved."""
        saved = self.dense_backward - self.sparse_backward
        return saved / (self.forward + self.dense_backward or 1)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, totals too, as JSON can hold it."""
        names = ("forward", "dense_backward", "sparse_backward", "backward_saved", "total_saved")
        rows = [{**dataclasses.asdict(row), "saved": row.saved} for row in self.layers]
        totals = {name: getattr(self, name) for name in names}
        return {"rate": self.rate, **totals, "layers": rows, "not_counted": list(self.not_counted)}

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [
            (
                "layer",
                "class",
                "calls",
                "input",
                "weight",
                "output",
                "kept",
                "D",
                "forward",
                "dense bwd",
                "sparse bwd",
                "saved",
            )
        ]
        for r in self.layers:
            shapes = (r.input_shape, r.weight_shape, r.output_shape)
            table.append(
                (
                    r.name or "(model)",
                    r.cls,
                    str(r.calls),
                    *("x".join(map(str, shape)) for shape in shapes),
                    f"{r.kept}/{r.channels}",
                    f"{r.drop_rate:.3g}",
                    *_costs(r, r.saved),
                )
            )
        table.append(("total", *[""] * 7, *_costs(self, self.backward_saved)))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        align = [str.ljust, str.ljust, str.rjust, *[str.ljust] * 3, *[str.rjust] * 6]
        lines = [
            "  ".join(a(c, w) for a, c, w in zip(align, row, widths, strict=True)).rstrip()
            for row in table
        ]
        rule = "-" * max(map(len, lines))
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        lines.append(f"sparse backward: {self.rate}")
        lines.append(
            f"saved: {100 * self.backward_saved:.1f} % of the backward FLOPs, "
            f"{100 * self.total_saved:.1f} % of forward + backward"
        )
        lines.append("these layers only: norms, activations and all other layers are not counted")
        if self.not_counted:
            names = ", ".join(self.not_counted[:3]) + ", ..." * (len(self.not_counted) > 3)
            lines.append(f"nor are {len(self.not_counted)} that convolve in their own way: {names}")
        return "\n".join(lines)

    __repr__ = __str__


def _costs(cost: Any, saved: float) -> list[str]:
    counts = (cost.forward, cost.dense_backward, cost.sparse_backward)
    return [*(human_flops(n) for n in counts), f"{100 * saved:.1f} %"]


def human_flops(flops: int) -> str:
    size, units = float(flops), ["", "k", "M", "G", "T", "P"]
    while size >= 999.95 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.1f} {units[0]}FLOP" if units[0] else f"{flops} FLOP"
