"""What every trainer's callback does with a model; the callbacks say when."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..metering import Meter, MeterReport
from ..patching.convert import convert, is_converted, revert
from ..schedule.controller import SparsityController, find_controllers, get_controller
from ..schedule.parse import parse_schedule
from ..schedule.schedules import Schedule, constant

#: How trainers' logs call the rate.
DROP_RATE = "ssprop/drop_rate"

_DEFAULTS = {n: p.default for n, p in inspect.signature(convert).parameters.items()}


def _is_default(name: str, value: Any) -> bool:
    # A configuration file has lists where the signature has tuples.
    value = tuple(value) if isinstance(value, list) else value
    return value is _DEFAULTS[name] or bool(value == _DEFAULTS[name])


class Run:
    """Converts a model, tells its controller the trainer's epochs, counts, and keeps the state.

    Args:
        schedule: As for :func:`ssprop_patch.convert`, or its text; None, and no ``arguments`` but
            the defaults, for a model that is converted already.
        arguments: Further arguments of :func:`ssprop_patch.convert`.
        meters: Whether to attach a meter.

    Raises:
        TypeError, ValueError: If a schedule or the controller is not valid.
    """

    def __init__(
        self,
        schedule: Schedule | float | Callable[[int], float] | str | None,
        arguments: Mapping[str, Any],
        meters: bool = False,
    ) -> None:
        given = {n: v for n, v in arguments.items() if not _is_default(n, v)}
        if schedule is not None:
            given["schedule"] = parse_schedule(schedule) if isinstance(schedule, str) else schedule
        if given.get("drop_rate") is not None:
            given["schedule"] = constant(given.pop("drop_rate"), "schedule" in given)
        self._converts = bool(given)
        self._shared = given.pop("controller", None)
        self._making = {n: given.pop(n) for n in ("schedule", "steps_per_epoch") if n in given}
        if self._shared is not None and self._making:
            raise ValueError(f"{', '.join(self._making)}: these belong to the controller given")
        SparsityController(**self._making)  # for its checks
        self._layers = given
        self._tells_epochs = self._told = self._goes_on = False
        self._meters = meters
        self._counted: dict[str, Any] | None = None  # by a meter that is closed
        self._report: MeterReport | None = None
        self._to_load: Mapping[str, Any] | None = None
        self.controller: SparsityController | None = None
        self.meter: Meter | None = None
        #: What the meter had counted at the latest optimizer step, by the names of logs.
        self.scalars: dict[str, float] = {}

    def begin(self, model: nn.Module, anew: bool = True) -> None:
        """Convert ``model`` if that was asked for, find its controller, and count from here.

        Args:
            model: What the trainer trains.
            anew: Whether t starts from 0, if the controller is this object's own.

        Raises:
            ValueError: If the model is not converted and nothing says how to.
        """
        self.end_meter()  # of a training that an exception left
        self._goes_on = not anew
        if not self._converts:
            if not is_converted(model):
                raise ValueError(
                    f"this {type(model).__name__} is not converted: give the callback a schedule, "
                    "SsPropCallback(ssprop_patch.BarSchedule(0.8)), or call "
                    "ssprop_patch.convert(model) first"
                )
            self.controller = get_controller(model)
        else:
            if anew or self.controller is None:
                self.controller = self._shared or SparsityController(**self._making)
            # Not twice: a compiled model would make a new graph.
            if anew or find_controllers(model) != [self.controller]:
                convert(model, controller=self.controller, **self._layers)
        # With steps_per_epoch the controller counts optimizer steps, as its owner wished.
        controller = self._begun()
        self._tells_epochs = (
            controller.schedule.interval == "epoch" and controller.steps_per_epoch is None
        )
        self._told = False
        if self._meters:
            self._begin_to_count(model, anew)

    @property
    def drop_rate(self) -> float:
        """The controller's rate now; after :meth:`begin`."""
        return self._begun().drop_rate

    def _begun(self) -> SparsityController:
        if self.controller is None:
            raise RuntimeError("the training has not begun: there is no controller yet")
        return self.controller

    # --- the count of the trainer -----------------------------------------------------------------

    def epoch(self, epoch: int) -> None:
        """Tell the controller which epoch begins; one that it is in already changes nothing."""
        controller = self._begun()
        if self._tells_epochs and not (self._told and epoch == controller.t):
            controller.step(epoch)
            self._told = True

    def steps_done(self, number: int) -> None:
        """Tell a schedule of steps how many there were: torch reports its own optimizers' only."""
        controller = self._begun()
        if controller.schedule.interval == "step":
            controller.step(number)

    def check_continues(self, global_step: int) -> None:
        """Warn where a training goes on at a later step, but the schedule starts from its 0."""
        schedule = self._begun().schedule
        lost = global_step > 0 and not self._goes_on and self._converts and self._shared is None
        if lost and schedule.interval == "step" and not schedule.is_constant:
            warnings.warn(
                f"the training goes on at step {global_step}, but its checkpoint holds no state of "
                f"a controller: {schedule!r} starts from t = 0",
                UserWarning,
                stacklevel=2,
            )

    # --- checkpoints ------------------------------------------------------------------------------

    def state_dict(self, tensors: bool = True) -> dict[str, Any]:
        """Return the controller's state; empty before a run.

        Args:
            tensors: Whether with what :meth:`tensors` returns; else all of it is plain scalars.
        """
        state = {} if self.controller is None else self.controller.state_dict()
        return {n: v for n, v in state.items() if tensors or n != "layers"}

    def tensors(self) -> dict[str, Any]:
        """Return the part of the state that has tensors, ``"layers"``; empty if there is none."""
        return {} if self.controller is None else self.controller.state_dict().get("layers", {})

    def meter_state(self) -> dict[str, Any] | None:
        """Return what the meter has counted, for :meth:`count_on_from`; waits for the device."""
        return self._counted if self.meter is None else self.meter.state_dict()

    def whole_state(self) -> dict[str, Any]:
        """Return the state of the controller, with the meter's as ``"meter"`` if there is one."""
        counted = self.meter_state()
        return {**self.state_dict(), **({"meter": counted} if counted else {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state``, with or without a meter's, was taken; after :meth:`begin`."""
        controller = self._begun()
        controller.load_state_dict({n: v for n, v in state.items() if n != "meter"})
        self._goes_on = True
        self._told = bool(state["by_hand"])
        # The caller counted then, so the optimizer hook does not; this run has to count too.
        if self._told and state["steps_per_epoch"] is None:
            self._tells_epochs = controller.schedule.interval == "epoch"
        if "meter" in state:
            self.count_on_from(state["meter"])

    def keep_for_later(self, state: Mapping[str, Any] | None) -> None:
        """Keep a state until :meth:`load_what_was_kept`: only then the model is converted."""
        self._to_load = state

    def load_what_was_kept(self) -> None:
        """Load the state that was kept, once, if there is one; after :meth:`begin`."""
        state, self._to_load = self._to_load, None
        if state:
            self.load_state_dict(state)

    # --- the meter --------------------------------------------------------------------------------

    def _begin_to_count(self, model: nn.Module, anew: bool) -> None:
        self.meter, self.scalars = Meter(model), {}
        self.meter.log_to(self._note, layers=False)
        if not anew and self._counted is not None:
            self.meter.load_state_dict(self._counted)

    def _note(self, scalars: dict[str, float], step: int) -> None:
        self.scalars = scalars

    def count_on_from(self, counted: dict[str, Any]) -> None:
        """Count on from :meth:`meter_state` of an earlier process, if there is a meter."""
        if self.meter is not None:
            self.meter.load_state_dict(counted)

    @property
    def report(self) -> MeterReport | None:
        """What was counted so far, or until the meter was closed."""
        return self._report if self.meter is None else self.meter.report()

    def end_meter(self, *, all_ranks: bool = False) -> bool:
        """Close the meter and keep its report; say whether there was one.

        Args:
            all_ranks: Whether every process calls this, so that they are added up.
        """
        if self.meter is None:
            return False
        meter, self.meter = self.meter, None
        self._counted = meter.state_dict()
        self._report = meter.report(all_ranks=all_ranks)
        meter.close()
        return True

    def revert(self, model: nn.Module) -> None:
        """Take the sparse backward off again."""
        revert(model)
