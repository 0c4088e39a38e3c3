"""Counting training iterations from the outside: which optimizer steps are a model's own.

torch reports every ``optimizer.step()`` of the process to one global hook. A step counts when the
optimizer holds parameters of the layers watched, and once an iteration where several of them do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import chain
from types import FrameType
from typing import Any
from weakref import WeakMethod, WeakSet, ref

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class IterationWatch:
    """Calls back once for each training iteration of the modules it watches.

    Args:
        on_iteration: A bound method; held weakly, as are all modules and optimizers.
    """

    def __init__(self, on_iteration: Callable[[], None]) -> None:
        self._on_iteration = WeakMethod(on_iteration)
        self._layers: WeakSet[nn.Module] = WeakSet()
        self._roots: WeakSet[nn.Module] = WeakSet()
        self._owned: WeakSet[Optimizer] = WeakSet()
        self._stepped: WeakSet[Optimizer] = WeakSet()
        _install_hook()
        _watches.add(self)

    def add(self, module: nn.Module, is_layer: bool) -> None:
        """Watch a layer; or a whole model, whose other parameters count as well.

        Where all convolutions are frozen, the optimizer holds none of the layers' parameters.
        """
        (self._layers if is_layer else self._roots).add(module)

    def discard(self, module: nn.Module) -> None:
        """Watch ``module`` no longer; without any layer left no step counts."""
        self._layers.discard(module)
        self._roots.discard(module)
        self._owned.clear()

    def after_step(self, optimizer: Optimizer) -> None:
        """Take note of one optimizer step."""
        if self._layers and self.owns(optimizer) and self._opens_iteration(optimizer):
            callback = self._on_iteration()
            if callback is not None:
                callback()

    def owns(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds parameters of the modules watched."""
        if optimizer in self._owned:
            return True
        # Looked up at the step, not at conversion: FSDP2 and others replace the parameters.
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        modules = chain(self._layers, self._roots)
        owns = any(id(p) in held for module in modules for p in module.parameters())
        if owns:
            self._owned.add(optimizer)
        return owns

    def _opens_iteration(self, optimizer: Optimizer) -> bool:
        # An iteration lasts until one of the optimizers in it steps a second time.
        opens = optimizer in self._stepped or not self._stepped
        if opens:
            self._stepped = WeakSet()
        self._stepped.add(optimizer)
        return opens


class Membership:
    """Ties a module to the watch of its controller, and a copy of it to the copy's.

    Kept as an attribute of the module. The reference back is weak, so that a model is freed as
    soon as it is dropped, yet copies and pickles go along: whoever copies the module's attributes
    copies this, which enters the copy of the module with the copy of the controller.

    Args:
        module: A patched layer, or the model that was converted.
        controller: Has the ``watch``.
        is_layer: Which of the two ``module`` is.
    """

    def __init__(self, module: nn.Module, controller: Any, is_layer: bool) -> None:
        self._module = ref(module)
        self.controller = controller
        self._is_layer = is_layer
        controller.watch.add(module, is_layer)

    def __reduce__(self) -> tuple[Any, ...]:
        return Membership, (self._module(), self.controller, self._is_layer)


if "_watches" not in globals():  # else this module is reloaded: the hook that there is goes on
    _watches: WeakSet[IterationWatch] = WeakSet()
    _hook: Any = None


def _install_hook() -> None:
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_optimizer_step)


def _after_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling() and _is_in_a_step_of(optimizer, sys._getframe(1)):
        return  # its class calls super().step(), and torch tells of both
    errors = []
    for watch in list(_watches):
        try:
            watch.after_step(optimizer)
        except Exception as error:  # one model's schedule must not keep the others from counting
            errors.append(error)
    if errors:
        raise errors[0]


def _is_in_a_step_of(optimizer: Optimizer, caller: FrameType) -> bool:
    """Whether ``caller``, torch's wrapper of a step, runs inside another one of ``optimizer``."""
    frame = caller.f_back
    while frame is not None:
        if frame.f_code is caller.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False
