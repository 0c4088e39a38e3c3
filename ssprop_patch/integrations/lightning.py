"""Lightning: ``Trainer(callbacks=[SsPropCallback(ssp.BarSchedule(0.8))])``.

Works with ``lightning.pytorch`` and with ``pytorch_lightning``.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from ._adapter import Adapter
from ._run import DROP_RATE

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
        raise ImportError(
            "ssprop_patch.integrations.lightning needs Lightning: "
            'pip install "ssprop_patch[lightning]"'
        )
    return tuple(package.Callback for package in loaded)


class SsPropCallback(Adapter, *_callback_classes()):  # type: ignore[misc]  # known when imported
    """Makes the backward of a LightningModule's convolutions sparse while it is fitted.

    Converts the module when the fit starts, tells a schedule of epochs the trainer's epochs
    (whatever the loader's length, gradient accumulation, manual or automatic optimization), logs
    ``"ssprop/drop_rate"`` on each batch, and continues exactly from the trainer's checkpoints. A
    schedule of steps counts optimizer steps; several optimizers count once an iteration.
    Validation is dense anyway. ``state_dict`` keys stay as they are.

    With ``meter=True`` it also logs ``ssprop/backward_saved``, ``ssprop/total_saved`` and
    ``ssprop/flops``, as :meth:`ssprop_patch.Meter.log_to` names them; checkpoints hold the count.

    Args:
        schedule: A schedule, a number, a callable, or a schedule's text. None for a module that is
            converted already: this then tells epochs (unless the conversion has its
            ``steps_per_epoch``), logs, and saves the state.
        revert_at_end: Whether to take the sparse backward off when the fit ends (an exception does
            not end it: it may go on).
        log: Whether to log the drop rate, and what the meter counts.
        meter: Whether to count what the training costs: ``report`` is printed at the end, and kept.
        selection, remainder, exclude, overrides, ...: The arguments of
            :func:`ssprop_patch.convert`. Any of them that is not the default asks for a conversion.
            Names are those of the LightningModule: ``"model.conv1"``.

    Raises:
        TypeError, ValueError: When made, for an argument that is not valid; when the fit starts,
            for a module that is not converted where nothing says how to.

    Example:
        >>> trainer = Trainer(callbacks=[SsPropCallback(ssp.BarSchedule(0.8))])
        >>> trainer.fit(model, loader)
        >>> trainer.fit(model, loader, ckpt_path="last")
    """

    # Not in setup(): what configure_model() and the module's own setup() make is not there yet,
    # and a strategy has not wrapped the module.
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Convert; the trainer's own count tells whether this fit goes on with an earlier one."""
        self._run.begin(pl_module, anew=trainer.global_step == 0)
        self._run.load_what_was_kept()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Load the state where the strategy restores checkpoints after ``on_fit_start``."""
        self._run.load_what_was_kept()
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

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Log what the meter has counted."""
        if self._logs and self._run.scalars and not trainer.barebones:
            counted = {n: v for n, v in self._run.scalars.items() if n != DROP_RATE}
            pl_module.log_dict(counted, on_step=True, on_epoch=False)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Report, and revert, if asked to."""
        self._end(pl_module, trainer.is_global_zero)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop counting; other processes may not have come to the same end."""
        self._run.end_meter()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget what ``test(ckpt_path=...)`` and the like have loaded: it is not for a fit."""
        self._run.keep_for_later(None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the controller and the meter, for the trainer's checkpoint."""
        return self._run.whole_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for when the fit starts: only then the module is converted."""
        self._run.keep_for_later(state_dict)
