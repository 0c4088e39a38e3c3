"""For a while: another drop rate (``sparsity``, ``dense``), or a count that stands (``paused``)."""

from __future__ import annotations

from torch import nn

from .._torch_compat import DecoratorContextManager
from .._validate import check_drop_rate
from .controller import SparsityController, TemporaryRate, find_controllers, get_controller


class sparsity(DecoratorContextManager):  # lower case, as torch.no_grad
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
        self._entered: list[tuple[TemporaryRate, list[SparsityController]]] = []

    def clone(self) -> sparsity:
        """Return a fresh manager with the same arguments, for each call of a decorated function."""
        return sparsity(self.model, self.drop_rate)

    def __enter__(self) -> None:
        controllers = find_controllers(self.model) or [get_controller(self.model)]
        temporary = TemporaryRate(self.drop_rate)
        try:
            for controller in controllers:
                controller.push_rate(temporary)
            self._entered.append((temporary, controllers))
        except BaseException:  # an interrupt: nobody will leave this block
            self._end(temporary, controllers)
            raise

    def __exit__(self, *exc_info: object) -> None:
        temporary, controllers = self._entered[-1]
        try:
            self._end(temporary, controllers)
        finally:  # once more, which changes nothing but where an interrupt came
            self._end(temporary, controllers)

    def _end(self, temporary: TemporaryRate, controllers: list[SparsityController]) -> None:
        for controller in controllers:
            controller.pop_rate(temporary)
        self._entered[:] = [entry for entry in self._entered if entry[0] is not temporary]


def dense(model: nn.Module) -> sparsity:
    """Use the ordinary backward for a while: ``sparsity(model, 0)``."""
    return sparsity(model, 0.0)


class paused(DecoratorContextManager):  # lower case, as torch.no_grad
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
        self._entered: list[tuple[object, list[SparsityController]]] = []

    def clone(self) -> paused:
        """Return a fresh manager with the same argument, for each call of a decorated function."""
        return paused(self.model)

    def __enter__(self) -> None:
        controllers = find_controllers(self.model) or [get_controller(self.model)]
        reason = object()
        try:
            for controller in controllers:
                controller.pause(reason)
            self._entered.append((reason, controllers))
        except BaseException:  # an interrupt: nobody will leave this block
            self._end(reason, controllers)
            raise

    def __exit__(self, *exc_info: object) -> None:
        reason, controllers = self._entered[-1]
        try:
            self._end(reason, controllers)
        finally:  # once more, which changes nothing but where an interrupt came
            self._end(reason, controllers)

    def _end(self, reason: object, controllers: list[SparsityController]) -> None:
        for controller in controllers:
            controller.resume(reason)
        self._entered[:] = [entry for entry in self._entered if entry[0] is not reason]
