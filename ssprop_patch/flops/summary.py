"""The table of a model's FLOPs: rows, totals, and how they print."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .._text import columns, counted, html, sizes
from .totals import COUNTED, NOTHING, Flops, human_flops, own_way, saved_lines
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
        converted: Whether it has, or a conversion would give it, a sparse backward.
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
    converted: bool = True

    @property
    def saved(self) -> float:
        """Share of the backward saved; below 0 where the importance costs more than it saves."""
        return 1 - self.sparse_backward / self.dense_backward if self.dense_backward else 0.0


@dataclass(frozen=True, repr=False)
class Summary:
    """FLOPs of a model in one training step; prints as a table.

    The table is at most 100 columns wide: what does not fit is left out, :meth:`to_dict` has it.

    Attributes:
        layers: A row per convolution and shape, in order of the first call.
        rate: What the sparse backward was counted with, in words.
        not_counted: Names of layers that convolve in their own way: they have no row, and what
            they run is among the others.
        others: All other convolutions, matrix products and attention of the network, which stay
            dense; None where they could not be counted.
        unknown: Why they could not.
    """

    layers: tuple[LayerFlops, ...]
    rate: str
    not_counted: tuple[str, ...] = ()
    others: Flops | None = NOTHING
    unknown: str = ""

    @property
    def totals(self) -> Flops:
        """The whole network; without the others, where they are not known."""
        return sum(map(_flops, self.layers), self.others or NOTHING)

    @property
    def converted(self) -> Flops:
        """The layers that are converted, or would be."""
        return sum((_flops(layer) for layer in self.layers if layer.converted), NOTHING)

    @property
    def forward(self) -> int:
        """FLOPs of the forward pass of the whole network."""
        return self.totals.forward

    @property
    def dense_backward(self) -> int:
        """FLOPs of its ordinary backward pass."""
        return self.totals.dense_backward

    @property
    def sparse_backward(self) -> int:
        """FLOPs of its sparse backward pass; the mean, where a schedule is averaged over."""
        return self.totals.backward

    @property
    def backward_saved(self) -> float:
        """Share of the whole network's backward FLOPs saved."""
        return self.totals.backward_saved

    @property
    def total_saved(self) -> float:
        """Share of the whole network's forward and backward FLOPs saved."""
        return self.totals.total_saved

    def to_dict(self) -> dict[str, Any]:
        """Return everything, totals too, as JSON can hold it."""
        names = ("forward", "dense_backward", "sparse_backward", "backward_saved", "total_saved")
        rows = [{**dataclasses.asdict(row), "saved": row.saved} for row in self.layers]
        return {
            "rate": self.rate,
            **{name: getattr(self, name) for name in names},
            "converted": dataclasses.asdict(self.converted),
            "others": self.others and dataclasses.asdict(self.others),
            "layers": rows,
            "not_counted": list(self.not_counted),
        }

    def _cells(self) -> list[tuple[str, ...]]:
        table: list[tuple[str, ...]] = [
            (
                "layer",
                "class",
                "calls",
                "input",
                "weight",
                "output",
                "kept",
                "drop rate",
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
                    *map(sizes, shapes),
                    f"{r.kept}/{r.channels}",
                    f"{r.drop_rate:.3g}",
                    *_costs(_flops(r)),
                )
            )
        if self.others is not None and self.others != NOTHING:
            table.append(("the rest", *[""] * 7, *_costs(self.others)))
        table.append(("total", *[""] * 7, *_costs(self.totals)))
        return table

    def __str__(self) -> str:
        # What others say, too, is left out first: output, class, calls, rate, weight, input.
        lines = columns(
            self._cells(), right=(2, *range(6, 12)), optional=(5, 1, 2, 7, 4, 3), wrapped=0
        )
        rule = "-" * max(map(len, lines))
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        lines.append(f"sparse backward: {self.rate}")
        if self.not_counted:
            lines.append(f"no row for {own_way(self.not_counted)}")
        if self.others is None:
            lines.append(f"counted: the layers above; everything else is not: {self.unknown}")
        else:
            lines.append(f"counted: {COUNTED}")
        layers = len({layer.name for layer in self.layers if layer.converted})
        network = None if self.others is None else self.totals
        first, second = saved_lines(network, self.unknown, self.converted, layers)
        return "\n".join([*lines, f"saved: {first}", f"       {second}"])

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({counted(len(self.layers), 'layer')}, {self.rate}: "
            f"{100 * self.backward_saved:.1f} % of the backward FLOPs saved)"
        )

    def _repr_html_(self) -> str:
        head, *layers, total = self._cells()
        totals = [pair for pair in zip(head, total, strict=True) if pair[1]][1:]
        notes = [("", line) for line in str(self).splitlines()[len(layers) + 4 :]]
        return html([*totals, *notes], [head, *layers], counted(len(self.layers), "layer"))


def _flops(layer: LayerFlops) -> Flops:
    return Flops(layer.forward, layer.dense_backward, layer.sparse_backward)


def _costs(cost: Flops) -> list[str]:
    counts = (cost.forward, cost.dense_backward, cost.backward)
    return [*map(human_flops, counts), f"{100 * cost.backward_saved:.1f} %"]
