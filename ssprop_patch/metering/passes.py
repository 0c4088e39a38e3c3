"""Forward and backward passes of a model as they run: their seconds, and what they cost beside the
layers that are counted one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_compat import FakeTensor, current_graph_task_id, run_after_backward, tree_leaves
from .entries import Entries
from .other_work import CallCost, OtherWork
from .stopwatch import Stopwatch


class Passes:
    """Follows the passes of a model, and times them and the optimizer's steps.

    Args:
        model: The model, or what wraps it.
        stopwatch: Gets the seconds of ``"forward"``, ``"backward"`` and ``"optimizer"``.
        others: Gets the calls, and the backward passes through them.
        begins: Is called before each forward; returns whether it is one of a training.
    """

    def __init__(
        self,
        model: nn.Module,
        stopwatch: Stopwatch,
        others: OtherWork,
        begins: Callable[[], bool],
    ) -> None:
        self._stopwatch, self._others, self._begins = stopwatch, others, begins
        self._backward: int | None = None  # number of the backward pass that is being timed
        self._paused = False  # an optimizer that runs forward and backward itself
        self._in_closure = False
        self._entries = Entries(model, self._forward_begins, self._forward_ends)

    def next_iteration(self) -> bool:
        """An iteration ends; return whether a forward was seen in it."""
        return self._entries.next_iteration()

    def pause(self) -> None:
        """Follow nothing until :meth:`resume`."""
        self._entries.close()

    def resume(self) -> None:
        """Follow again what a model runs."""
        self._entries.watch_all()

    def close(self) -> None:
        """Follow nothing any more."""
        self._entries.close()
        self._others.close()

    # --- forward and backward -----------------------------------------------------------------

    def _forward_begins(self, module: nn.Module, args: Any, kwargs: Any) -> bool:
        leaves = tree_leaves((args, kwargs))
        self._stopwatch.forget("forward")  # of one that an interrupt left
        if any(type(leaf) is FakeTensor for leaf in leaves):
            return False  # a summary, a tracer: nothing runs
        if not self._begins():
            return False
        repeats = _backward_pass() is not None
        if not repeats:  # else it is a part of the backward's time
            self._pause_optimizer()
            self._stopwatch.start("forward")
        self._others.begin(module, leaves, repeats)
        return True

    def _forward_ends(self, output: Any, returned: bool) -> None:
        # Checkpointing leaves a forward that it repeats by an exception, once it has all it needs.
        repeats = _backward_pass() is not None
        cost = self._others.end(keep=returned or repeats)
        if not returned:
            self._stopwatch.forget("forward")
            return
        self._stopwatch.stop("forward")
        tensors = [t for t in _tensors(output) if t.grad_fn is not None]
        if cost is not None and not tensors and not repeats:
            self._others.goes_back(cost)  # through what it has left elsewhere
        call = _Call(cost, repeats)
        for t in tensors:
            t.register_hook(functools.partial(self._backward_begins, call))

    def _backward_begins(self, call: _Call, grad: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        number = _backward_pass()
        if call.goes_back_in(number):
            self._others.goes_back(call.cost)
        if number in (None, self._backward):
            return
        if call.repeats and self._stopwatch.is_running("backward"):
            return  # a backward within the backward
        self._backward = number
        if not run_after_backward(self._backward_ends):
            return
        self._pause_optimizer()
        self._stopwatch.start("backward")

    def _backward_ends(self) -> None:
        self._stopwatch.stop("backward")
        if not self._in_closure:
            self._go_on_with_optimizer()

    # --- the optimizer ------------------------------------------------------------------------

    def optimizer_begins(self) -> None:
        """The step of an optimizer of the model begins."""
        self._paused = self._in_closure = False
        if not self._stopwatch.is_running("optimizer"):  # its step may call that of its base
            self._stopwatch.start("optimizer")

    def closure_begins(self) -> None:
        """It calls its closure, in which forward, backward and more run."""
        self._in_closure = True
        self._pause_optimizer()

    def closure_ends(self) -> None:
        """The closure has returned."""
        self._in_closure = False
        self._go_on_with_optimizer()

    def optimizer_ends(self) -> None:
        """It is over; or that of another model's, and nothing runs."""
        self._stopwatch.stop("optimizer")

    def _go_on_with_optimizer(self) -> None:
        if self._paused:
            self._paused = False
            self._stopwatch.start("optimizer")

    def _pause_optimizer(self) -> None:
        if self._stopwatch.is_running("optimizer"):
            self._stopwatch.stop("optimizer")
            self._paused = True


class _Call:
    """A call of the model, or a repeated one; each backward pass through it costs as much."""

    def __init__(self, cost: CallCost | None, repeats: bool) -> None:
        self.cost = CallCost(0, 0) if cost is None else cost
        self.repeats = repeats
        self._latest: int | None = -1

    def goes_back_in(self, number: int | None) -> bool:
        """Whether the backward pass of this number gets to it for the first time."""
        known, self._latest = self._latest, number
        return number != known


def _backward_pass() -> int | None:
    """Return the number of the backward pass that this thread is in, or None."""
    number = current_graph_task_id()
    return None if number == -1 else number


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors in what a model returned, which may be an object that holds them."""
    leaves = tree_leaves(output)
    objects = [x for x in leaves if not isinstance(x, Tensor) and hasattr(x, "__dict__")]
    held = [x for one in objects for x in tree_leaves(vars(one))]
    return [t for t in (*leaves, *held) if isinstance(t, Tensor)]
