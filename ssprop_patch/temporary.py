"""Temporary drop rates: ``with sparsity(model, 0.5):`` and ``with dense(model):``."""

from __future__ import annotations

from torch import nn
from torch.utils._contextlib import _DecoratorContextManager

from ._validate import check_drop_rate
from .controller import SparsityController, find_controllers, get_controller


class sparsity(_DecoratorContextManager):  # lower case, as torch.no_grad
    """Use another drop rate for a while: a context manager, and a decorator.

    Nests (the innermost rate counts), is undone on exceptions, and leaves the schedule alone: t
    may advance meanwhile. The rate of a backward is that of its forward, so it may run outside, in
    compiled code too. Checkpointing that runs the forward again inside of the backward takes the
    rate then in force: always with reentrance, without it around compiled code only.

    Args:
        model: A converted model, or a part of one: the rate holds for all layers that share its
            controllers. Needs to be converted on entry only.
        drop_rate: In [0, 1). Layers with a rate of their own (``overrides``) keep theirs unless
            this is 0.

    Raises:
        TypeError, ValueError: If the rate is not valid; on entry, if the model is not converted.
    """

    def __init__(self, model: nn.Module, drop_rate: float) -> None:
        self.model = model
        self.drop_rate = check_drop_rate(drop_rate)
        self._entered: list[list[tuple[SparsityController, object]]] = []

    def clone(self) -> sparsity:
        """Return a fresh manager with the same arguments, for each call of a decorated function."""
        return sparsity(self.model, self.drop_rate)

    def __enter__(self) -> None:
        controllers = find_controllers(self.model) or [get_controller(self.model)]
        self._entered.append([(c, c.push_rate(self.drop_rate)) for c in controllers])

    def __exit__(self, *exc_info: object) -> None:
        for controller, token in self._entered.pop():
            controller.pop_rate(token)


def dense(model: nn.Module) -> sparsity:
    """Use the ordinary backward for a while: ``sparsity(model, 0)``."""
    return sparsity(model, 0.0)
