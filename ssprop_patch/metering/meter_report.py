"""The report of a meter: what was counted, how it prints, how it goes to JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..flops.summary import human_flops
from .energy import Energy
from .layer_record import LayerTotals

PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class LayerReport:
    """One layer and what it did."""

    name: str
    totals: LayerTotals

    @property
    def saved(self) -> float:
        """Share of its backward FLOPs saved."""
        return self.totals.backward_saved


@dataclass(frozen=True, repr=False)
class MeterReport:
    """What a run did until the report was made; prints as a table.

    Attributes:
        layers: A row for each layer.
        steps: Optimizer steps.
        seconds: By phase: ``"forward"`` and ``"backward"`` of the model in training mode, without
            loss and data, and ``"optimizer"``; on the device's clock. A phase that was not seen
            (a model compiled after the meter was made) is missing.
        wall_seconds: Since the meter was made, with all that happened between.
        energy: Joules by scope, or why there are none; of the model's GPUs, and of the host's
            processors and memory, whoever uses them. ``energy.co2_grams(grams_per_kwh)`` is what
            they emit.
        not_counted: Layers that convolve in their own way, whose cost is not known.
        ranks: Processes that this is the sum of.
    """

    layers: tuple[LayerReport, ...]
    steps: int
    seconds: dict[str, float]
    wall_seconds: float
    energy: Energy
    not_counted: tuple[str, ...] = ()
    ranks: int = 1
    host: str = field(default_factory=lambda: _host())

    @property
    def totals(self) -> LayerTotals:
        """All layers, added up."""
        return sum((layer.totals for layer in self.layers), LayerTotals())

    @property
    def forward_flops(self) -> int:
        """FLOPs of all forward passes."""
        return self.totals.forward_flops

    @property
    def dense_backward_flops(self) -> int:
        """FLOPs that the backward passes would have had dense."""
        return self.totals.dense_backward_flops

    @property
    def backward_flops(self) -> int:
        """FLOPs of all backward passes as they ran."""
        return self.totals.backward_flops

    @property
    def backward_saved(self) -> float:
        """Share of the backward FLOPs saved."""
        return self.totals.backward_saved

    @property
    def total_saved(self) -> float:
        """Share of the forward and backward FLOPs saved."""
        return self.totals.total_saved

    @classmethod
    def summed(cls, reports: Sequence[MeterReport]) -> MeterReport:
        """Add up the reports of the ranks of one training.

        FLOPs add up. Steps and seconds are those of the slowest rank, as all wait for it. Joules
        of a GPU add up; a processor and its DRAM count once for each host.
        """
        if not reports:
            raise ValueError("no report to add up")
        names = [[layer.name for layer in report.layers] for report in reports]
        if any(other != names[0] for other in names):
            raise ValueError("the reports are of different models: their layers differ")
        layers = tuple(
            LayerReport(rows[0].name, sum((row.totals for row in rows), LayerTotals()))
            for rows in zip(*(report.layers for report in reports), strict=True)
        )
        phases = {phase for report in reports for phase in report.seconds}
        return cls(
            layers,
            max(report.steps for report in reports),
            {p: max(r.seconds.get(p, 0.0) for r in reports) for p in PHASES if p in phases},
            max(report.wall_seconds for report in reports),
            _summed_energy(reports),
            reports[0].not_counted,
            sum(report.ranks for report in reports),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything, totals too, as JSON can hold it."""
        rows = [{"name": r.name, **asdict(r.totals), "saved": r.saved} for r in self.layers]
        totals = (
            "forward_flops",
            "dense_backward_flops",
            "backward_flops",
            "backward_saved",
            "total_saved",
        )
        return {
            "steps": self.steps,
            "ranks": self.ranks,
            **{name: getattr(self, name) for name in totals},
            "seconds": dict(self.seconds),
            "wall_seconds": self.wall_seconds,
            "energy": {
                "joules": dict(self.energy.joules),
                "total_joules": self.energy.total,
                "not_measured_because": self.energy.reason or None,
            },
            "layers": rows,
            "not_counted": list(self.not_counted),
        }

    def to_json(self, **kwargs: Any) -> str:
        """Return :meth:`to_dict` as JSON; ``kwargs`` go to :func:`json.dumps`."""
        return json.dumps(self.to_dict(), **kwargs)

    def table(self) -> str:
        """Return a row for each layer: calls, kept channels, FLOPs."""
        cells: list[tuple[str, ...]] = [
            (
                "layer",
                "forwards",
                "backwards",
                "sparse",
                "dropped",
                "forward",
                "dense bwd",
                "backward",
                "saved",
            )
        ]
        for row in self.layers:
            t = row.totals
            flops = (t.forward_flops, t.dense_backward_flops, t.backward_flops)
            cells.append(
                (
                    row.name,
                    str(t.forwards),
                    str(t.backwards),
                    str(t.sparse),
                    f"{100 * t.drop_rate:.1f} %",
                    *map(human_flops, flops),
                    f"{100 * row.saved:.1f} %",
                )
            )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        align = [str.ljust, *[str.rjust] * 8]
        return "\n".join(
            "  ".join(a(c, w) for a, c, w in zip(align, row, widths, strict=True)).rstrip()
            for row in cells
        )

    def __str__(self) -> str:
        ranks = f" on {self.ranks} ranks" if self.ranks > 1 else ""
        lines = [
            ("optimizer steps", f"{self.steps}{ranks}"),
            ("forward", human_flops(self.forward_flops)),
            ("backward, dense", human_flops(self.dense_backward_flops)),
            ("backward, as it ran", human_flops(self.backward_flops)),
            (
                "saved",
                f"{100 * self.backward_saved:.1f} % of the backward FLOPs, "
                f"{100 * self.total_saved:.1f} % of forward + backward",
            ),
        ]
        for phase in PHASES:
            seconds = self.seconds.get(phase)
            if seconds is None:
                lines.append((f"{phase}, seconds", "not measured"))
            else:
                each = f", {1000 * seconds / self.steps:.2f} ms a step" if self.steps else ""
                lines.append((f"{phase}, seconds", f"{seconds:.2f}{each}"))
        lines.append(("wall clock, seconds", f"{self.wall_seconds:.2f}"))
        lines.append(("energy", str(self.energy)))
        if self.not_counted:
            names = ", ".join(self.not_counted[:3]) + ", ..." * (len(self.not_counted) > 3)
            lines.append(("not counted", f"{len(self.not_counted)} layers: {names}"))
        width = max(len(label) for label, _ in lines)
        return "\n".join(f"{label.ljust(width)}  {text}" for label, text in lines)

    __repr__ = __str__


def _summed_energy(reports: Sequence[MeterReport]) -> Energy:
    joules: dict[str, float] = {}
    for rank, report in enumerate(reports):
        for scope, value in report.energy.joules.items():
            if scope.startswith("GPU"):
                joules[f"{scope} of rank {rank}"] = value
            else:  # every rank of a host reads the same counter
                key = f"{scope} of {report.host}"
                joules[key] = max(value, joules.get(key, 0.0))
    reasons = dict.fromkeys(report.energy.reason for report in reports if report.energy.reason)
    return Energy(joules, "; ".join(reasons))


def _host() -> str:
    import socket

    return socket.gethostname()
