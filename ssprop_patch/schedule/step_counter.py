"""Counting training iterations from the outside: which optimizer steps are a model's own.

torch reports every ``optimizer.step()`` of the process to one global hook. A step counts when the
optimizer holds parameters of the layers watched, and once an iteration where several of them do.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod, WeakSet, ref

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .._torch_compat import disable_dynamo

if "_lock" not in globals():  # else this module is reloaded: what there is goes on
    # Models are converted in one thread while others train in another: no set below is changed or
    # looked through without it. One for all, as it is held for microseconds.
    _lock = threading.RLock()
    _watches: WeakSet[StepCounter] = WeakSet()
    _hooks: list[Any] = []


class StepCounter:
    """Calls back once for each training iteration of the modules it watches.

    Args:
        on_iteration: A bound method; held weakly, as are all modules and optimizers.
        on_other_step: A bound method that is called for the optimizer steps of the process that are
            no watched model's, with the optimizer.

    Attributes:
        began: Whether a step that counts has at least begun: one with a closure trains before it
            ends.
    """

    def __init__(
        self,
        on_iteration: Callable[[], None],
        on_other_step: Callable[[Optimizer], None] | None = None,
    ) -> None:
        self._on_iteration = WeakMethod(on_iteration)
        self._on_other_step = None if on_other_step is None else WeakMethod(on_other_step)
        # Dictionaries, which keep the order in which they were added.
        self._layers: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()
        self._roots: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()
        self._owned: WeakSet[Optimizer] = WeakSet()
        self._adopted: WeakSet[Optimizer] = WeakSet()
        self._stepped: WeakSet[Optimizer] = WeakSet()
        self._pauses: list[object] = []
        self.began = False
        _install_hooks()
        with _lock:
            _watches.add(self)

    def add(self, module: nn.Module, is_layer: bool) -> None:
        """Watch a layer; or a whole model, whose other parameters count as well.

        Where all convolutions are frozen, the optimizer holds none of the layers' parameters.
        """
        with _lock:
            (self._layers if is_layer else self._roots).setdefault(module)

    def discard(self, module: nn.Module) -> None:
        """Watch ``module`` no longer; without any layer left no step counts."""
        with _lock:
            self._layers.pop(module, None)
            self._roots.pop(module, None)
            self._owned.clear()

    def adopt(self, optimizer: Optimizer) -> None:
        """Take the steps of an optimizer for the model's own, whatever parameters it holds."""
        with _lock:
            self._adopted.add(optimizer)

    def __contains__(self, module: nn.Module) -> bool:
        with _lock:
            return module in self._layers

    @property
    def layers(self) -> list[nn.Module]:
        """The layers watched."""
        with _lock:
            return list(self._layers)

    @property
    def roots(self) -> list[nn.Module]:
        """The whole models watched."""
        with _lock:
            return list(self._roots)

    @property
    def paused(self) -> bool:
        """Whether no step counts at present."""
        return bool(self._pauses)

    def pause(self, reason: object) -> None:
        """Let no step count until :meth:`resume` with the same ``reason``."""
        with _lock:
            self._pauses.append(reason)

    def resume(self, reason: object) -> None:
        """End one :meth:`pause`; one that has ended, or never was, changes nothing."""
        with _lock:
            self._pauses[:] = [r for r in self._pauses if r is not reason]

    def after_step(self, optimizer: Optimizer, around: Sequence[Optimizer] | None) -> None:
        """Take note of one step of an optimizer that :meth:`owns` said yes to.

        Args:
            optimizer: Has made a step.
            around: Optimizers whose steps this one is a part of; None where that is not known.
        """
        if self.paused or any(self.owns(other) for other in around or ()):
            return  # torch tells of the whole step later
        callback = self._on_iteration()
        if callback is not None and self._opens_iteration(optimizer, around is not None):
            callback()

    def after_other_step(self, optimizer: Optimizer) -> None:
        """Take note of one step of an optimizer that no watch owns."""
        callback = None if self._on_other_step is None else self._on_other_step()
        if callback is not None and self._layers and not self.paused:
            callback(optimizer)

    def owns(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds parameters of the modules watched, among them a layer."""
        with _lock:
            if not self._layers:
                return False
            if optimizer in self._owned or optimizer in self._adopted:
                return True
            modules = [*self._layers, *self._roots]
        # Looked up at the step, not at conversion: FSDP2 and others replace the parameters.
        held = _parameters_of(optimizer)
        owns = any(id(p) in held for module in modules for p in module.parameters())
        if owns:
            with _lock:
                self._owned.add(optimizer)
        return owns

    def _opens_iteration(self, optimizer: Optimizer, may_replace: bool) -> bool:
        # An iteration lasts until one of the optimizers in it steps a second time, or one steps
        # that holds parameters of another: it was made anew, to take the place of that.
        with _lock:
            opens = optimizer in self._stepped or not self._stepped
            if not opens and may_replace:
                held = _parameters_of(optimizer)
                opens = any(not held.isdisjoint(_parameters_of(o)) for o in self._stepped)
            if opens:
                self._stepped = WeakSet()
            self._stepped.add(optimizer)
            return opens


def _parameters_of(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


class Membership:
    """Ties a module to the watch of its controller, and a copy of it to the copy's.

    Kept as an attribute of the module. The reference back is weak, so that a model is freed as
    soon as it is dropped, yet copies and pickles go along: whoever copies the module's attributes
    copies this, which enters the copy of the module with the copy of the controller.

    Args:
        module: A patched layer, or the model that was converted.
        controller: Has the ``watch`` and the ``watchdog``.
        is_layer: Which of the two ``module`` is.
    """

    def __init__(self, module: nn.Module, controller: Any, is_layer: bool) -> None:
        self._module = ref(module)
        self.controller = controller
        self._is_layer = is_layer
        controller.step_counter.add(module, is_layer)
        #: What the layer ran. The controller's, so that it outlasts a conversion for a while.
        self.calls = controller.watchdog.calls_of(module) if is_layer else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Membership, (self._module(), self.controller, self._is_layer)


def _install_hooks() -> None:
    with _lock:
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_before_optimizer_step))
            _hooks.append(register_optimizer_step_post_hook(_after_optimizer_step))


def _before_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    with _lock:
        watches = [w for w in _watches if not (w.began or w.paused)]
    for watch in watches:
        watch.began = watch.owns(optimizer)


def _after_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        _tell_untraced(optimizer, None)
        return
    around = _steps_around(sys._getframe(1))
    if not any(other is optimizer for other in around):
        # else its class calls super().step(), and torch tells of both
        _tell(optimizer, around)


def _tell(optimizer: Optimizer, around: Sequence[Optimizer] | None) -> None:
    """Tell the watches that own an optimizer of its step; where none does, tell all."""
    with _lock:
        watches = list(_watches)
    errors = []
    owners = [watch for watch in watches if watch.owns(optimizer)]
    for watch in owners or watches:
        try:
            if owners:
                watch.after_step(optimizer, around)
            else:
                watch.after_other_step(optimizer)
        except Exception as error:  # one model's schedule must not keep the others from counting
            errors.append(error)
    if errors:
        raise errors[0]


# With locks and weak sets: nothing for a compiled step to trace.
_tell_untraced = disable_dynamo(_tell)


def _steps_around(caller: FrameType) -> list[Optimizer]:
    """Return whose steps ``caller``, torch's wrapper of a step, runs inside of."""
    found: list[Any] = []
    frame = caller.f_back
    while frame is not None:
        if frame.f_code is caller.f_code:
            found.append(frame.f_locals.get("self"))
        frame = frame.f_back
    return found
