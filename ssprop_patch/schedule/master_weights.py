"""Optimizers over copies of a model's weights: master weights in float32, as Apex O2 and mmcv do.

Such an optimizer holds none of the model's parameters. That it trains them is known once the
model's weights have changed and are its own, rounded: all of them, one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from .step_counter import StepCounter


class MasterWeights:
    """Recognises the optimizer over copies of the weights of the modules that are watched.

    Args:
        watch: Knows the modules.
    """

    def __init__(self, watch: StepCounter) -> None:
        self._watch = watch
        self._steps: WeakKeyDictionary[Optimizer, int | None] = WeakKeyDictionary()

    def stepped(self, optimizer: Optimizer) -> None:
        """Take note of a step of an optimizer that holds none of the parameters."""
        if optimizer not in self._steps:
            alike = [p.shape for p in _held(optimizer)] == [p.shape for p in self._trained()]
            self._steps[optimizer] = 0 if alike else None
        steps = self._steps[optimizer]
        if steps is not None:
            self._steps[optimizer] = steps + 1

    def recognise(self) -> tuple[Optimizer, int] | None:
        """Return the optimizer whose copies the weights are, and its steps so far, or None.

        For when the weights are known to have changed, as two models may begin with the same ones.
        """
        candidates = [(o, steps) for o, steps in self._steps.items() if steps]
        if not candidates:
            return None
        ours = self._trained()
        for optimizer, steps in candidates:
            masters = _held(optimizer)
            if len(masters) == len(ours) and all(map(_is_copy, ours, masters)):
                return optimizer, steps
        return None

    def _trained(self) -> list[Tensor]:
        """Return the trainable parameters, in the order of the model."""
        found = {
            id(p): p
            for root in self._watch.roots or self._watch.layers
            for p in root.parameters()
            if p.requires_grad
        }
        return list(found.values())


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def _is_copy(ours: Tensor, master: Tensor) -> bool:
    if ours.shape != master.shape or ours.device != master.device or ours.is_meta:
        return False
    return torch.equal(ours, master.to(ours.dtype))
