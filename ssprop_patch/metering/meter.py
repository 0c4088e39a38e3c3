"""What a training run really did: FLOPs, steps, seconds and joules, counted while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._torch_compat import current_graph_task_id, run_after_backward, tree_leaves
from .._validate import check_count
from ..schedule.step_counter import StepCounter
from . import optimizer_steps
from .channel_history import ChannelHistory
from .energy import EnergyCounter, EnergyMeter
from .instrument import Hook, Instrumentation
from .layer_record import LayerTotals
from .loggers import Logger, Target
from .meter_report import LayerReport, MeterReport
from .state import check_state
from .stopwatch import Stopwatch


class Meter:
    """Counts what the layers of a model do in training, and what that takes.

    FLOPs are of the convolutions, and of other layers that are converted: of each forward and
    backward call while the model, or that part of it, is in training mode, with the true number of
    kept channels. A forward that activation checkpointing repeats is a cost and counts. Nothing
    waits for the device: seconds come from CUDA events, or from the host's clock for a model on
    the CPU; other devices have no seconds.

    Make it after ``convert`` (an unconverted model is metered as the dense one it is) and after
    moving the model to its device; under torch.compile or DDP from the wrapped model, so that it
    sees forward and backward begin. Converting the model again is followed; :meth:`close` before
    ``revert`` and before TorchScript. A copy or a pickle of the model is not metered.

    In compiled code only the backward of a layer can be seen to run: it stands for one forward,
    and layers without a gradient are not counted there.

    Args:
        model: The model, or what wraps it.
        energy: Whether to measure joules; or an :class:`ssprop_patch.metering.EnergyCounter` to
            measure them with.
        channels_every: Also count which channels each layer keeps, in windows of this many
            optimizer steps; see :attr:`channels`. Costs one small kernel a layer, and C_out
            numbers of memory for each window.

    Attributes:
        steps: Optimizer steps so far; one an iteration, where several optimizers step.
        channels: The :class:`ssprop_patch.metering.ChannelHistory`, or None. It is not part of the
            state: a resumed run begins a new one.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the model has no layer to count, one that cannot be counted, or is metered
            already. Nothing has changed then.

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
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if channels_every is not None:
            check_count(channels_every, "channels_every", 1)
        devices = {p.device for p in model.parameters()}
        joules = EnergyMeter(energy, devices)
        self._layers = Instrumentation(model, count_channels=channels_every is not None)
        self._model, self._records = model, self._layers.records
        self.steps = 0
        self.channels = (
            None if channels_every is None else ChannelHistory(self._records, channels_every)
        )
        self._on_step: list[Callable[[Meter], None]] = []
        self._loggers: list[Logger] = []
        self._rate: float | None = None  # in force in this step, once it is known
        self._last_rate: float | None = None  # in the step before
        self._backward: int | None = None  # number of the backward pass that is being timed
        self._paused = False  # an optimizer that runs forward and backward itself
        self._stopwatch = Stopwatch.on(min(devices, key=str, default=torch.device("cpu")))
        self._wall = 0.0
        self._wall_start: float | None = time.perf_counter()  # None once closed
        self._joules = joules
        self._joules.begin()
        self._watch = StepCounter(self._on_iteration)
        for module in self._layers.layers:
            self._watch.add(module, is_layer=True)
        self._watch.add(model, is_layer=False)
        self._hooks = [
            model.register_forward_pre_hook(Hook(self._forward_begins)),
            model.register_forward_hook(Hook(self._forward_ends)),
        ]
        optimizer_steps.tell(self)

    # --- what happens while the model trains ------------------------------------------------------

    def _forward_begins(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._stopwatch.forget("forward")  # of one that an exception left
        if not self._layers.is_training:
            return
        self._layers.follow()
        self._rate = self._layers.drop_rate
        if _backward_pass() is None:  # else checkpointing repeats it, in the backward's time
            self._pause_optimizer()
            self._stopwatch.start("forward")

    def _forward_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self._layers.is_training:
            return
        self._stopwatch.stop("forward")
        for t in tree_leaves(output):
            if isinstance(t, Tensor) and t.grad_fn is not None:
                t.register_hook(self._backward_begins)

    def _backward_begins(self, grad: Tensor) -> None:
        number = _backward_pass()
        if torch.compiler.is_compiling() or number in (None, self._backward):
            return
        self._backward = number
        if not run_after_backward(self._backward_ends):
            return
        self._pause_optimizer()
        self._stopwatch.start("backward")

    def _backward_ends(self) -> None:
        self._stopwatch.stop("backward")
        if self._paused:
            self._paused = False
            self._stopwatch.start("optimizer")

    def optimizer_begins(self, optimizer: Optimizer) -> None:
        """Take note that a step of an optimizer begins, the model's own or another's."""
        if self._watch.owns(optimizer):
            self._paused = False
            if not self._stopwatch.is_running("optimizer"):  # its step may call that of its base
                self._stopwatch.start("optimizer")
            if self._rate is None:  # no forward of the whole model was seen
                self._rate = self._layers.drop_rate

    def _pause_optimizer(self) -> None:
        # One that calls a closure, such as LBFGS.
        if self._stopwatch.is_running("optimizer"):
            self._stopwatch.stop("optimizer")
            self._paused = True

    def optimizer_ends(self) -> None:
        """Take note that the step of an optimizer is over."""
        self._stopwatch.stop("optimizer")  # of another model's: nothing runs

    def _on_iteration(self) -> None:
        self._stopwatch.stop("optimizer")  # without what follows
        self.steps += 1
        self._last_rate, self._rate = self._rate, None
        if self.channels is not None:
            self.channels.step()
        for callback in self._on_step:
            callback(self)

    def on_step(self, callback: Callable[[Meter], None]) -> None:
        """Have ``callback(meter)`` called after each optimizer step."""
        self._on_step.append(callback)

    def log_to(self, target: Target, *, every: int = 1, layers: bool = True) -> None:
        """Write scalars after every ``every``-th optimizer step.

        ============================  ============================================================
        ``ssprop/drop_rate``          in force in this step: the schedule's, without overrides
        ``ssprop/backward_saved``     share of the backward FLOPs saved so far, 0 to 1
        ``ssprop/total_saved``        share of the forward and backward FLOPs saved so far, 0 to 1
        ``ssprop/flops``              forward and backward FLOPs so far
        ``ssprop/kept/<layer>``       output channels that the layer kept in its latest backward
        ============================  ============================================================

        Args:
            target: A TensorBoard ``SummaryWriter``, or anything that has ``add_scalar(name, value,
                step)``; the path of a CSV file; or a function of ``(scalars, step)``, such as
                ``lambda scalars, step: wandb.log(scalars, step=step)``. A CSV file that is there
                already is added to. Of several ranks let one log, or each to its own file.
            every: Optimizer steps.
            layers: Whether to write ``ssprop/kept/<layer>``, too.

        Raises:
            TypeError, ValueError: If an argument is not as described, or a CSV file holds other
                columns. What ``target`` raises later comes out of ``optimizer.step()``.
        """
        logger = Logger(target, check_count(every, "every", 1), list(self._records) * bool(layers))
        self._loggers.append(logger)
        self.on_step(logger)

    # --- what it found ----------------------------------------------------------------------------

    def report(self, *, all_ranks: bool = False) -> MeterReport:
        """Return what was counted so far; waits for the device.

        Args:
            all_ranks: Of all ranks of torch.distributed together, see
                :meth:`MeterReport.summed`; every rank must call it. Of this process, where
                torch.distributed does not run.
        """
        seconds = self._stopwatch.seconds()  # first, so that the device is through
        report = MeterReport(
            tuple(LayerReport(name, record.totals()) for name, record in self._records.items()),
            self.steps,
            seconds,
            self._wall_seconds(),
            self._joules.so_far(),
            self._layers.not_counted,
        )
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (all_ranks and distributed):
            return report
        reports: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(reports, report)
        return MeterReport.summed(reports)

    @property
    def kept(self) -> dict[str, tuple[int, int]]:
        """Kept and all output channels of each layer in its latest backward."""
        return {name: record.latest for name, record in self._records.items() if record.latest}

    @property
    def totals(self) -> LayerTotals:
        """What all layers did, added up: the FLOPs so far. Does not wait for the device."""
        return sum((record.totals() for record in self._records.values()), LayerTotals())

    @property
    def drop_rate(self) -> float:
        """The drop rate in force in the latest training step; before the first one, now.

        The controller's, without ``overrides``; of the first one, if there are several.
        """
        return self._layers.drop_rate if self._last_rate is None else self._last_rate

    def _wall_seconds(self) -> float:
        running = 0.0 if self._wall_start is None else time.perf_counter() - self._wall_start
        return self._wall + running

    # --- checkpoints, and the end -----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to count on: plain numbers and text."""
        report = self.report()
        return {
            "version": 1,
            "steps": self.steps,
            "seconds": dict(report.seconds),
            "wall_seconds": report.wall_seconds,
            "joules": dict(report.energy.joules),
            "no_joules_because": report.energy.reason,
            "layers": {name: record.state_dict() for name, record in self._records.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count on from ``state``; what was counted before is dropped.

        Raises:
            TypeError, ValueError: If the state is not a meter's, or of another model; nothing has
                changed then.
        """
        state = check_state(state, self._records)
        for name, layer in state["layers"].items():
            self._records[name].load_state_dict(layer)
        self.steps = state["steps"]
        self._joules.load(state["joules"], state["no_joules_because"])
        self._stopwatch.load(state["seconds"])
        self._wall = state["wall_seconds"]
        self._wall_start = None if self._wall_start is None else time.perf_counter()

    def close(self) -> MeterReport:
        """Stop counting and leave the model as it was before; return the last report."""
        report = self.report()
        for hook in self._hooks:
            hook.remove()
        optimizer_steps.tell_no_more(self)
        for module in (*self._layers.layers, self._model):
            self._watch.discard(module)
        self._layers.take_off()
        self._joules.end()
        self._wall, self._wall_start = report.wall_seconds, None
        for logger in self._loggers:
            logger.close()
        return report

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _backward_pass() -> int | None:
    """Return the number of the backward pass that this thread is in, or None."""
    number = current_graph_task_id()
    return None if number == -1 else number
