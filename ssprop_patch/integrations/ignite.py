"""Ignite, and MONAI's engines: ``SsPropHandler(ssp.BarSchedule(0.8)).attach(trainer, model)``."""

from __future__ import annotations

from typing import Any

from torch import nn

from ._adapter import Adapter
from ._run import DROP_RATE

try:
    from ignite.engine import Events
except ModuleNotFoundError as error:
    if error.name not in ("ignite", "ignite.engine"):
        raise  # it is there, but something it needs is not
    raise ImportError(
        "ssprop_patch.integrations.ignite needs Ignite: pip install pytorch-ignite"
    ) from error


class SsPropHandler(Adapter):
    """Makes the backward of a model's convolutions sparse while an engine trains it.

    Converts the model when the engine starts, tells a schedule of epochs the engine's epochs
    (Ignite counts from 1, schedules from 0), and keeps ``ssprop/drop_rate`` in
    ``engine.state.metrics``, from where loggers take it. A schedule of steps counts optimizer
    steps. Put it into your checkpoints: ``Checkpoint({"model": model, "ssprop": handler}, ...)``.

    Args:
        schedule: A schedule, a number, a callable, or a schedule's text. None for a model that is
            converted already: this then tells epochs (unless the conversion has its
            ``steps_per_epoch``), logs, and saves the state.
        revert_at_end: Whether to take the sparse backward off when the training ends (an exception
            does not end it: it may go on).
        log: Whether to log the drop rate, and what the meter counts.
        meter: Whether to count what the training costs: ``report`` is printed at the end, and kept.
        selection, remainder, exclude, overrides, ...: The arguments of
            :func:`ssprop_patch.convert`. Any of them that is not the default asks for a conversion.

    Raises:
        TypeError, ValueError: When made, for an argument that is not valid; when the engine starts,
            for a model that is not converted where nothing says how to, or an engine that does not
            say what it trains.

    Example:
        >>> trainer = create_supervised_trainer(model, optimizer, loss)
        >>> SsPropHandler(ssp.BarSchedule(0.8)).attach(trainer, model)
        >>> SupervisedTrainer(..., train_handlers=[SsPropHandler(ssp.BarSchedule(0.8))])  # MONAI
    """

    def attach(self, engine: Any, model: nn.Module | None = None) -> None:
        """Register with an engine.

        Args:
            engine: The one that trains.
            model: What it trains; default: ``engine.network``, as of MONAI's engines, which is
                there when it starts.
        """
        engine.add_event_handler(Events.STARTED, self._on_start, model)
        engine.add_event_handler(Events.EPOCH_STARTED, self._on_epoch)
        engine.add_event_handler(Events.ITERATION_STARTED, self._on_iteration)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._on_iteration_end)
        engine.add_event_handler(Events.COMPLETED, self._on_end, model)

    def _on_start(self, engine: Any, model: nn.Module | None) -> None:
        self._run.begin(_trained_by(engine, model), anew=engine.state.iteration == 0)
        self._run.load_what_was_kept()
        self._run.check_continues(engine.state.iteration)

    def _on_epoch(self, engine: Any) -> None:
        self._run.epoch(engine.state.epoch - 1)

    def _on_iteration(self, engine: Any) -> None:
        # With the rate that this step is trained with; its end may have another.
        if self._logs:
            engine.state.metrics[DROP_RATE] = self._run.drop_rate

    def _on_iteration_end(self, engine: Any) -> None:
        if self._logs:
            counted = {n: v for n, v in self._run.scalars.items() if n != DROP_RATE}
            engine.state.metrics.update(counted)

    def _on_end(self, engine: Any, model: nn.Module | None) -> None:
        self._end(_trained_by(engine, model), _is_first_process())

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the controller and the meter, for a checkpoint."""
        return self._run.whole_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was taken; before the engine starts, when it does."""
        if self._run.controller is None:
            self._run.keep_for_later(state_dict)
        else:
            self._run.load_state_dict(state_dict)


def _trained_by(engine: Any, model: nn.Module | None) -> nn.Module:
    model = getattr(engine, "network", None) if model is None else model
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"this {type(engine).__name__} does not say what it trains: give the model, "
            "SsPropHandler(...).attach(engine, model)"
        )
    return model


def _is_first_process() -> bool:
    import ignite.distributed

    return bool(ignite.distributed.get_rank() == 0)
