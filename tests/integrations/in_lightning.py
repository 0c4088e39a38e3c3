"""The training by hand as a LightningModule, and what the tests of Lightning share."""

import contextlib
import logging

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback

import ssprop_patch as ssp

from . import by_hand
from .by_hand import Net, data

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return by_hand.sgd(self.net)


class Loader:
    """Goes on from a checkpoint within an epoch, as torchdata's StatefulDataLoader."""

    def __init__(self, batches):
        self.batches, self.first, self.done = batches, 0, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        first, self.first = self.first, 0
        for i in range(first, len(self.batches)):
            self.done = i + 1
            yield self.batches[i]

    def state_dict(self):
        return {"done": self.done % len(self.batches)}

    def load_state_dict(self, state):
        self.first = state["done"]


def loader(batches=5):
    return torch.utils.data.DataLoader(data(batches), batch_size=None)


def trainer(*callbacks, epochs=4, **arguments):
    arguments = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        **arguments,
    }
    return pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **arguments)


def reference(schedule, batches=None, epochs=4, accumulate=1):
    batches = data() if batches is None else batches
    groups = by_hand.steps(batches, epochs, accumulate)
    rates = by_hand.rates(schedule, epochs, len(groups) // epochs)
    return by_hand.train(Net(), groups, rates), rates


class Stop(Callback):
    """Ends the training after so many batches of all."""

    def __init__(self, after):
        self.after = after

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.after:
            trainer.save_checkpoint(trainer.default_root_dir + "/stopped.ckpt")
            raise KeyboardInterrupt


def fit(path, *callbacks, ckpt_path=None, epochs=4, converted=None, **arguments):
    """Fit a new module; return it, the rates of its forwards, and the trainer."""
    model = Module()
    if converted is not None:
        ssp.convert(model, converted)
    seen = by_hand.watch(model.net)
    run = trainer(*callbacks, epochs=epochs, default_root_dir=str(path), **arguments)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):  # Lightning makes the one the other
        run.fit(model, Loader(data()), ckpt_path=ckpt_path)
    return model, seen, run
