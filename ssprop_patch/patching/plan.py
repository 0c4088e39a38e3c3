"""What a plan is: a row for each layer, and how that prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from .._text import columns
from ..core.rule import Selected
from ..schedule.call_counts import Ran
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
    """

    name: str
    module: nn.Module
    cls: type[nn.Module]
    why: Reason
    reason: str
    drop_rate: float | None = None
    ran: Ran | None = None
    selected: Selected | None = None

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
    """

    rows: tuple[PlanRow, ...]

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
        return "\n".join([*columns(self._cells()), self._totals()])

    def _cells(self) -> Sequence[Sequence[str]]:
        cells = [("name", "class", "action", "why")]
        cells += [(r.shown_name, r.cls.__name__, r.action, r.reason) for r in self.rows]
        if not any(row.ran for row in self.rows):
            return cells
        ran = ["" if r.ran is None else str(r.ran) if r.ran else "never" for r in self.rows]
        return [(*c[:-1], r, c[-1]) for c, r in zip(cells, ["ran", *ran], strict=True)]

    def _totals(self) -> str:
        refused = f", {len(self.refused)} refused" if self.refused else ""
        return (
            f"{len(self.rows)} layers: {len(self.converted)} to convert, "
            f"{len(self.skipped)} stay dense{refused}"
        )
