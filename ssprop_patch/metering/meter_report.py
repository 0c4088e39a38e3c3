"""The report of a meter: what was counted, how it prints, how it goes to JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .._text import columns, counted, html
from ..flops.totals import COUNTED, NOTHING, Flops, human_flops, own_way, saved_lines
from .energy import Energy
from .layer_record import LayerTotals

PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class LayerReport:
    """One layer and what it did.

    Attributes:
        name: Fully qualified name.
        totals: What it did.
        converted: Whether it has a sparse backward.
    """

    name: str
    totals: LayerTotals
    converted: bool = True

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
        not_counted: Layers that convolve in their own way: they have no row, and what they run is
            among the others.
        ranks: Processes that this is the sum of.
        others: What the network ran beside the layers: all other convolutions, matrix products and
            attention, which are dense. None where that is not known.
        unknown: Why it is not.
    """

    layers: tuple[LayerReport, ...]
    steps: int
    seconds: dict[str, float]
    wall_seconds: float
    energy: Energy
    not_counted: tuple[str, ...] = ()
    ranks: int = 1
    host: str = field(default_factory=lambda: _host())
    others: Flops | None = NOTHING
    unknown: str = ""

    @property
    def totals(self) -> LayerTotals:
        """All layers, added up."""
        return sum((layer.totals for layer in self.layers), LayerTotals())

    @property
    def converted(self) -> Flops:
        """FLOPs of the converted layers."""
        return sum((row.totals.flops for row in self.layers if row.converted), NOTHING)

    @property
    def network(self) -> Flops | None:
        """FLOPs of the whole network; None where they are not known."""
        return None if self.others is None else self.totals.flops + self.others

    @property
    def forward_flops(self) -> int:
        """FLOPs of all forward passes; of the layers alone, where no more is known."""
        return self._known.forward

    @property
    def dense_backward_flops(self) -> int:
        """FLOPs that the backward passes would have had dense; as far as they are known."""
        return self._known.dense_backward

    @property
    def backward_flops(self) -> int:
        """FLOPs of all backward passes as they ran; as far as they are known."""
        return self._known.backward

    @property
    def _known(self) -> Flops:
        return self.totals.flops if self.network is None else self.network

    @property
    def backward_saved(self) -> float | None:
        """Share of the whole network's backward FLOPs saved; None where that is not known."""
        return None if self.network is None else self.network.backward_saved

    @property
    def total_saved(self) -> float | None:
        """Share of its forward and backward FLOPs saved; None where that is not known."""
        return None if self.network is None else self.network.total_saved

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
            LayerReport(
                rows[0].name, sum((row.totals for row in rows), LayerTotals()), rows[0].converted
            )
            for rows in zip(*(report.layers for report in reports), strict=True)
        )
        others = [report.others for report in reports if report.others is not None]
        all_known = len(others) == len(reports)
        phases = {phase for report in reports for phase in report.seconds}
        return cls(
            layers,
            max(report.steps for report in reports),
            {p: max(r.seconds.get(p, 0.0) for r in reports) for p in PHASES if p in phases},
            max(report.wall_seconds for report in reports),
            _summed_energy(reports),
            reports[0].not_counted,
            sum(report.ranks for report in reports),
            others=sum(others, NOTHING) if all_known else None,
            unknown=next((report.unknown for report in reports if report.unknown), ""),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything, totals too, as JSON can hold it."""
        rows = [
            {"name": r.name, "converted": r.converted, **asdict(r.totals), "saved": r.saved}
            for r in self.layers
        ]
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
            "converted": asdict(self.converted),
            "others": self.others and asdict(self.others),
            "not_known_because": self.unknown or None,
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

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> MeterReport:
        """Return the report of which :meth:`to_dict` is ``found``: for pictures after the training.

        Raises:
            KeyError, TypeError: If it is none.
        """
        names = [f.name for f in fields(LayerTotals)]
        return cls(
            tuple(
                LayerReport(row["name"], LayerTotals(*(row[n] for n in names)), row["converted"])
                for row in found["layers"]
            ),
            found["steps"],
            dict(found["seconds"]),
            found["wall_seconds"],
            Energy(found["energy"]["joules"], found["energy"]["not_measured_because"] or ""),
            tuple(found["not_counted"]),
            found["ranks"],
            others=found["others"] and Flops(**found["others"]),
            unknown=found["not_known_because"] or "",
        )

    def table(self) -> str:
        """Return a row for each layer: calls, kept channels, FLOPs."""
        return "\n".join(columns(self._cells(), right=range(1, 9), optional=(4, 1), wrapped=0))

    def _cells(self) -> list[tuple[str, ...]]:
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
        return cells

    def __str__(self) -> str:
        return "\n".join(columns(self._lines()))

    def _lines(self) -> list[tuple[str, str]]:
        ranks = f" on {self.ranks} ranks" if self.ranks > 1 else ""
        layers = sum(row.converted for row in self.layers)
        lines = [
            ("optimizer steps", f"{self.steps}{ranks}"),
            ("forward", human_flops(self.forward_flops)),
            ("backward, dense", human_flops(self.dense_backward_flops)),
            ("backward, as it ran", human_flops(self.backward_flops)),
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
            lines.append(("no row", own_way(self.not_counted)))
        lines.append(("counted", COUNTED if self.network else "the layers that a row is for"))
        if self.steps and self._known == NOTHING:
            lines.append(("saved", "nothing was counted: no layer ran in training mode"))
        else:
            first, second = saved_lines(self.network, self.unknown, self.converted, layers)
            lines += [("saved", first), ("", second)]
        return lines

    def __repr__(self) -> str:
        share = (self.network or self.converted).backward_saved
        return (
            f"{type(self).__name__}({counted(len(self.layers), 'layer')}, "
            f"{counted(self.steps, 'optimizer step')}: "
            f"{100 * share:.1f} % of the backward FLOPs saved)"
        )

    def _repr_html_(self) -> str:
        return html(self._lines(), self._cells(), counted(len(self.layers), "layer"))


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
