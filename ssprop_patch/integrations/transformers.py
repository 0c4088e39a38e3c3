"""Hugging Face: ``Trainer(..., callbacks=[SsPropCallback(ssp.BarSchedule(0.8))])``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .._files import replacing
from ..schedule.schedules import Schedule
from ._run import DROP_RATE, INSTALL, Run

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise  # it is there, but something it needs is not
    raise ImportError(
        f"ssprop_patch.integrations.transformers needs transformers: {INSTALL}"
    ) from error

#: The file beside it in the folder of each checkpoint that has what JSON cannot hold: tensors, of
#: ``selection="principal"``.
TENSORS = "ssprop_patch.pt"

#: Where the trainer's state, and so ``trainer_state.json`` of each checkpoint, keeps the
#: controller's. transformers' ``ExportableState`` would not do: the trainer restores it only on
#: request, and then by making the callback anew, from arguments that have to be JSON.
STATE = "ssprop_patch"


class SsPropCallback(TrainerCallback):
    """Makes the backward of a model's convolutions sparse while the Trainer trains it.

    Converts the model when the training begins, tells a schedule of epochs the trainer's epochs,
    logs ``"ssprop/drop_rate"`` beside the loss, and continues exactly with
    ``train(resume_from_checkpoint=...)``. A schedule of steps counts optimizer steps. Evaluation
    is dense anyway. Saved models are as ever.

    The Trainer calls the reporters of ``report_to`` (TensorBoard, W&B, ...) before any callback
    of yours, so they do not see the rate. Put them after this one:
    ``report_to="none", callbacks=[SsPropCallback(...), TensorBoardCallback()]``.

    Args:
        schedule: A schedule, a number or a callable, as for :func:`ssprop_patch.convert`. None
            for a model that is converted already: this then tells epochs (unless the conversion
            has its ``steps_per_epoch``), logs, and saves the state.
        revert_at_end: Whether to take the sparse backward off when the training ends (an exception
            does not end it: it may go on).
        log: Whether to log the drop rate.
        **convert_arguments: Further arguments of :func:`ssprop_patch.convert`: ``selection``,
            ``remainder``, ``exclude``, ``overrides``, ... Any of them asks for a conversion.
            Under ``selection="principal"`` checkpoints have a file more, ``ssprop_patch.pt``.

    Raises:
        TypeError, ValueError: When made, for an argument that is not valid; when the training
            begins, for a model that is not converted where nothing says how to.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[SsPropCallback(ssp.BarSchedule(0.8))], ...)
        >>> trainer.train(resume_from_checkpoint=True)
    """

    def __init__(
        self,
        schedule: Schedule | float | Callable[[int], float] | None = None,
        *,
        revert_at_end: bool = False,
        log: bool = True,
        **convert_arguments: Any,
    ) -> None:
        self._revert_at_end, self._logs = revert_at_end, log
        self._run = Run(schedule, convert_arguments)
        self._epoch, self._rate = 0, 0.0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Convert, and load the state that a checkpoint brought."""
        self._run.begin(model)
        saved = state.stateful_callbacks.get(STATE)
        if saved is not None:
            self._run.load_state_dict(_with_tensors(saved["attributes"], args, state))
        self._run.check_continues(state.global_step)
        # The trainer says how much is done (1.4 within epoch 1, 2.0 before epoch 2), not which
        # epoch begins: where one ends early these differ, so count from here.
        self._epoch = int(state.epoch or 0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the epoch."""
        self._run.epoch(self._epoch)
        self._epoch += 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the rate that this step is trained with; its end may be another."""
        self._rate = self._run.drop_rate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the controller's state where the trainer saves its own."""
        attributes = self._run.state_dict(tensors=False)
        if self._run.tensors():
            attributes["tensors"] = TENSORS
        state.stateful_callbacks[STATE] = {"args": {}, "attributes": attributes}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put what JSON cannot hold beside the trainer's state."""
        tensors, folder = self._run.tensors(), _usual_folder(args, state)
        if tensors and state.is_world_process_zero and folder.is_dir():
            with replacing(folder / TENSORS) as beside:
                torch.save(tensors, beside)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the rate to the training's logs, for later callbacks and the history."""
        if self._logs and logs is not None and "loss" in logs:
            logs[DROP_RATE] = self._rate
            for entry in state.log_history[-1:]:  # a copy that the trainer has made already
                if entry.get("step") == state.global_step and "loss" in entry:
                    entry[DROP_RATE] = self._rate

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Revert, if asked to."""
        if self._revert_at_end:
            self._run.end(model)


def _with_tensors(saved: dict[str, Any], args: Any, state: Any) -> dict[str, Any]:
    """Return the state of a checkpoint, with what lies beside it.

    Raises:
        ValueError: If that is gone.
    """
    if "tensors" not in saved:
        return saved
    folders = [_resumed_folder(), _usual_folder(args, state)]
    files = [folder / TENSORS for folder in dict.fromkeys(folders) if folder is not None]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ValueError(
            f"the checkpoint of step {state.global_step} has lost {TENSORS}, the directions of its "
            f"layers: it is in none of {', '.join(str(file) for file in files)}"
        )
    return {**saved, "layers": torch.load(found, map_location="cpu", weights_only=True)}


def _usual_folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _resumed_folder() -> Path | None:
    """Return the checkpoint that the trainer goes on from, which it does not tell callbacks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("transformers."):
            folder = frame.f_locals.get("resume_from_checkpoint")
            if isinstance(folder, (str, os.PathLike)):
                return Path(folder)
        frame = frame.f_back
    return None
