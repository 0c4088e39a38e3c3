"""ultralytics: ``SsPropCallback(ssp.BarSchedule(0.8)).add_to(yolo)``.

Nothing of ultralytics is imported here.
"""

from __future__ import annotations

from typing import Any

from ._adapter import Adapter
from ._run import DROP_RATE


class SsPropCallback(Adapter):
    """Makes the backward of a network's convolutions sparse while ``yolo.train(...)`` trains it.

    The trainer builds the network that it trains by itself: this converts it when it is ready,
    tells the controller the trainer's epochs, also those of a resumed run, and adds
    ``ssprop/drop_rate`` to what ``results.csv``, TensorBoard, W&B and the other loggers show beside
    the learning rates. The averaged network, and so each checkpoint, is a plain one, as it was
    copied before.

    On several GPUs ultralytics trains in processes of their own, in which no callback of yours
    runs: there the training stays dense.

    Args:
        schedule: A schedule, a number, a callable, or a schedule's text. It should count epochs: a
            resumed run has lost the count of steps.
        revert_at_end: Whether to take the sparse backward off when the training ends (an exception
            does not end it: it may go on).
        log: Whether to log the drop rate, and what the meter counts.
        meter: Whether to count what the training costs: ``report`` is printed at the end, and kept.
        selection, remainder, exclude, overrides, ...: The arguments of
            :func:`ssprop_patch.convert`.

    Raises:
        TypeError, ValueError: When made, for an argument that is not valid.

    Example:
        >>> yolo = ultralytics.YOLO("yolo11n.yaml")
        >>> SsPropCallback(ssp.BarSchedule(0.8)).add_to(yolo)
        >>> yolo.train(data="coco8.yaml", epochs=100)
    """

    def add_to(self, model: Any) -> SsPropCallback:
        """Register with a ``YOLO`` (any ``ultralytics`` model) or a trainer; return itself."""
        for event in (
            "on_pretrain_routine_end",
            "on_train_epoch_start",
            "on_train_epoch_end",
            "on_train_end",
        ):
            model.add_callback(event, getattr(self, event))
        return self

    def on_pretrain_routine_end(self, trainer: Any) -> None:
        """Convert: the network is on its device, and the averaged one was copied from it."""
        self._run.begin(trainer.model)

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Tell the epoch."""
        self._run.epoch(trainer.epoch)

    def on_train_epoch_end(self, trainer: Any) -> None:
        """Add the rate of this epoch to the learning rates, which all loggers take from here."""
        if self._logs:
            trainer.lr = {**trainer.lr, **self._run.scalars, DROP_RATE: self._run.drop_rate}

    def on_train_end(self, trainer: Any) -> None:
        """Report, and revert, if asked to."""
        self._end(trainer.model, True)
