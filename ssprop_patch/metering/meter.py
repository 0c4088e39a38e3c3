"""What a training run really did: FLOPs, steps, seconds and joules, counted while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook as after_each_step
from torch.optim.optimizer import register_optimizer_step_pre_hook as before_each_step
from torch.utils import _pytree as pytree

from .._validate import check_count
from ..controller import Policy, SparsityController
from ..convert import Conversion, apply_conversion
from ..iterations import IterationWatch
from ..modules import LAYERS, base_layer
from ..plan import DEFAULT_TYPES, PlanRow, plan
from ..selection import l1_scores
from .channels import ChannelHistory
from .clock import Stopwatch
from .counting import LayerRecord
from .energy import Energy, EnergyCounter, find_counter
from .report import LayerReport, MeterReport

_COUNTED = (*DEFAULT_TYPES, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Meter:
    """Counts what the layers of a model do in training, and what that takes.

    FLOPs are of the convolutions, and of other layers that are converted: of each forward and
    backward call that runs in training mode, with the true number of kept channels. A forward that
    activation checkpointing repeats is a cost and counts. Nothing waits for the device: seconds
    come from CUDA events, or from the host's clock for a model on the CPU.

    Make it after ``convert`` (an unconverted model is metered as the dense one it is) and after
    moving the model to its device; under torch.compile or DDP from the wrapped model, so that it
    sees forward and backward begin. Converting again ends the counting.

    Args:
        model: The model, or what wraps it.
        energy: Whether to measure joules; or an :class:`ssprop_patch.metering.EnergyCounter` to
            measure them with.
        channels_every: Also count which channels each layer keeps, in windows of this many
            optimizer steps; see :attr:`channels`. Costs one small kernel a layer.

    Attributes:
        steps: Optimizer steps so far; one an iteration, where several optimizers step.
        channels: The :class:`ssprop_patch.metering.ChannelHistory`, or None.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the model has no layer to count, or is metered already.

    Example::

        ssp.convert(model, schedule=ssp.BarSchedule(0.8), steps_per_epoch=len(loader))
        meter = ssp.Meter(model)
        ...                          # the training loop, unchanged
        print(meter.report())
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        energy: bool | EnergyCounter = True,
        channels_every: int | None = None,
    ) -> None:
        if channels_every is not None:
            check_count(channels_every, "channels_every", 1)
        found = plan(model, types=_COUNTED)
        before = Conversion.of(model)
        if any(policy.record is not None for policy in before.layers.values()):
            raise ValueError("this model is metered already: close() the other meter first")
        rows = [row for row in found if row.module in before.layers or _is_countable(row)]
        if not rows:
            raise ValueError(f"no layer to count in this {type(model).__name__}")
        counted = {row.module for row in rows}
        self._not_counted = tuple(_name(row) for row in found if row.module not in counted)

        dense = SparsityController(0.0)
        self._records: dict[str, LayerRecord] = {}
        self._policies: dict[nn.Module, Policy] = {}
        for row in rows:
            base = base_layer(row.cls)
            transposed = base is not None and LAYERS[base].transposed
            record = LayerRecord(_name(row), transposed, count_channels=channels_every is not None)
            policy = before.layers.get(row.module) or Policy(dense, l1_scores, 0.0)
            self._records[record.name] = record
            self._policies[row.module] = policy.metered(record)
        self._model, self._before = model, before
        apply_conversion(Conversion(self._policies, before.roots), within=model)

        self.steps = 0
        self.channels = (
            None if channels_every is None else ChannelHistory(self._records, channels_every)
        )
        self._on_step: list[Callable[[Meter], None]] = []
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._stopwatch = Stopwatch.on(device)
        self._wall = 0.0
        self._wall_start: float | None = time.perf_counter()  # None once closed
        self._joules: dict[str, float] = {}
        self._start_energy(energy)
        self._watch = IterationWatch(self._on_iteration)
        for module in self._policies:
            self._watch.add(module, is_layer=True)
        self._watch.add(model, is_layer=False)
        self._hooks = [
            model.register_forward_pre_hook(self._forward_begins),
            model.register_forward_hook(self._forward_ends),
            before_each_step(self._optimizer_begins),
            after_each_step(self._optimizer_ends),
        ]

    # --- what happens while the model trains ------------------------------------------------------

    def _forward_begins(self, module: nn.Module, args: Any) -> None:
        if module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._stopwatch.start("forward")

    def _forward_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self._stopwatch.is_running("forward"):
            return
        self._stopwatch.stop("forward")
        for t in pytree.tree_leaves(output):
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(self._backward_begins)

    def _backward_begins(self, grad: Tensor) -> None:
        if torch.compiler.is_compiling() or self._stopwatch.is_running("backward"):
            return
        self._stopwatch.start("backward")
        # Called by autograd when this whole backward pass is through, as DDP does it.
        torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)

    def _backward_ends(self) -> None:
        self._stopwatch.stop("backward")

    def _optimizer_begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._watch.owns(optimizer):
            self._stopwatch.start("optimizer")

    def _optimizer_ends(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._watch.owns(optimizer):
            self._stopwatch.stop("optimizer")

    def _on_iteration(self) -> None:
        self.steps += 1
        if self.channels is not None:
            self.channels.step()
        for callback in self._on_step:
            callback(self)

    def on_step(self, callback: Callable[[Meter], None]) -> None:
        """Have ``callback(meter)`` called after each optimizer step; loggers use this."""
        self._on_step.append(callback)

    # --- what it found ----------------------------------------------------------------------------

    def report(self, *, all_ranks: bool = False) -> MeterReport:
        """Return what was counted so far; waits for the device.

        Args:
            all_ranks: Under torch.distributed: of all ranks together, see
                :meth:`MeterReport.summed`. Every rank must call it.
        """
        layers = tuple(
            LayerReport(name, record.totals()) for name, record in self._records.items()
        )
        seconds = self._stopwatch.seconds()  # first, so that the device is through
        report = MeterReport(
            layers, self.steps, seconds, self._wall_seconds(), self._energy(), self._not_counted
        )
        if not all_ranks:
            return report
        reports: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(reports, report)
        return MeterReport.summed(reports)

    @property
    def kept(self) -> dict[str, tuple[int, int]]:
        """Kept and all output channels of each layer in its latest backward."""
        return {name: record.latest for name, record in self._records.items() if record.latest}

    def flops(self) -> tuple[int, int, int]:
        """Return the FLOPs so far: forward, backward had it been dense, backward."""
        totals = [record.totals() for record in self._records.values()]
        return (
            sum(t.forward_flops for t in totals),
            sum(t.dense_backward_flops for t in totals),
            sum(t.backward_flops for t in totals),
        )

    @property
    def drop_rate(self) -> float:
        """The drop rate in force now; of the first controller, if there are several."""
        return next(iter(self._policies.values())).controller.drop_rate

    def _wall_seconds(self) -> float:
        running = 0.0 if self._wall_start is None else time.perf_counter() - self._wall_start
        return self._wall + running

    # --- energy -----------------------------------------------------------------------------------

    def _start_energy(self, energy: bool | EnergyCounter) -> None:
        if isinstance(energy, bool):
            self._counter, self._no_energy = find_counter() if energy else (None, "not asked for")
        else:
            self._counter, self._no_energy = energy, ""
        if self._counter is not None:
            self._counter.begin()

    def _energy(self) -> Energy:
        if self._counter is not None:
            for scope, joules in self._counter.end().items():
                self._joules[scope] = self._joules.get(scope, 0.0) + joules
            self._counter.begin()
        return Energy(dict(self._joules), "" if self._joules else self._no_energy)

    # --- checkpoints, and the end -----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to count on: plain numbers."""
        report = self.report()
        return {
            "version": 1,
            "steps": self.steps,
            "seconds": dict(report.seconds),
            "wall_seconds": report.wall_seconds,
            "joules": dict(self._joules),
            "layers": {name: record.state_dict() for name, record in self._records.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count on from ``state``; what was counted before is dropped.

        Raises:
            ValueError: If the state is not a meter's, or of another model; nothing has changed.
        """
        expected = {"version", "steps", "seconds", "wall_seconds", "joules", "layers"}
        missing = sorted(expected - set(state))
        if missing:
            raise ValueError(f"not the state of a Meter: {missing} missing")
        if state["version"] != 1:
            raise ValueError(f"state of version {state['version']!r}; this package reads version 1")
        if set(state["layers"]) != set(self._records):
            other = sorted(set(state["layers"]) ^ set(self._records))
            raise ValueError(
                f"the state is of another model: {len(other)} layers differ, such as {other[0]!r}"
            )
        steps = check_count(state["steps"], "steps", 0)
        for name, layer in state["layers"].items():
            self._records[name].load_state_dict(layer)
        self.steps = steps
        self._energy()  # what was used until now is dropped with the rest
        self._joules = dict(state["joules"])
        self._stopwatch.load(state["seconds"])
        self._wall, self._wall_start = float(state["wall_seconds"]), time.perf_counter()

    def close(self) -> MeterReport:
        """Stop counting and leave the model as it was before; return the last report."""
        report = self.report()
        for hook in self._hooks:
            hook.remove()
        for module in (*self._policies, self._model):
            self._watch.discard(module)
        if self._counter is not None:
            self._counter.end()
            self._counter = None
        self._wall, self._wall_start = self._wall_seconds(), None
        now = Conversion.of(self._model)
        layers = {}
        for module, policy in now.layers.items():
            if self._policies.get(module) is not policy:
                layers[module] = policy  # converted again since
            elif module in self._before.layers:
                layers[module] = self._before.layers[module]
        apply_conversion(Conversion(layers, now.roots), within=self._model)
        return report

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _is_countable(row: PlanRow) -> bool:
    """Whether a layer that is not converted can be counted, by the way a conversion would go."""
    return row.action == "convert" or row.reason.startswith("one output channel")


def _name(row: PlanRow) -> str:
    """Return the name without the wrappers' parts."""
    parts = row.name.split(".")
    while parts and parts[0] in ("module", "_orig_mod"):
        parts.pop(0)
    return ".".join(parts) or "(model)"
