"""The training by hand with the Trainer of transformers, and what its tests share."""

import contextlib

import torch
import torch.nn.functional as F
from transformers import (
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

import ssprop_patch as ssp

from . import by_hand
from .by_hand import data


def make():
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=4
    )
    return ResNetForImageClassification(config).double()


class Images(torch.utils.data.Dataset):
    """The batches of ``data``, image by image."""

    def __init__(self, batches):
        self.rows = [
            {"pixel_values": image, "labels": label}
            for x, y in batches
            for image, label in zip(x, y, strict=True)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def mean_of_all(output, labels, num_items_in_batch=None):
    """The mean over the images of one optimizer step, however many passes it has."""
    n = len(labels) if num_items_in_batch is None else num_items_in_batch
    return F.cross_entropy(output.logits, labels, reduction="sum") / n


def trainer(model, path, *callbacks, epochs=4, dataset=None, **arguments):
    arguments = {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        **arguments,
    }
    run = Trainer(
        model,
        TrainingArguments(str(path), **arguments),
        train_dataset=Images(data()) if dataset is None else dataset,
        eval_dataset=Images(data(1)),
        callbacks=list(callbacks),
        compute_loss_func=mean_of_all,
        optimizers=(by_hand.sgd(model), None),
    )
    run.remove_callback(PrinterCallback)
    return run


def train(path, *callbacks, resume=None, converted=None, **arguments):
    """Train a new model; return it, the rates of its forwards, and the trainer."""
    model = make()
    if converted is not None:
        ssp.convert(model, converted)
    seen = by_hand.watch(model)
    run = trainer(model, path, *callbacks, **arguments)
    with contextlib.suppress(KeyboardInterrupt):
        run.train(resume_from_checkpoint=resume)
    return model, seen, run
