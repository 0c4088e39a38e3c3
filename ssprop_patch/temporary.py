"""For a while: another drop rate (``sparsity``, ``dense``), or a count that stands (``paused``)."""

from __future__ import annotations

from torch import nn
from torch.utils._contextlib import _DecoratorContextManager

from ._validate import check_drop_rate
from .controller import SparsityController, find_controllers, get_controller


class sparsity(_DecoratorContextManager):  # lower case, as torch.no_grad
    """Use another drop rate for a while: a context manager, and a decorator.

    Nests (the innermost rate counts), is undone on exceptions, and leaves the schedule alone: t
    may advance meanwhile. In eager mode the rate is fixed when a layer's forward runs; in compiled
    code when its backward runs, so keep the backward inside.

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


class paused(_DecoratorContextManager):  # lower case, as torch.no_grad
    """Count no optimizer step for a while: a context manager, and a decorator.

    For what trains and then puts everything back: a learning-rate range test, a warm-up before
    profiling, a batch-size finder. t stays, and so does the drop rate; the
    controller's ``step()`` and ``drop_rate`` still set them. Nests, and is undone on exceptions.

    Args:
        model: A converted model, or a part of one, or what wraps it: nothing counts for any of
            its controllers. Needs to be converted on entry only.

    Raises:
        ValueError: On entry, if the model is not converted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._entered: list[list[SparsityController]] = []

    def clone(self) -> paused:
        """Return a fresh manager with the same argument, for each call of a decorated function."""
        return paused(self.model)

    def __enter__(self) -> None:
        controllers = find_controllers(self.model) or [get_controller(self.model)]
        for controller in controllers:
            controller.pause()
        self._entered.append(controllers)

    def __exit__(self, *exc_info: object) -> None:
        for controller in self._entered.pop():
            controller.resume()
