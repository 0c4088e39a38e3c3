"""One run of a study: trained, counted, and made a row."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from classifier import clock as clocks
from classifier import costs, models, pretrained, results, training
from classifier.batches import Batches
from classifier.decoded import Source
from classifier.options import UserError
from classifier.training import Run
from torch import nn

import ssprop_patch as ssp
from study import settings as study_settings
from study.settings import NAMES, Settings, cells

# What the classifier's code calls the methods.
_CLASSIFIER = {"dense": "dense", "ssprop": "ssprop", "dense-equal-compute": "dense-equal"}

MACHINE = (
    "device",
    "device_name",
    "threads",
    "jobs",
    "torch",
    "torchvision",
    "timm",
    "ssprop_patch",
    "python",
    "platform",
)
RESULTS = (
    "steps",
    "steps_per_epoch",
    "trained_epochs",
    "mean_drop_rate",
    "parameters",
    "accuracy",
    "best_accuracy",
    "test_loss",
    "best_test_loss",
    "train_accuracy",
    "train_loss",
    "forward_flops",
    "backward_flops",
    "total_flops",
    "flops_of_dense",
    "train_s",
    "warm_up_s",
    "forward_s",
    "backward_s",
    "step_s",
    "dense_step_median_s",
    "sparse_step_median_s",
    "train_images",
    "test_images",
    "classes",
    "origin",
    "digest",
    "weights",
    *MACHINE,
)
FIELDS = ("id", *NAMES, *RESULTS)
ADDED = study_settings.ADDED | {"flops_of_dense": ""}


def build(settings: Settings, source: Source) -> tuple[nn.Module, int]:
    """Return a fresh network and the number of channels of the images that it takes."""
    images, labels = source.train
    model, channels = models.build(
        settings.options("cpu"),
        classes=int(labels.max()) + 1,
        channels=images.shape[1],
        size=settings.resize_to or images.shape[-1],
    )
    if settings.pretrained:
        pretrained.load(model, settings.network)
    pretrained.freeze(model, settings.frozen)
    return model, channels


def step_cost(settings: Settings, model: nn.Module, channels: int) -> costs.StepCost:
    """Return what a step costs, dense or as the settings would convert the model.

    Raises:
        UserError: If the network cannot take such images, or a pattern matches no layer.
    """
    size = settings.resize_to or settings.image_size
    shape = (settings.batch_size, channels, size, size)
    costs.check(model, shape, settings.network)
    of_layers = {}
    if settings.method != "dense":
        of_layers = {
            "types": [getattr(nn, name) for name in settings.types],
            "exclude": settings.exclude,
            "overrides": dict(settings.overrides),
            "selection": settings.selection or "l1",
            "remainder": settings.remainder,
        }
    return costs.StepCost(model, shape, **of_layers)


def steps_of(settings: Settings, cost: costs.StepCost, steps_per_epoch: int) -> int:
    """Return how many optimizer steps a run takes: fewer for ``dense-equal-compute``."""
    steps = max(1, round(settings.steps_share * settings.epochs * steps_per_epoch))
    if settings.method != "dense-equal-compute":
        return steps
    schedule = ssp.parse_schedule(settings.schedule)
    per_t = 1 if schedule.interval == "step" else steps_per_epoch
    return costs.equal_steps(cost, [schedule(step // per_t) for step in range(steps)])


def train(
    settings: Settings,
    source: Source,
    device: torch.device,
    checkpoint: Path,
    progress: Callable[[int, int, str], None],
    jobs: int = 1,
) -> dict[str, Any]:
    """Train a run, from its checkpoint where there is one, and return its row.

    Args:
        settings: Which run.
        source: The images, of the settings' size.
        device: Where.
        checkpoint: File of the state at the end of the last epoch; it stays.
        progress: Called with the steps done, the steps in all, and a line of text.
        jobs: How many processes share the machine, for the row.

    Raises:
        UserError: If the settings do not go together or do not fit the images.
    """
    data = source.data(settings.share, settings.seed, settings.test_share)
    if len(data.train) < settings.batch_size:
        raise UserError(
            f"batch_size {settings.batch_size} is more than the {len(data.train)} training images "
            f"of share {settings.share:g}"
        )
    model, channels = build(settings, source)
    batches = Batches(
        data,
        batch_size=settings.batch_size,
        device=device,
        channels=channels,
        augment=settings.augment,
        channels_last=settings.channels_last,
        resize_to=settings.resize_to,
    )
    cost = step_cost(settings, model, channels)
    schedule = ssp.parse_schedule(settings.schedule) if settings.method == "ssprop" else None
    steps = steps_of(settings, cost, batches.steps_per_epoch)
    options = settings.options(str(device))
    trained = training.train(
        Run(_CLASSIFIER[settings.method], settings.seed, steps),
        options,
        batches,
        lambda: build(settings, source)[0],
        schedule,
        checkpoint,
        lambda done, text: progress(done, steps, text),
    )
    on_train = training.evaluate(
        trained.model, batches.plain(batches.train_set), training.autocast_of(options)
    )
    row = {"id": settings.id, **cells(settings), **_outcome(trained, on_train)}
    forward, backward = cost.total(trained.clock.rates)
    unfrozen = dataclasses.replace(settings, method="dense", frozen=(), pretrained=False)
    dense_step = sum(step_cost(unfrozen, *build(unfrozen, source)).total([0.0]))
    times = clocks.summary(trained.clock)
    row |= {name: times[name] for name in RESULTS if name in times}
    row |= {
        "steps": steps,
        "steps_per_epoch": batches.steps_per_epoch,
        "trained_epochs": steps / batches.steps_per_epoch,
        "mean_drop_rate": math.fsum(trained.clock.rates) / steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "forward_flops": forward,
        "backward_flops": backward,
        "total_flops": forward + backward,
        "flops_of_dense": (forward + backward)
        / (dense_step * settings.epochs * batches.steps_per_epoch),
        "train_images": len(data.train),
        "test_images": len(data.test),
        "classes": data.classes,
        "origin": source.origin,
        "digest": source.digest,
    }
    return row | machine(device, jobs)


def machine(device: torch.device, jobs: int) -> dict[str, Any]:
    """Return what a run ran on; ``jobs``: how many processes shared it."""
    return {"device": device.type, "jobs": jobs, **results.machine(device)}


def _outcome(trained: training.Trained, on_train: tuple[float, float]) -> dict[str, Any]:
    tested = [epoch for epoch in trained.history.epochs if "accuracy" in epoch]
    return {
        "accuracy": tested[-1]["accuracy"],
        "best_accuracy": max(epoch["accuracy"] for epoch in tested),
        "test_loss": tested[-1]["test_loss"],
        "best_test_loss": min(epoch["test_loss"] for epoch in tested),
        # Of the final weights on the training images as they are, without crops and dropout.
        "train_accuracy": on_train[0],
        "train_loss": on_train[1],
        "weights": training.fingerprint(trained.model),
    }
