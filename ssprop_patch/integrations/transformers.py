"""Hugging Face: ``SsPropCallback(ssp.BarSchedule(0.8)).add_to(trainer)``."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .._files import replacing, write_atomically
from ._adapter import Adapter
from ._run import DROP_RATE

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise  # it is there, but something it needs is not
    raise ImportError(
        "ssprop_patch.integrations.transformers needs transformers: "
        'pip install "ssprop_patch[transformers]"'
    ) from error

#: The file beside it in the folder of each checkpoint that has what JSON cannot hold: tensors, of
#: ``selection="principal"``.
TENSORS = "ssprop_patch.pt"

#: Another one, of what the meter has counted.
COUNTED = "ssprop_meter.json"

#: Where the trainer's state, and so ``trainer_state.json`` of each checkpoint, keeps the
#: controller's. transformers' ``ExportableState`` would not do: the trainer restores it only on
#: request, and then by making the callback anew, from arguments that have to be JSON.
STATE = "ssprop_patch"


class SsPropCallback(Adapter, TrainerCallback):
    """Makes the backward of a model's convolutions sparse while the Trainer trains it.

    Converts the model when the training begins, tells a schedule of epochs the trainer's epochs,
    logs ``"ssprop/drop_rate"`` beside the loss, and continues exactly with
    ``train(resume_from_checkpoint=...)``. A schedule of steps counts optimizer steps. Evaluation
    is dense anyway. Saved models are as ever.

    Register it with :meth:`add_to`: a Trainer calls its callbacks in order, those of ``report_to``
    (TensorBoard, W&B, ...) before those of ``callbacks=[...]``, and only what comes after this one
    sees the rate.

    With ``meter=True`` it also logs ``ssprop/backward_saved``, ``ssprop/total_saved`` and
    ``ssprop/flops``, as :meth:`ssprop_patch.Meter.log_to` names them; checkpoints have a file more
    with the count, ``ssprop_meter.json``.

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
            Under ``selection="principal"`` checkpoints have a file more, ``ssprop_patch.pt``.

    Raises:
        TypeError, ValueError: When made, for an argument that is not valid; when the training
            begins, for a model that is not converted where nothing says how to.

    Example:
        >>> trainer = Trainer(model, args, ...)
        >>> SsPropCallback(ssp.BarSchedule(0.8)).add_to(trainer)
        >>> trainer.train(resume_from_checkpoint=True)
    """

    _epoch, _rate, _is_in_front = 0, 0.0, False

    def add_to(self, trainer: Any) -> SsPropCallback:
        """Register with a Trainer, in front of its other callbacks, so that they see the rate.

        Args:
            trainer: A :class:`transformers.Trainer`. One that has this callback already calls it
                first from now on.

        Returns:
            The callback itself.
        """
        handler = trainer.callback_handler
        if not any(callback is self for callback in handler.callbacks):
            trainer.add_callback(self)
        others = [callback for callback in handler.callbacks if callback is not self]
        handler.callbacks[:] = [self, *others]
        self._is_in_front = True
        return self

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Convert, and load the state that a checkpoint brought."""
        self._check_order(args)
        self._run.begin(model)
        saved = state.stateful_callbacks.get(STATE)
        if saved is not None:
            self._run.load_state_dict(_with_tensors(saved["attributes"], args, state))
            counted = _file_of_checkpoint(COUNTED, args, state)
            if counted is not None:
                self._run.count_on_from(json.loads(counted.read_text(encoding="utf-8")))
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
        """Put beside the trainer's state what JSON cannot hold, and what takes time to ask for."""
        folder = _usual_folder(args, state)
        if not (state.is_world_process_zero and folder.is_dir()):
            return
        tensors, counted = self._run.tensors(), self._run.meter_state()
        if tensors:
            with replacing(folder / TENSORS) as beside:
                torch.save(tensors, beside)
        if counted:
            write_atomically(folder / COUNTED, json.dumps(counted))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add rate and count to the training's logs, for later callbacks and the history."""
        if self._logs and logs is not None and "loss" in logs:
            ours = {**self._run.scalars, DROP_RATE: self._rate}
            logs.update(ours)
            for entry in state.log_history[-1:]:  # a copy that the trainer has made already
                if entry.get("step") == state.global_step and "loss" in entry:
                    entry.update(ours)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Report, and revert, if asked to."""
        self._end(model, state.is_world_process_zero)

    def _check_order(self, args: Any) -> None:
        reporters = getattr(args, "report_to", None) or []
        if self._logs and not self._is_in_front and reporters:
            names = ", ".join([reporters] if isinstance(reporters, str) else reporters)
            warnings.warn(
                f"{names} will not show {DROP_RATE}: the Trainer calls what report_to names before "
                "this callback. Leave it out of callbacks=[...] and write "
                "SsPropCallback(...).add_to(trainer) (or log=False, to log nothing)",
                UserWarning,
                stacklevel=2,
            )


def _with_tensors(saved: dict[str, Any], args: Any, state: Any) -> dict[str, Any]:
    """Return the state of a checkpoint, with what lies beside it.

    Raises:
        ValueError: If that is gone.
    """
    if "tensors" not in saved:
        return saved
    found = _file_of_checkpoint(TENSORS, args, state)
    if found is None:
        raise ValueError(
            f"the checkpoint of step {state.global_step} has lost {TENSORS}, the directions of its "
            f"layers: it is in none of {', '.join(map(str, _folders(args, state)))}"
        )
    return {**saved, "layers": torch.load(found, map_location="cpu", weights_only=True)}


def _file_of_checkpoint(name: str, args: Any, state: Any) -> Path | None:
    files = (folder / name for folder in _folders(args, state))
    return next((file for file in files if file.is_file()), None)


def _folders(args: Any, state: Any) -> list[Path]:
    """Return where the checkpoint that the trainer goes on from may lie, the likeliest first."""
    folders = [_resumed_folder(), _usual_folder(args, state)]
    return [folder for folder in dict.fromkeys(folders) if folder is not None]


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
