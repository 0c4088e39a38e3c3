"""Tells meters when the step of an optimizer begins and ends.

torch's hooks outlive a meter that nobody closes, so that they hold meters weakly.
"""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakSet

from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


class Metered(Protocol):
    """What a meter does at the steps of an optimizer."""

    def optimizer_begins(self, optimizer: Optimizer) -> None:
        """The step of an optimizer begins."""

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


def _begins(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for meter in list(_meters):
        meter.optimizer_begins(optimizer)


def _ends(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for meter in list(_meters):
        meter.optimizer_ends()
