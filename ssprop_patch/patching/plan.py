"""What a plan is: a row for each layer, and how that prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from .._text import columns, counted, html, percent
from ..core.rule import Selected
from ..schedule.call_counts import Ran
from .layer_kinds import base_layer
from .reasons import Action, Reason


@dataclass(frozen=True)
class PlanRow:
    """One layer.

    Attributes:
        name: Fully qualified name, ``""`` for the model itself; the first, where it has several.
        module: The layer.
        cls: Its class before conversion.
        why: Why it is converted or not.
        reason: The same in words, with the details.
        drop_rate: The layer's own rate from ``overrides``, or None.
        selected: What of its gradient goes back as it is: ``"channels"``, or directions on its
            ``"output"`` or ``"input"`` side; None if it is not converted.
        ran: How often it ran since it was converted, sparse and dense; None if it is not.
        share: What it holds of the FLOPs of a dense training step of the whole network, forward
            and backward, 0 to 1; None in a plan without inputs.
    """

    name: str
    module: nn.Module = field(repr=False)
    cls: type[nn.Module]
    why: Reason
    reason: str
    drop_rate: float | None = None
    ran: Ran | None = None
    selected: Selected | None = None
    share: float | None = None

    @property
    def action(self) -> Action:
        """``"convert"``; ``"skip"``: stays dense; ``"refuse"``: conversion is an error."""
        return self.why.action

    @property
    def shown_name(self) -> str:
        """The name, or a word for the model itself."""
        return self.name or "(model)"


@dataclass(frozen=True)
class Plan:
    """A dry run of :func:`ssprop_patch.convert`; prints as a table, iterates over its rows.

    Attributes:
        rows: One for each layer.
        others: One for each other layer that multiplies matrices and stays dense: linear layers
            that are not among the types, attention, recurrent layers; with inputs, also what
            computes products in another way. They print with the rows.
    """

    rows: tuple[PlanRow, ...]
    others: tuple[PlanRow, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether the layers were timed: :class:`ssprop_patch.timing.MeasuredPlan`."""
        return False

    def pays(self, module: nn.Module, name: str = "") -> bool:
        """Whether to convert a layer on this machine, as it was measured: a ``filter_fn``.

        Raises:
            RuntimeError: If the plan was made without ``measure=True``.
        """
        raise RuntimeError(
            "this plan has no times: make it with plan(model, inputs=x, measure=True)"
        )

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
        return "\n".join([*self._lines(), self._totals()])

    def _lines(self) -> list[str]:
        cells = self._cells()
        return columns(cells, wrapped=len(cells[0]) - 3)  # how often it ran, and why

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._totals().splitlines()[0]})"

    def _repr_html_(self) -> str:
        totals = [[line] for line in self._totals().splitlines()]
        return html(totals, self._cells(), counted(len(self.rows) + len(self.others), "layer"))

    def _cells(self) -> Sequence[Sequence[str]]:
        rows = (*self.rows, *self.others)
        cells: list[tuple[str, ...]] = [("name", "class", "action", "why")]
        cells += [(r.shown_name, r.cls.__name__, r.action, r.reason) for r in rows]
        if any(row.ran for row in rows):
            ran = ["" if r.ran is None else str(r.ran) if r.ran else "never" for r in rows]
            cells = [(*c[:-1], r, c[-1]) for c, r in zip(cells, ["ran", *ran], strict=True)]
        if self.has_shares:
            shares = ["FLOPs", *(percent(row.share or 0.0) for row in rows)]
            cells = [(*c[:-1], s, c[-1]) for c, s in zip(cells, shares, strict=True)]
        return cells

    def _totals(self) -> str:
        dense = len(self.skipped) + len(self.others)
        refused = f", {len(self.refused)} refused" if self.refused else ""
        lines = [
            f"{counted(len(self.rows) + len(self.others), 'layer')}: "
            f"{len(self.converted)} to convert, {dense} left dense{refused}"
        ]
        if self.has_shares:
            lines.append(self.where_the_flops_are())
        if self.suggested_types:
            names = ", ".join(f"nn.{cls.__name__}" for cls in self.suggested_types)
            lines.append(f"types=({names}) converts the layers that hold more of them")
        return "\n".join(lines)

    @property
    def has_shares(self) -> bool:
        """Whether it is known what each layer holds of the FLOPs."""
        return any(row.share is not None for row in (*self.rows, *self.others))

    def where_the_flops_are(self) -> str:
        """Return what the layers hold of the FLOPs, in a sentence; of a plan with inputs."""
        converted, dense = _share(self.converted), _share((*self.skipped, *self.others))
        elsewhere = 1 - converted - dense
        return (
            f"FLOPs of forward and backward: {percent(converted)} in the layers to convert, "
            f"{percent(dense)} in those that stay dense"
            + (f", {percent(elsewhere)} elsewhere" if elsewhere > 0.0005 else "")
        )

    @property
    def suggested_types(self) -> tuple[type[nn.Module], ...]:
        """The ``types`` with which more could be saved.

        Those of this plan, and those of layers that are not among them, where these hold more of
        the FLOPs than the layers to convert. Empty otherwise, and in a plan without inputs.
        """
        missing = [r for r in (*self.skipped, *self.others) if r.why is Reason.NOT_AMONG_TYPES]
        if _share(missing) <= _share(self.converted):
            return ()
        bases = (base_layer(row.cls) for row in (*self.converted, *missing))
        return tuple(dict.fromkeys(base for base in bases if base is not None))


def _share(rows: Iterable[PlanRow]) -> float:
    return sum(row.share or 0.0 for row in rows)
