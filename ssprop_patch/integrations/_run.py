"""What every trainer's callback does with a model; the callbacks say when."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..patching.convert import convert, is_converted, revert
from ..schedule.controller import SparsityController, find_controllers, get_controller

#: How trainers' logs call the rate.
DROP_RATE = "ssprop/drop_rate"

INSTALL = 'pip install "ssprop_patch[integrations]"'


class Run:
    """Converts a model, tells its controller the trainer's epochs, and keeps its state.

    Args:
        schedule: As for :func:`ssprop_patch.convert`; None, and no ``arguments``, for a model that
            is converted already.
        arguments: Further arguments of :func:`ssprop_patch.convert`.

    Raises:
        TypeError, ValueError: If an argument is not one of convert's, or a schedule is not valid.
    """

    def __init__(self, schedule: Any, arguments: Mapping[str, Any]) -> None:
        given = dict(arguments) if schedule is None else {"schedule": schedule, **arguments}
        inspect.signature(convert).bind(None, **given)  # misspelt: fails here, not at the first fit
        self._converts = bool(given)
        self._shared = given.pop("controller", None)
        self._making = {n: given.pop(n) for n in ("schedule", "steps_per_epoch") if n in given}
        if self._shared is not None and self._making:
            raise ValueError(f"{', '.join(self._making)}: these belong to the controller given")
        SparsityController(**self._making)  # for its checks
        self._layers = given
        self._tells_epochs = self._told = self._goes_on = False
        self.controller: SparsityController | None = None

    def begin(self, model: nn.Module, anew: bool = True) -> None:
        """Convert ``model`` if that was asked for, and find its controller.

        Args:
            model: What the trainer trains.
            anew: Whether t starts from 0, if the controller is this object's own.

        Raises:
            ValueError: If the model is not converted and nothing says how to.
        """
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

    @property
    def drop_rate(self) -> float:
        """The controller's rate now; after :meth:`begin`."""
        return self._begun().drop_rate

    def _begun(self) -> SparsityController:
        if self.controller is None:
            raise RuntimeError("the training has not begun: there is no controller yet")
        return self.controller

    def epoch(self, epoch: int) -> None:
        """Tell the controller which epoch begins; one that it is in already changes nothing."""
        controller = self._begun()
        if self._tells_epochs and not (self._told and epoch == controller.t):
            controller.step(epoch)
            self._told = True

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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; after :meth:`begin`."""
        controller = self._begun()
        controller.load_state_dict(dict(state))
        self._goes_on = True
        self._told = bool(state["by_hand"])
        # The caller counted then, so the optimizer hook does not; this run has to count too.
        if self._told and state["steps_per_epoch"] is None:
            self._tells_epochs = controller.schedule.interval == "epoch"

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

    def end(self, model: nn.Module) -> None:
        """Take the sparse backward off again."""
        revert(model)
