"""The arguments that every trainer's callback takes, and what it offers beside its events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..core.rule import Remainder, Selection
from ..metering import Meter, MeterReport
from ..patching.dry_run import FilterFn
from ..patching.eligibility import DEFAULT_TYPES, Types
from ..schedule.controller import SparsityController
from ..schedule.schedules import Schedule
from ._run import Run

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Adapter:
    """Base class of the callbacks, which say when what happens here.

    Its arguments are theirs. They are spelled out, not ``**kwargs``, for type checkers, editors
    and LightningCLI.

    Args:
        schedule: A schedule, a number or a callable, as for :func:`ssprop_patch.convert`, or the
            text of a schedule: ``"BarSchedule(0.8)"``. None, with no other argument of ``convert``,
            for a model that is converted already.
        revert_at_end: Whether to take the sparse backward off when the training ends (an exception
            does not end it: it may go on).
        log: Whether to log the drop rate, and what the meter counts.
        meter: Whether to count what the training costs with a :class:`ssprop_patch.Meter`. Its
            FLOPs and shares saved are logged, and its report is printed at the end by the first
            process, for all of them, and kept: :attr:`report`.
        drop_rate, types, steps_per_epoch, filter_fn, exclude, overrides, align: As for
            :func:`ssprop_patch.convert`. Any of them that is not the default asks for a conversion.
        selection, remainder: As these.
        sync_selection, controller, strict: As for :func:`ssprop_patch.convert`.

    Raises:
        TypeError, ValueError: If an argument is not valid.
    """

    def __init__(
        self,
        schedule: Schedule | float | Callable[[int], float] | str | None = None,
        *,
        revert_at_end: bool = False,
        log: bool = True,
        meter: bool = False,
        drop_rate: float | None = None,
        types: Types = DEFAULT_TYPES,
        steps_per_epoch: int | None = None,
        filter_fn: FilterFn | None = None,
        exclude: str | Sequence[str] = (),
        overrides: Mapping[str, float] | None = None,
        align: int = 1,
        selection: Selection = "l1",
        remainder: Remainder = None,
        sync_selection: bool | ProcessGroup = False,
        controller: SparsityController | None = None,
        strict: bool = True,
    ) -> None:
        super().__init__()
        self._revert_at_end, self._logs = revert_at_end, log
        arguments: dict[str, Any] = {
            "drop_rate": drop_rate,
            "types": types,
            "steps_per_epoch": steps_per_epoch,
            "filter_fn": filter_fn,
            "exclude": exclude,
            "overrides": overrides,
            "align": align,
            "selection": selection,
            "remainder": remainder,
            "sync_selection": sync_selection,
            "controller": controller,
            "strict": strict,
        }
        self._run = Run(schedule, arguments, meter)

    @property
    def meter(self) -> Meter | None:
        """The meter while it counts, else None."""
        return self._run.meter

    @property
    def report(self) -> MeterReport | None:
        """What the meter has counted: so far, or until the training ended; None without one."""
        return self._run.report

    def _end(self, model: Any, is_first: bool) -> None:
        """End the training: report, and revert, if asked to; every process calls it."""
        if self._run.end_meter(all_ranks=True) and is_first:
            print(self.report)
        if self._revert_at_end:
            self._run.revert(model)
