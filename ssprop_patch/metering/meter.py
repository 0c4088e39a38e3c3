"""What a training run really did: FLOPs, steps, seconds and joules, counted while it runs."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .._validate import check_count
from ..flops.totals import Flops
from ..schedule.step_counter import StepCounter
from . import optimizer_steps
from .channel_history import ChannelHistory
from .energy import EnergyCounter, EnergyMeter
from .instrument import Instrumentation
from .layer_record import LayerTotals
from .loggers import Logger, Target
from .meter_report import LayerReport, MeterReport
from .other_work import OtherWork
from .passes import Passes
from .state import check_state
from .stopwatch import Stopwatch

# Optimizer steps after which something must have been counted.
_ENOUGH_STEPS = 2


class Meter:
    """Counts what a model does in training, and what that takes.

    FLOPs are of all convolutions, matrix products and attention, while the model, or that part of
    it, is in training mode. Of convolutions, and of other layers that are converted, each forward
    and backward call counts, with the true number of kept channels; what else the network runs is
    watched in the first call with inputs of new shapes (a few milliseconds), and later calls count
    as much. A forward that activation checkpointing repeats is a cost and counts. Nothing waits
    for the device: seconds come from CUDA events, or from the host's clock for a model on the CPU;
    other devices have no seconds.

    Make it after ``convert`` (an unconverted model is metered as the dense one it is) and after
    moving the model to its device; under torch.compile or DDP from the wrapped model, so that it
    sees forward and backward begin. Of a LightningModule, and of other models whose parts are
    called by a trainer, it finds the parts that run. Converting the model again is followed;
    :meth:`close` before ``revert`` and before TorchScript. A copy or a pickle of the model is not
    metered. A second meter on a model takes over from the first, and closes it.

    In compiled code only the backward of a layer can be seen to run: it stands for one forward,
    and layers without a gradient are not counted there. What else runs there is not seen, so that
    the whole network's FLOPs are not known.

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
        resumed: Whether it counts on from a state.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the model has no layer to count, or one that cannot be counted. Nothing has
            changed then.

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
        self._others = OtherWork()
        self._layers = Instrumentation(
            model, self._others, self, count_channels=channels_every is not None
        )
        self._model, self._records = model, self._layers.records
        self.steps, self.resumed = 0, False
        self.channels = (
            None if channels_every is None else ChannelHistory(self._records, channels_every)
        )
        self._on_step: list[Callable[[Meter], None]] = []
        self._loggers: list[Logger] = []
        self._rate: float | None = None  # in force in this step, once it is known
        self._last_rate: float | None = None  # in the step before
        self._stopwatch = Stopwatch.on(min(devices, key=str, default=torch.device("cpu")))
        self._wall = 0.0
        self._wall_start: float | None = time.perf_counter()  # None once closed
        self._joules = joules
        self._joules.begin()
        self._watch = StepCounter(self._on_iteration)
        for module in self._layers.layers:
            self._watch.add(module, is_layer=True)
        self._watch.add(model, is_layer=False)
        self._calls_before = 0  # of layers, when this iteration began
        self._passes = Passes(model, self._stopwatch, self._others, self._forward_begins)
        optimizer_steps.tell(self)

    # --- what happens while the model trains ------------------------------------------------------

    def _forward_begins(self) -> bool:
        if not (self._layers.is_training and self._layers.follow()):
            return False
        self._rate = self._layers.drop_rate
        return True

    def optimizer_begins(self, optimizer: Optimizer) -> None:
        """Take note that a step of an optimizer begins, the model's own or another's."""
        if self._watch.owns(optimizer) and not self._watch.paused:
            self._passes.optimizer_begins()
            if self._rate is None:  # no forward was seen
                self._rate = self._layers.drop_rate

    def closure_begins(self) -> None:
        """Take note that an optimizer that steps calls its closure."""
        self._passes.closure_begins()

    def closure_ends(self) -> None:
        """Take note that its closure has returned."""
        self._passes.closure_ends()

    def optimizer_ends(self) -> None:
        """Take note that the step of an optimizer is over."""
        self._passes.optimizer_ends()

    def _on_iteration(self) -> None:
        self._passes.optimizer_ends()  # without what follows
        self.steps += 1
        self._look_back()
        self._last_rate, self._rate = self._rate, None
        if self.channels is not None:
            self.channels.step()
        for callback in self._on_step:
            callback(self)

    def _look_back(self) -> None:
        """See whether the iteration that ends was seen to run."""
        self._layers.follow()
        calls = sum(record.calls for record in self._records.values())
        ran, self._calls_before = calls > self._calls_before, calls
        if not self._passes.next_iteration() and ran:
            self._others.lose(
                "its layers ran, but no call of the model or a part of it was seen, as in code "
                "that torch.compile has compiled"
            )
        if self.steps == _ENOUGH_STEPS and not calls and not self.totals.forwards:
            warnings.warn(
                f"ssprop_patch: {self.steps} optimizer steps were made over parameters of this "
                "model, but none of its layers ran in training mode, so that no FLOPs are counted: "
                "it is in eval() mode, or other code than its layers reads its weights",
                stacklevel=2,
            )

    def on_step(self, callback: Callable[[Meter], None]) -> None:
        """Have ``callback(meter)`` called after each optimizer step."""
        self._on_step.append(callback)

    def log_to(
        self,
        target: Target,
        *,
        every: int = 1,
        layers: bool = True,
        append: bool | None = None,
    ) -> None:
        """Write scalars after every ``every``-th optimizer step.

        ============================  ============================================================
        ``ssprop/drop_rate``          in force in this step: the schedule's, without overrides
        ``ssprop/backward_saved``     share of the network's backward FLOPs saved so far, 0 to 1
        ``ssprop/total_saved``        share of its forward and backward FLOPs saved so far, 0 to 1
        ``ssprop/flops``              its forward and backward FLOPs so far
        ``ssprop/layers_saved``       share of the converted layers' backward FLOPs saved so far
        ``ssprop/kept/<layer>``       output channels that the layer kept in its latest backward
        ============================  ============================================================

        The three of the whole network are left out where they are not known: in compiled code.

        Args:
            target: A TensorBoard ``SummaryWriter``, or anything that has ``add_scalar(name, value,
                step)``; the path of a CSV file; or a function of ``(scalars, step)``, such as
                ``lambda scalars, step: wandb.log(scalars, step=step)``. Of several ranks let one
                log, or each to its own file.
            every: Optimizer steps.
            layers: Whether to write ``ssprop/kept/<layer>``, too.
            append: Whether to add to the log that a CSV file holds, if it has the same columns;
                False: the first row takes the place of that log. Default: as the run is resumed
                (by :meth:`load_state_dict`) or new.

        Raises:
            TypeError, ValueError: If an argument is not as described, or a file that is there is
                no log of a meter, or one of other columns that is to be added to. What ``target``
                raises later comes out of ``optimizer.step()``.
        """
        names = list(self._records) * bool(layers)
        append = True if append is None and self.resumed else append
        logger = Logger(target, check_count(every, "every", 1), names, append)
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
            tuple(
                LayerReport(name, record.totals(), name in self._layers.converted)
                for name, record in self._records.items()
            ),
            self.steps,
            seconds,
            self._wall_seconds(),
            self._joules.so_far(),
            self._layers.not_counted,
            others=self._others.flops,
            unknown=self._others.unknown,
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
        """What all layers did, added up. Does not wait for the device."""
        return sum((record.totals() for record in self._records.values()), LayerTotals())

    @property
    def converted_totals(self) -> LayerTotals:
        """What the converted layers did, added up."""
        records = (self._records[name] for name in self._layers.converted)
        return sum((record.totals() for record in records), LayerTotals())

    @property
    def network(self) -> Flops | None:
        """The FLOPs of the whole network so far; None if they are not known.

        Does not wait for the device.
        """
        others = self._others.flops
        return None if others is None else self.totals.flops + others

    @property
    def total_saved(self) -> float | None:
        """Share of the whole network's FLOPs saved so far; None if that is not known."""
        return None if self.network is None else self.network.total_saved

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
            "others": {"forward": self._others.forward, "backward": self._others.backward},
            "not_known_because": self._others.unknown,
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
        self._others.load(**state["others"], unknown=state["not_known_because"])
        self.steps, self.resumed = state["steps"], True
        self._joules.load(state["joules"], state["no_joules_because"])
        self._stopwatch.load(state["seconds"])
        self._wall = state["wall_seconds"]
        self._wall_start = None if self._wall_start is None else time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing meanwhile, and leave the model as it was before.

        For what is no part of the training; ``plan(measure=True)`` and ``time_steps`` do it
        themselves. Wall clock and joules go on.
        """
        self._watch.pause(self)
        self._passes.pause()
        self._layers.take_off()
        try:
            yield
        finally:
            self._layers.put_on_again()
            self._passes.resume()
            self._watch.resume(self)

    def close(self) -> MeterReport:
        """Stop counting and leave the model as it was before; return the last report."""
        report = self.report()
        self._passes.close()
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
