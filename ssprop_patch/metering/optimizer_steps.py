"""Tells meters when the step of an optimizer begins and ends.

torch's hooks outlive a meter that nobody closes, so that they hold meters weakly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


class Metered(Protocol):
    """What a meter does at the steps of an optimizer."""

    def optimizer_begins(self, optimizer: Optimizer) -> None:
        """The step of an optimizer begins."""

    def closure_begins(self) -> None:
        """It calls its closure: what runs is no part of the optimizer."""

    def closure_ends(self) -> None:
        """That has returned."""

    def optimizer_ends(self) -> None:
        """It has ended."""


if "_meters" not in globals():  # else this module is reloaded: the hooks that there are go on
    _meters: WeakSet[Metered] = WeakSet()
    _hooks: list[Any] = []


def tell(meter: Metered) -> None:
    """Call ``meter.optimizer_begins`` and ``optimizer_ends`` from now on."""
    _meters.add(meter)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_begins))
        _hooks.append(register_optimizer_step_post_hook(_ends))


def tell_no_more(meter: Metered) -> None:
    """Call them no longer."""
    _meters.discard(meter)


def _begins(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    meters = list(_meters)
    for meter in meters:
        meter.optimizer_begins(optimizer)
    if torch.compiler.is_compiling():
        return None
    # As torch gives them: the optimizer is the first of args. Lightning's closure is all of a step.
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": _told(kwargs["closure"], meters)}
    if len(args) > 1 and callable(args[1]):
        return (args[0], _told(args[1], meters), *args[2:]), kwargs
    return None


def _told(closure: Callable[[], Any], meters: Sequence[Metered]) -> Callable[[], Any]:
    """Return a closure that tells meters when it begins and ends."""

    def run() -> Any:
        for meter in meters:
            meter.closure_begins()
        try:
            return closure()
        finally:
            for meter in meters:
                meter.closure_ends()

    return run


def _ends(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for meter in list(_meters):
        meter.optimizer_ends()
