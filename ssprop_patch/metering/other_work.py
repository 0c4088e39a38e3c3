"""FLOPs of what a model runs beside the layers that are counted one by one.

Linear layers that are not converted, attention, functional calls: the first call with inputs of
some shapes is watched operator by operator, and later ones cost the same. Now and then one is
watched again, as what is frozen or skipped may change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from .._torch_compat import is_compiled, is_dynamo_imported, len_torch_dispatch_stack
from ..flops.products import Products
from ..flops.totals import Flops

# How often a call of known shapes is watched again: once in this many.
_AGAIN = 128
# Shapes whose costs are kept.
_MOST_SHAPES = 1024

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass
class CallCost:
    """What a call costs beside the layers, and how often there was one like it."""

    forward: int
    backward: int
    calls: int = 0


class OtherWork:
    """Adds up what calls of a model cost beside its layers.

    Attributes:
        forward, backward: FLOPs so far.
        unknown: Why they are not known; empty if they are.
    """

    def __init__(self) -> None:
        self.forward = self.backward = 0
        self.unknown = ""
        self._costs: dict[Any, CallCost] = {}
        self._key: Any = None
        self._products: Products | None = None  # while a call is watched
        self._watching = contextlib.ExitStack()

    @property
    def flops(self) -> Flops | None:
        """What was counted; None if a part of it is not known."""
        return None if self.unknown else Flops(self.forward, self.backward, self.backward)

    @property
    def is_watching(self) -> bool:
        """Whether a call is being watched."""
        return self._products is not None

    def begin(self, module: nn.Module, leaves: Sequence[Any], repeats: bool) -> None:
        """A call begins.

        Args:
            module: What is called.
            leaves: Its arguments, out of lists and dicts.
            repeats: Whether it is one that checkpointing repeats, perhaps in part only.
        """
        self._stop_watching()  # of one that an interrupt left
        self._key = _key(module, leaves, repeats)
        cost = self._costs.get(self._key)
        if cost is not None and cost.calls % _AGAIN:
            return
        why_not = _why_not_watched(module)
        if not why_not:
            self._watch()
        elif cost is None:
            self.lose(why_not)

    def end(self, keep: bool) -> CallCost | None:
        """The call has ended; return what it cost, None if that is not known.

        Args:
            keep: Whether the next one like it will cost as much.
        """
        products = self._products
        self._stop_watching()
        cost = self._costs.get(self._key)
        if products is not None:
            calls = 0 if cost is None else cost.calls
            cost = CallCost(products.forward, products.backward, calls)
            self.lose(products.unknown)
            if keep and self._key is not None:
                self._keep(cost)
        if cost is not None:
            cost.calls += 1
            self.forward += cost.forward
        return cost

    def goes_back(self, cost: CallCost) -> None:
        """The backward pass of a call begins."""
        self.backward += cost.backward

    def claim(self, forward: int) -> None:
        """Leave out what has just run, of so many FLOPs: it is a layer's that is counted itself."""
        if self._products is not None:
            self._products.claim(forward)

    def lose(self, why: str) -> None:
        """Something ran that could not be counted; nothing has happened if ``why`` is empty."""
        self.unknown = self.unknown or why

    def load(self, forward: int, backward: int, unknown: str) -> None:
        """Go on from these counts."""
        self.forward, self.backward, self.unknown = forward, backward, unknown

    def close(self) -> None:
        """Nothing more is counted."""
        self._stop_watching()

    def _keep(self, cost: CallCost) -> None:
        self._costs[self._key] = cost
        if len(self._costs) > _MOST_SHAPES:
            del self._costs[next(iter(self._costs))]

    def _watch(self) -> None:
        if is_dynamo_imported():  # compiled functions in the model would see the mode
            self._watching.enter_context(torch.compiler.set_stance("force_eager"))
        self._products = self._watching.enter_context(Products())

    def _stop_watching(self) -> None:
        # Modes leave in the order of a stack. Above ours is another one only if that was left there
        # by a call that failed; then ours stays until it is gone.
        if self._products is not None and len_torch_dispatch_stack() == 1:
            self._products = None
            self._watching.close()


def _key(module: nn.Module, leaves: Sequence[Any], repeats: bool) -> Any:
    """Return what calls of the same cost have in common; None where that cannot be told."""
    parts: list[Any] = [module, torch.is_grad_enabled(), repeats]
    for leaf in leaves:
        if isinstance(leaf, Tensor) and not leaf.is_nested:
            parts.append((leaf.shape, leaf.requires_grad))
        elif isinstance(leaf, _PLAIN):
            # Not the value of a number, which may be another one in every call.
            parts.append(leaf if isinstance(leaf, (bool, str, type(None))) else type(leaf))
        else:
            return None
    return tuple(parts)


def _why_not_watched(module: nn.Module) -> str:
    """Return why a call cannot be watched; nothing if it can."""
    parts = list(module.modules())
    if any(map(is_compiled, parts)):
        return "what torch.compile has compiled is not seen"
    if any(isinstance(part, DataParallel) for part in parts):
        return "DataParallel runs copies of the model in threads"
    if len_torch_dispatch_stack():
        return "a TorchDispatchMode of somebody else was active"
    return ""
