"""Lightning: ``Trainer(callbacks=[SsPropCallback(ssp.BarSchedule(0.8))])``.

Works with ``lightning.pytorch`` and with ``pytorch_lightning``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from ..schedule.schedules import Schedule
from ._run import DROP_RATE, INSTALL, Run

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback_classes() -> tuple[type, ...]:
    """Return the Callback of each of the two packages in use, so that either's Trainer knows it."""
    loaded = [sys.modules[name] for name in _PACKAGES if sys.modules.get(name)]
    for name in () if loaded else _PACKAGES:
        try:
            loaded = [importlib.import_module(name)]
            break
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise  # it is there, but something it needs is not
    if not loaded:
        raise ImportError(f"ssprop_patch.integrations.lightning needs Lightning: {INSTALL}")
    return tuple(package.Callback for package in loaded)


class SsPropCallback(*_callback_classes()):  # type: ignore[misc]  # known when it is imported
    """Makes the backward of a LightningModule's convolutions sparse while it is fitted.

    Converts the module when the fit starts, tells a schedule of epochs the trainer's epochs
    (whatever the loader's length, gradient accumulation, manual or automatic optimization), logs
    ``"ssprop/drop_rate"`` on each batch, and continues exactly from the trainer's checkpoints. A
    schedule of steps counts optimizer steps; several optimizers count once an iteration.
    Validation is dense anyway. ``state_dict`` keys stay as they are.

    Args:
        schedule: A schedule, a number or a callable, as for :func:`ssprop_patch.convert`. None
            for a module that is converted already: this then tells epochs (unless the conversion
            has its ``steps_per_epoch``), logs, and saves the state.
        revert_at_end: Whether to take the sparse backward off when the fit ends (an exception
            does not end it: it may go on).
        log: Whether to log the drop rate.
        **convert_arguments: Further arguments of :func:`ssprop_patch.convert`: ``selection``,
            ``remainder``, ``exclude``, ``overrides``, ... Any of them asks for a conversion. Names
            are those of the LightningModule: ``"model.conv1"``.

    Raises:
        TypeError, ValueError: When made, for an argument that is not valid; when the fit starts,
            for a module that is not converted where nothing says how to.

    Example:
        >>> trainer = Trainer(callbacks=[SsPropCallback(ssp.BarSchedule(0.8))])
        >>> trainer.fit(model, loader)
        >>> trainer.fit(model, loader, ckpt_path="last")
    """

    def __init__(
        self,
        schedule: Schedule | float | Callable[[int], float] | None = None,
        *,
        revert_at_end: bool = False,
        log: bool = True,
        **convert_arguments: Any,
    ) -> None:
        super().__init__()
        self._revert_at_end, self._logs = revert_at_end, log  # self.log is the trainer's to set
        self._run = Run(schedule, convert_arguments)
        self._to_load: dict[str, Any] | None = None

    # Not in setup(): what configure_model() and the module's own setup() make is not there yet,
    # and a strategy has not wrapped the module.
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Convert; the trainer's own count tells whether this fit goes on with an earlier one."""
        self._run.begin(pl_module, anew=trainer.global_step == 0)
        self._load()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Load the state where the strategy restores checkpoints after ``on_fit_start``."""
        self._load()
        self._run.check_continues(trainer.global_step)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell the epoch."""
        self._run.epoch(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Log the rate that this batch is trained with."""
        # Again: a fit resumed within an epoch, or after its last batch, begins one unannounced.
        self._run.epoch(trainer.current_epoch)
        if self._logs and not trainer.barebones:
            rate = self._run.drop_rate
            pl_module.log(DROP_RATE, rate, on_step=True, on_epoch=False)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Revert, if asked to."""
        if self._revert_at_end:
            self._run.end(pl_module)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget what ``test(ckpt_path=...)`` and the like have loaded: it is not for a fit."""
        self._to_load = None

    def state_dict(self) -> dict[str, Any]:
        """Return the controller's state, for the trainer's checkpoint."""
        return self._run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for when the fit starts: only then the module is converted."""
        self._to_load = state_dict

    def _load(self) -> None:
        state, self._to_load = self._to_load, None
        if state is not None:
            self._run.load_state_dict(state)
