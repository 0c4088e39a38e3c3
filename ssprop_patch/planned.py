"""What a plan is: a row for each layer, what was measured of it, and how that prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from ._text import columns
from .calls import Ran

if TYPE_CHECKING:
    from .timing.layers import LayerTime
    from .timing.turns import Quantiles


@dataclass(frozen=True)
class PlanRow:
    """One layer.

    Attributes:
        name: Fully qualified name, ``""`` for the model itself; the first, where it has several.
        module: The layer.
        cls: Its class before conversion.
        action: ``"convert"``; ``"skip"``: stays dense; ``"refuse"``: conversion is an error.
        reason: Why.
        drop_rate: The layer's own rate from ``overrides``, or None.
        times: What its calls took, one entry for each shape of input, where it was measured.
        ran: How often it ran since it was converted, sparse and dense; None if it is not.
        never_called: Whether other code reads its weight and nothing calls it.
    """

    name: str
    module: nn.Module
    cls: type[nn.Module]
    action: Literal["convert", "skip", "refuse"]
    reason: str
    drop_rate: float | None = None
    times: tuple[LayerTime, ...] = ()
    ran: Ran | None = None
    never_called: bool = False

    @property
    def pays(self) -> bool:
        """Whether all calls of the layer, alone, took clearly less time with a sparse backward.

        A layer that was measured and had no call to train does not pay.
        """
        dense = sum(t.calls * t.dense_ms.p50 for t in self.times)
        sparse = sum(t.calls * t.sparse_ms.p50 for t in self.times)
        return sparse < _CLEARLY * dense


# What two measurements of the same layer, or network, may differ by on a quiet machine.
_CLEARLY, _NETWORK_CLEARLY = 0.97, 0.99


@dataclass(frozen=True)
class PlanNetwork:
    """The whole network with some of its layers converted.

    Attributes:
        choice: ``"none"`` of them, ``"those that pay alone"``, or ``"all"``.
        converted: Their names.
        ms: Milliseconds of forward and backward.
    """

    choice: str
    converted: frozenset[str]
    ms: Quantiles


@dataclass(frozen=True)
class Plan:
    """A dry run of :func:`ssprop_patch.convert`; prints as a table, iterates over its rows.

    Attributes:
        rows: One for each layer.
        measured: Whether they were timed.
        networks: The choices of layers that the whole network was timed with, first ``"none"``;
            empty where there was no choice.
    """

    rows: tuple[PlanRow, ...]
    measured: bool = False
    networks: tuple[PlanNetwork, ...] = ()

    @property
    def best(self) -> PlanNetwork | None:
        """The fastest choice: the dense network unless another is clearly faster; None of none."""
        if not self.networks:
            return None
        dense, *others = self.networks
        fastest = min(others, key=lambda network: network.ms.p50)
        return fastest if fastest.ms.p50 < _NETWORK_CLEARLY * dense.ms.p50 else dense

    def pays(self, module: nn.Module, name: str = "") -> bool:
        """Whether to convert a layer on this machine, as it was measured: a ``filter_fn``.

        A layer belongs to the fastest choice for the whole network: alone it may pay and in there
        not, or the other way round, as caches and memory are shared.

        Args:
            module: A layer of the model that was planned, or of a copy of it.
            name: Its fully qualified name, which finds it in a copy.

        Raises:
            RuntimeError: If the plan was made without ``measure=True``.
        """
        if not self.measured:
            raise RuntimeError(
                "this plan has no times: make it with plan(model, inputs=x, measure=True)"
            )
        row = next((r for r in self.rows if r.module is module), None)
        if row is None:
            row = next((r for r in self.rows if r.name == name), None)
        return row is not None and self.best is not None and row.name in self.best.converted

    @property
    def converted(self) -> tuple[PlanRow, ...]:
        """The layers that get a sparse backward."""
        return tuple(row for row in self.rows if row.action == "convert")

    @property
    def skipped(self) -> tuple[PlanRow, ...]:
        """The layers that stay dense."""
        return tuple(row for row in self.rows if row.action == "skip")

    @property
    def refused(self) -> tuple[PlanRow, ...]:
        """The layers because of which conversion is an error."""
        return tuple(row for row in self.rows if row.action == "refuse")

    def __iter__(self) -> Iterator[PlanRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if self.measured:
            cells = [_HEAD, *(line for row in self.rows for line in _measured_lines(row))]
        else:
            cells = [("name", "class", "action", "why")]
            cells += [(r.name or "(model)", r.cls.__name__, r.action, r.reason) for r in self.rows]
            if any(row.ran for row in self.rows):
                ran = ["" if r.ran is None else str(r.ran) if r.ran else "never" for r in self.rows]
                cells = [(*c[:-1], r, c[-1]) for c, r in zip(cells, ["ran", *ran], strict=True)]
        lines = columns(cells)
        lines.append(
            f"{len(self.rows)} layers: {len(self.converted)} to convert, "
            f"{len(self.skipped)} stay dense"
            + (f", {len(self.refused)} refused" if self.refused else "")
            + (f"; {sum(row.pays for row in self.converted)} pay alone" if self.measured else "")
        )
        if self.best is not None:
            times = (f"{n.choice} {n.ms.p50:.3f} ms" for n in self.networks)
            lines.append(
                f"forward and backward of the whole network, converted: {', '.join(times)}; "
                f"convert {self.best.choice}"
            )
        return "\n".join(lines)


_HEAD = "name", "input", "weight", "dense ms", "sparse ms", "share", "kernel", "pays alone"


def _measured_lines(row: PlanRow) -> list[tuple[str, ...]]:
    """Return a line for each shape of input that a layer was given; one that says why none was."""
    name = row.name or "(model)"
    if row.action != "convert":
        return [(name, "", "", "", "", "", "", row.reason)]
    if not row.times:
        return [(name, "", "", "", "", "", "", "not run, or needs no gradient: no")]
    return [
        (
            name,
            "x".join(map(str, t.input_shape)) + f" ({t.calls} times)" * (t.calls > 1),
            "x".join(map(str, t.weight_shape)), f"{t.dense_ms.p50:.3f}", f"{t.sparse_ms.p50:.3f}",
            f"{t.share:.2f}", t.kernel + ", norm" * t.with_norm, "yes" if row.pays else "no",
        )
        for t in row.times
    ]  # fmt: skip
