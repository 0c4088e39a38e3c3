"""The controller: one object that holds schedule, counter and current drop rate of a model.

Every patched layer reads the rate from its controller, so that changing it is one write however
many layers there are. The counter advances by itself: torch's global optimizer hook reports each
step, and a controller counts the steps of the optimizer that holds its parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .._validate import check_count, check_drop_rate
from ..core.selection import RandomScores
from . import presets
from .layer_state import check_layers_state, layers_state, load_layers_state
from .schedules import Schedule, as_schedule
from .settings import rate_tensor
from .step_counter import StepCounter
from .traced_rates import rates_to_trace
from .watchdog import Lineage, Watchdog


class TemporaryRate:
    """A rate that is in force for a while; compared by identity."""

    def __init__(self, rate: float) -> None:
        self.rate = rate


class SparsityController:
    """Holds the schedule, the counter t and the current drop rate of a converted model.

    Made by :func:`ssprop_patch.convert`; made by hand it can be shared by several models
    (``convert(..., controller=c)``).

    Args:
        schedule: A schedule, a number (constant rate), or a callable t -> drop rate.
        steps_per_epoch: Optimizer steps in one epoch, for a schedule that counts epochs: with
            gradient accumulation fewer than the loader's batches.
        seed: For ``selection="random"``; default ``torch.initial_seed()``.

    Raises:
        TypeError, ValueError: If an argument, or the schedule's value at t = 0, is not valid.
    """

    def __init__(
        self,
        schedule: Schedule | float | Callable[[int], float] = presets.PAPER,
        *,
        steps_per_epoch: int | None = None,
        seed: int | None = None,
    ) -> None:
        self._schedule = as_schedule(schedule)
        if steps_per_epoch is not None:
            steps_per_epoch = check_count(steps_per_epoch, "steps_per_epoch", 1)
        self._steps_per_epoch = steps_per_epoch
        self._t = 0
        self._steps = 0  # optimizer steps since t last advanced
        self._by_hand = False  # somebody called step(): the optimizer hook no longer counts
        self._warned = False
        self.random_scores = RandomScores(seed)
        self._traced_rates = rates_to_trace(self._schedule)
        self._temporary: list[TemporaryRate] = []
        self._set_rate(self._schedule(0))
        self._lineage = Lineage()
        self._begin_to_watch()

    def _begin_to_watch(self) -> None:
        self.step_counter = StepCounter(self._on_iteration, self._on_other_step)
        self.watchdog = Watchdog(self, self._lineage)

    # --- the rate -----------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """The schedule; to change it, convert again."""
        return self._schedule

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in one epoch, or None."""
        return self._steps_per_epoch

    @property
    def t(self) -> int:
        """The counter that the schedule is asked with: epochs or optimizer steps."""
        return self._t

    @property
    def drop_rate(self) -> float:
        """The drop rate in force: of the innermost context manager, else the last one set.

        Setting it holds until t next advances; inside a context manager it shows once that ends.
        """
        return self._drop_rate

    @drop_rate.setter
    def drop_rate(self, value: float) -> None:
        self._set_rate(check_drop_rate(value))

    def _set_rate(self, rate: float) -> None:
        self._scheduled_rate = rate
        self._refresh()

    def _refresh(self) -> None:
        in_force = self._temporary[-1].rate if self._temporary else self._scheduled_rate
        # A bool of its own: torch.compile guards on what it reads, and on this twice at most.
        # All in one line, as an interrupt does not come between. The tensor is new each time, for
        # what a compiled forward saved must not change: see settings.py.
        tensor, traced = rate_tensor(in_force), None
        if not torch.compiler.is_compiling():
            traced = self._traced_rates.get(in_force)
        self._drop_rate, self.sparse, self.rate_tensor, self.traced_rate = (
            in_force,
            in_force > 0.0,
            tensor,
            traced,
        )

    def push_rate(self, temporary: TemporaryRate) -> None:
        """Put a temporary rate in force, until :meth:`pop_rate`."""
        self._temporary.append(temporary)
        self._refresh()

    def pop_rate(self, temporary: TemporaryRate) -> None:
        """End a temporary rate; in any order, as generators may leave their blocks.

        One that is not in force any more, or never was, changes nothing.
        """
        if temporary in self._temporary:
            self._temporary.remove(temporary)
        self._refresh()

    # --- the counter --------------------------------------------------------------------------

    def step(self, t: int | None = None) -> None:
        """Advance t by one, or set it; from then on the caller owns the count.

        Args:
            t: The new value, absolute: ``controller.step(epoch)`` at the start of an epoch. None
                adds one.

        Raises:
            TypeError, ValueError: If ``t``, or the schedule's value there, is not valid; nothing
                has changed then.
        """
        self._advance(self._t + 1 if t is None else check_count(t, "t", 0))
        self._by_hand = True

    def _advance(self, t: int) -> None:
        rate = self._schedule(t)  # may raise: before anything changes
        self._t, self._steps = t, 0
        self._set_rate(rate)

    @property
    def by_hand(self) -> bool:
        """Whether somebody called :meth:`step`, so that optimizer steps are not counted."""
        return self._by_hand

    def _on_iteration(self) -> None:
        self._count_step()
        self.watchdog.after_iteration()  # last: its warning may be an exception

    def _on_other_step(self, optimizer: Optimizer) -> None:
        self.watchdog.after_other_step(optimizer)

    def adopt(self, optimizer: Optimizer, steps: int) -> None:
        """Count the steps of an optimizer from now on, and the ``steps`` that it has made."""
        self.step_counter.adopt(optimizer)
        for _ in range(steps):
            self._on_iteration()

    def pause(self, reason: object) -> None:
        """Count no optimizer step until :meth:`resume` with the same ``reason``."""
        self.step_counter.pause(reason)
        self.watchdog.forget_weights()

    def resume(self, reason: object) -> None:
        """End one :meth:`pause`; one that has ended, or never was, changes nothing."""
        self.watchdog.forget_weights()
        self.step_counter.resume(reason)

    def _count_step(self) -> None:
        if self._by_hand:
            return
        if self._schedule.interval == "step":
            self._advance(self._t + 1)
        elif self._steps_per_epoch is None:
            self._warn_that_epochs_are_unknown()
        elif self._steps + 1 >= self._steps_per_epoch:
            self._advance(self._t + 1)
        else:
            self._steps += 1

    def _warn_that_epochs_are_unknown(self) -> None:
        if self._warned or self._schedule.is_constant:
            return
        self._warned = True
        warnings.warn(
            f"{self._schedule!r} counts epochs, but nothing has told the controller when one "
            f"ends: the drop rate stays at {self._drop_rate:g}. Pass "
            "convert(..., steps_per_epoch=len(loader)), or call "
            "ssprop_patch.get_controller(model).step(epoch) at the start of every epoch, or use "
            "a schedule with interval='step'.",
            UserWarning,
            stacklevel=2,
        )

    # --- checkpoints and copies ---------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` needs to go on exactly here.

        Plain scalars, and under ``selection="principal"`` the tensors of each layer.
        """
        layers = layers_state(self.step_counter)
        return {
            "version": 1,
            "schedule": repr(self._schedule),
            "steps_per_epoch": self._steps_per_epoch,
            "t": self._t,
            "steps": self._steps,
            "by_hand": self._by_hand,
            "drop_rate": self._scheduled_rate,
            "seed": self.random_scores.seed,
            "draws": self.random_scores.draws,
            **({"layers": layers} if layers else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken.

        The number of steps per epoch may differ (another batch size); the schedule may not.

        Raises:
            ValueError: If the state is not a controller's, of another schedule or of other layers;
                nothing has changed then.
        """
        missing = sorted(set(self.state_dict()) - set(state) - {"layers"})
        if missing:
            raise ValueError(f"not the state of a SparsityController: {missing} missing")
        if state["version"] != 1:
            raise ValueError(f"state of version {state['version']!r}; this package reads version 1")
        if state["schedule"] != repr(self._schedule):
            raise ValueError(
                "the state belongs to another schedule: it was saved with "
                f"{state['schedule']}, this controller has {self._schedule!r}. Convert with the "
                "saved schedule, or start the new one without loading."
            )
        t = check_count(state["t"], "t", 0)
        steps = check_count(state["steps"], "steps", 0)
        rate = check_drop_rate(state["drop_rate"])
        seed, draws = int(state["seed"]), check_count(state["draws"], "draws", 0)
        layers = state.get("layers", {})
        check_layers_state(self.step_counter, layers)
        self._t, self._steps, self._by_hand = t, steps, bool(state["by_hand"])
        load_layers_state(self.step_counter, layers)
        self.random_scores.seed, self.random_scores.draws = seed, draws
        self._set_rate(rate)

    def manual_seed(self, seed: int) -> None:
        """Restart the sequence of ``selection="random"`` from ``seed``."""
        self.random_scores.seed, self.random_scores.draws = int(seed), 0

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        # Of its own layers, which add themselves; and a tensor of its own.
        del state["step_counter"], state["watchdog"], state["rate_tensor"]
        state["_temporary"] = []  # and is not inside the original's context managers
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._refresh()
        self._begin_to_watch()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self._schedule!r}, steps_per_epoch={self._steps_per_epoch}) "
            f"at t={self._t}, drop_rate={self._drop_rate:g}"
        )


# --- finding controllers ----------------------------------------------------------------------


def find_controllers(module: nn.Module) -> list[SparsityController]:
    """Return the controllers of all patched layers in ``module``, in order of appearance."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(module).__name__}")
    found: dict[int, SparsityController] = {}
    for m in module.modules():
        policy = m.__dict__.get("_ssprop_policy")
        if policy is not None:
            found.setdefault(id(policy.controller), policy.controller)
    return list(found.values())


def get_controller(module: nn.Module) -> SparsityController:
    """Return the controller of a converted model.

    Args:
        module: The model, a part of it, or what wraps it (DDP, ``torch.compile``, EMA).

    Raises:
        ValueError: If nothing in it is converted, or its parts have different controllers.
    """
    found = find_controllers(module)
    if not found:
        raise ValueError(
            f"this {type(module).__name__} is not converted: call ssprop_patch.convert(model) first"
        )
    if len(found) > 1:
        raise ValueError(
            f"this {type(module).__name__} holds {len(found)} controllers; ask with one of its "
            "converted parts, or convert them with one controller=..."
        )
    return found[0]
