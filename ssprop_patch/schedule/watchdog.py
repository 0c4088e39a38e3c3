"""The watchdog: says so, once, where a model should train sparsely and does not.

It looks at few moments (the optimizer steps 1, 2, 4, 8, ... and as many training passes), asks no
device for anything but a handful of comparisons at the start, and holds nothing alive.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.optim import Optimizer

from .call_counts import Calls, Ran, was_compiled
from .master_weights import MasterWeights
from .schedules import Schedule
from .step_counter import StepCounter
from .weight_probe import WeightProbe

_lock = threading.RLock()

# After this many looks nothing new is to be expected.
_LAST_LOOK = 1024
# Optimizer steps elsewhere before it is said that no optimizer holds the parameters of this model.
_ENOUGH_STEPS = 8


class Watched(Protocol):
    """What the watchdog asks of a :class:`~ssprop_patch.schedule.controller.SparsityController`."""

    drop_rate: float
    sparse: bool
    step_counter: StepCounter

    @property
    def schedule(self) -> Schedule:
        """The schedule."""

    @property
    def t(self) -> int:
        """Epochs or steps so far."""

    @property
    def by_hand(self) -> bool:
        """Whether somebody called its ``step()``."""

    def adopt(self, optimizer: Optimizer, steps: int) -> None:
        """Count the steps of an optimizer from now on, and the ``steps`` that it has made."""


class Lineage:
    """What a controller and its copies share: whether any of them is being trained.

    An average of the weights, or a model kept for later, is a copy that no optimizer knows.
    """

    def __init__(self) -> None:
        self.trained = False

    def __deepcopy__(self, memo: Any) -> Lineage:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Lineage, ()  # what is loaded from a file is a model of its own


class Watchdog:
    """Watches over the layers of one controller.

    Args:
        controller: Held weakly.
        lineage: Shared with the controllers that are its copies, or that it is a copy of.

    Attributes:
        findings: What was said, by the cause.
    """

    def __init__(self, controller: Watched, lineage: Lineage) -> None:
        self._controller = ref(controller)
        self.lineage = lineage
        self._calls: WeakKeyDictionary[nn.Module, Calls] = WeakKeyDictionary()
        self.findings: dict[str, str] = {}
        self._steps = 0  # of optimizers that hold the model's parameters
        self._other_steps: Counter[str] = Counter()  # of all others, by the optimizer's class
        self._probe: WeightProbe | None = None
        self._masters = MasterWeights(controller.step_counter)
        self._scout: ref[Calls] | None = None  # the layer at whose calls it looks
        self._at_last_look: tuple[int, int] = (0, 0)  # calls in training, and in eval()
        self._muted = 0

    def calls_of(self, module: nn.Module) -> Calls:
        """Return the counter of a layer: the one it had before, under the same controller."""
        with _lock:
            if module not in self._calls:
                self._calls[module] = Calls(self.saw_gradient)
                # That gradient is no sign of anything. (A copy has no parameters yet, nor one.)
                if "_parameters" in vars(module):
                    self._calls[module].old_gradient = _has_gradient(module)
            return self._calls[module]

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """Count nothing and say nothing meanwhile: the package itself runs the model."""
        with _lock:
            before = [(calls, calls.values()) for calls in self._calls.values()]
        self._muted += 1
        try:
            yield
        finally:
            self._muted -= 1
            for calls, values in before:
                calls.restore(values)

    def forget_weights(self) -> None:
        """Begin anew to look whether the weights change: now they may be put back."""
        self._probe = None

    # --- the moments it looks at ------------------------------------------------------------------

    def saw_gradient(self, calls: Calls, n: int) -> None:
        """A layer had its ``n``-th call of a kind that needs a gradient, 1, 2, 3, 4, 8, 16, ..."""
        if n > _LAST_LOOK or not self._expects_steps():
            return
        if self._scout is None:
            self._scout = ref(calls)
        if self._scout() is calls:
            self._look_at_weights()

    def after_iteration(self) -> None:
        """An optimizer that holds the model's parameters has stepped."""
        self._steps = n = self._steps + 1
        self.lineage.trained = True
        self._probe = None
        often = not n & (n - 1) if n < 64 else n % 64 == 0
        controller = self._controller()
        if often and controller is not None and not was_compiled():
            if not self._muted and _means_sparse(controller):
                self._look_at_layers(controller)
            self._at_last_look = self._totals()

    def after_other_step(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped that holds parameters of no converted model."""
        n = self._other_steps.total()
        if self._steps or self.lineage.trained or self._muted or n >= _LAST_LOOK:
            return
        self._other_steps[type(optimizer).__name__] += 1
        if self._expects_steps():
            self._masters.stepped(optimizer)
        n += 1
        if not (n < 4 or not n & (n - 1)):
            return
        if self._expects_steps():
            self._look_at_weights()
        controller = self._controller()
        if n >= _ENOUGH_STEPS and controller is not None and not was_compiled():
            self._look_at_other_steps(controller, optimizer)

    # --- no step is seen ------------------------------------------------------------------------

    def _expects_steps(self) -> bool:
        """Whether the rate depends on steps, and none has been counted yet."""
        controller = self._controller()
        return not (
            controller is None
            or self._steps
            or self._muted
            or self.lineage.trained
            or "steps" in self.findings
            or controller.schedule.is_constant
            or controller.by_hand
            or controller.step_counter.began
            or controller.step_counter.paused
        )

    def _look_at_weights(self) -> None:
        """Compare some weights with what they were at the last look.

        That they changed once may be a checkpoint that was loaded; twice is training.
        """
        controller = self._controller()
        if controller is None:
            return
        if self._probe is None:
            self._probe = WeightProbe(controller.step_counter)
        changes = self._probe.changed()
        if changes and (found := self._masters.recognise()) is not None:
            controller.adopt(*found)
        elif changes >= 2:
            self._say_unseen(controller, "the weights of this model change")

    def _look_at_other_steps(self, controller: Watched, optimizer: Optimizer) -> None:
        layers = self._layers(controller)
        steps = f"{self._other_steps.total()} optimizer steps were made"
        if any(calls.in_training for _, calls in layers):
            used = any(calls.in_training and _has_gradient(m) for m, calls in layers)
            if used and self._expects_steps():
                self._say_unseen(controller, f"this model gets gradients, and {steps}")
        elif (
            _means_sparse(controller)
            and not any(calls.ran() for _, calls in layers)
            and _holds_alike(optimizer, [m for m, _ in layers])
        ):
            del layers
            gc.collect()  # a model that a notebook's cell has built anew may be garbage already
            if not self._layers(controller):
                return
            self._say(
                "other model",
                f"{steps} by {type(optimizer).__name__} over parameters of the same shapes, but "
                "the model that was converted has not run once: another model is trained. Some "
                "trainers build or copy their own: convert that one, in a callback at the start "
                "of the training. If this model is only to be trained later, ignore this.",
            )

    def _say_unseen(self, controller: Watched, seen: str) -> None:
        tell = (
            "ssprop_patch.get_controller(model).step() after every step of the optimizer"
            if controller.schedule.interval == "step"
            else "ssprop_patch.get_controller(model).step(epoch) at the start of every epoch"
        )
        others = ", ".join(f"{name}: {n}" for name, n in self._other_steps.items())
        self._say(
            "steps",
            f"{seen}, but by no torch optimizer that holds its parameters"
            + (f" (steps of others: {others})" if others else "")
            + f". So no step is counted, and {controller.schedule!r} stays at t={controller.t}, "
            f"drop rate {controller.drop_rate:g}. That is so with optimizers that are no "
            "torch.optim.Optimizer (fastai's own, DeepSpeed) and with those over copies of the "
            f"weights (fp32 master weights). Call {tell}, or train with a torch optimizer over "
            "model.parameters().",
        )

    # --- steps are counted, but layers stay dense -----------------------------------------------

    def _look_at_layers(self, controller: Watched) -> None:
        layers = self._layers(controller)
        unused = [m for m, calls in layers if self.is_read_by_others(m, calls)]
        shared = _shared_parameters(controller.step_counter.roots) if unused else set()
        unused = [m for m in unused if not any(id(p) in shared for p in m.parameters())]
        if unused:
            self._say(
                "read by others",
                f"{_names(unused, controller)} was converted and has not run once in training, "
                "yet its weight gets a gradient: it is read by other code (a fused kernel, a "
                "functional call), so its backward is dense. Nothing is wrong with the gradient; "
                "exclude such layers to have plan() and summary() tell what is really saved.",
            )
        training, evaluated = self._totals()
        training -= self._at_last_look[0]
        if self._steps > 1 and not training and evaluated > self._at_last_look[1]:
            trained = (m for m, calls in layers if calls.evaluated)
            if any(p.requires_grad for m in trained for p in m.parameters()):
                self._say(
                    "eval",
                    "an optimizer trains this model while all its converted layers are in eval() "
                    "mode, in which a backward is dense and exact whatever the drop rate. Call "
                    "model.train() first; to freeze batch norms only, call .eval() on these alone.",
                )
        kept = [m for m, calls in layers if calls.keeps_all and _is_unaligned(m)]
        if kept and controller.schedule.is_constant and not any(c.sparse for _, c in layers):
            self._say(
                "keeps all",
                f"a drop rate of {controller.drop_rate:g} drops no channel of any layer, as they "
                "have few: the backward is dense. Choose a higher rate.",
            )

    def is_read_by_others(self, module: nn.Module, calls: Calls) -> bool:
        """Whether a layer's weight got a gradient since the conversion, though it never ran."""
        if calls.in_training or calls.evaluated or was_compiled():
            return False
        has_gradient = _has_gradient(module)
        calls.old_gradient = calls.old_gradient and has_gradient
        return has_gradient and not calls.old_gradient

    # --- helpers --------------------------------------------------------------------------------

    def _layers(self, controller: Watched) -> list[tuple[nn.Module, Calls]]:
        return [(module, self.calls_of(module)) for module in controller.step_counter.layers]

    def _totals(self) -> tuple[int, int]:
        with _lock:
            calls = list(self._calls.values())
        return sum(c.in_training for c in calls), sum(c.evaluated for c in calls)

    def _say(self, cause: str, text: str) -> None:
        if cause not in self.findings:  # before: a warning may be an exception
            self.findings[cause] = text
            warnings.warn(f"ssprop_patch: {text}", UserWarning, stacklevel=2)


def _means_sparse(controller: Watched) -> bool:
    """Whether the rate is above 0 now, or may be later."""
    return controller.sparse or not controller.schedule.is_constant


def _is_unaligned(module: nn.Module) -> bool:
    policy = vars(module).get("_ssprop_policy")
    return policy is not None and policy.align == 1


def _has_gradient(module: nn.Module) -> bool:
    return any(p.requires_grad and p.grad is not None for p in module.parameters())


def _shared_parameters(roots: list[nn.Module]) -> set[int]:
    """Return the ids of the parameters that several modules hold: any of them may run."""
    modules = {m for root in roots for m in root.modules()}
    held = Counter(id(p) for m in modules for p in m._parameters.values() if p is not None)
    return {key for key, n in held.items() if n > 1}


def _names(modules: list[nn.Module], controller: Watched) -> str:
    names = {m: n for root in controller.step_counter.roots for n, m in root.named_modules()}
    shown = [names.get(m) or type(m).__name__ for m in modules[:3]]
    return ", ".join(map(repr, shown)) + f" and {len(modules) - 3} more" * (len(modules) > 3)


def _holds_alike(optimizer: Optimizer, layers: list[nn.Module]) -> bool:
    """Whether an optimizer holds parameters of the shapes of most of these layers' weights."""
    held = Counter(tuple(p.shape) for group in optimizer.param_groups for p in group["params"])
    wanted = Counter(tuple(p.shape) for m in layers for p in m.parameters() if p.dim() > 1)
    return 2 * (held & wanted).total() > wanted.total()


def what_ran(module: nn.Module) -> tuple[Ran | None, str]:
    """Return how often a layer ran, None if it is not converted, and a remark for its plan."""
    membership = vars(module).get("_ssprop_membership")
    if membership is None or module not in membership.controller.step_counter:
        return None, ""  # a meter's own
    calls = membership.calls
    read = membership.controller.watchdog.is_read_by_others(module, calls)
    return calls.ran(), ", but never called: its weight is read by others, so dense" * read
