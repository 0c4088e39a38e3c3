"""fastai: ``learn.fit(10, cbs=SsPropCallback(ssp.BarSchedule(0.8)))``."""

from __future__ import annotations

from typing import Any

from ._adapter import Adapter
from ._run import DROP_RATE

try:
    from fastai.callback.core import Callback
    from fastai.learner import ValueMetric
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "fastai":
        raise  # it is there, but something it needs is not
    raise ImportError(
        "ssprop_patch.integrations.fastai needs fastai: pip install fastai"
    ) from error


class SsPropCallback(Adapter, Callback):
    """Makes the backward of a model's convolutions sparse while a Learner is fitted.

    Converts the model when the first epoch trains, tells the controller fastai's epochs and
    optimizer steps (fastai's own optimizers are not torch's, so that torch does not report
    their steps), and adds a column ``ssprop/drop_rate`` to what a fit prints and its loggers log.
    Each fit starts the schedule anew, with ``start_epoch`` at that epoch; ``lr_find``,
    ``validate`` and ``get_preds`` leave everything as it is.

    Args:
        schedule: A schedule, a number, a callable, or a schedule's text. None for a model that is
            converted already.
        revert_at_end: Whether to take the sparse backward off when the fit ends (an exception does
            not end it: it may go on).
        log: Whether to log the drop rate, and what the meter counts.
        meter: Whether to count what the training costs: ``report`` is printed at the end, and kept.
            It has FLOPs always, and optimizer steps with ``OptimWrapper``.
        selection, remainder, exclude, overrides, ...: The arguments of
            :func:`ssprop_patch.convert`. Any of them that is not the default asks for a conversion.

    Raises:
        TypeError, ValueError: When made, for an argument that is not valid; when the fit starts,
            for a model that is not converted where nothing says how to.

    Example:
        >>> learn = Learner(dls, model, cbs=SsPropCallback(ssp.BarSchedule(0.8)))
        >>> learn.fit_one_cycle(10)
    """

    order = -5  # once fastai has put the model on its device, and before its Recorder

    _metric: Any = None
    _rate, _steps, _is_skipped, _has_begun = 0.0, 0, False, False

    def before_fit(self) -> None:
        """Add the column, if this is a training."""
        self._has_begun = False
        if self._logs and self._is_training():
            others = self._other_metrics()
            self._metric = ValueMetric(self._rate_of_epoch, DROP_RATE)
            self.learn.metrics = [*others, self._metric]

    def before_train(self) -> None:
        """Convert, if this is the first epoch, and tell the epoch."""
        if not self._is_training():
            return
        if not self._has_begun:
            self._run.begin(self.learn.model)
            self._has_begun, self._steps = True, 0
        self._run.epoch(self.learn.epoch)
        self._rate = self._run.drop_rate

    def after_cancel_step(self) -> None:
        """Take note that a step, of mixed precision for example, is left out."""
        self._is_skipped = True

    def after_step(self) -> None:
        """Tell a schedule of steps of the step."""
        if self._has_begun and not self._is_skipped:
            self._steps += 1
            self._run.steps_done(self._steps)
        self._is_skipped = False

    def after_fit(self) -> None:
        """Report, and revert, if asked to."""
        self.learn.metrics = self._other_metrics()
        if self._has_begun:
            self._has_begun = False
            self._end(self.learn.model, _is_first_process())

    def _rate_of_epoch(self) -> float:
        return self._rate

    def _other_metrics(self) -> list[Any]:
        return [metric for metric in self.learn.metrics if metric is not self._metric]

    def _is_training(self) -> bool:
        # validate() and get_preds() begin and end a fit, too; they hold the Learner's lock.
        return not (self.learn.lock.locked() or hasattr(self.learn, "lr_finder"))


def _is_first_process() -> bool:
    from fastai.torch_core import rank_distrib

    return bool(rank_distrib() == 0)
