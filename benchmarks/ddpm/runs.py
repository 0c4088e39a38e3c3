"""All runs asked for, each a row of the CSV."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import torchmetrics
from classifier import clock as clocks
from classifier import costs, decoded
from classifier.batches import Batches
from classifier.benchmark import open_device
from classifier.options import UserError
from classifier.training import fingerprint
from processes import context
from rich.console import Console
from study.rows import Rows, claim
from study.runs import MACHINE, machine
from study.settings import cells

import ssprop_patch as ssp
from ddpm import distance, measure, model, training
from ddpm.settings import NAMES, Settings, runs

RESULTS = (
    "steps",
    "steps_per_epoch",
    "trained_epochs",
    "mean_drop_rate",
    "parameters",
    "train_loss",
    "held_out_loss",
    "held_out_loss_not_averaged",
    "distance",
    "distance_of_real",
    "feature_accuracy",
    "forward_flops",
    "backward_flops",
    "total_flops",
    "train_s",
    "warm_up_s",
    "forward_s",
    "backward_s",
    "step_s",
    "train_images",
    "test_images",
    "origin",
    "digest",
    "weights",
    "picture",
    *MACHINE,
    "diffusers",
    "torchmetrics",
)
FIELDS = ("id", *NAMES, *RESULTS)


def rows_of(folder: Path) -> Rows:
    """Return the finished runs of an output folder."""
    return Rows(folder / "runs.csv", FIELDS)


def share_out(args: argparse.Namespace) -> None:
    """Train what is asked for and not yet finished, in ``--jobs`` processes.

    Raises:
        UserError: If an option is wrong, or a process failed.
    """
    if args.jobs == 1:
        run_all(args)
        return
    processes = [
        context("ddpm.runs").Process(target=_enter, args=(args,)) for _ in range(args.jobs)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
    if any(process.exitcode for process in processes):
        raise UserError("a process failed, as it said above; the same command continues")


def _enter(args: argparse.Namespace) -> None:
    try:
        run_all(args)
    except UserError as error:
        print(f"error: {error}", flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def run_all(args: argparse.Namespace) -> None:
    """Train what is asked for and neither finished nor being trained by another process.

    Raises:
        UserError: If an option is wrong.
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    alone = multiprocessing.parent_process() is None
    if args.threads is not None or args.jobs > 1:
        torch.set_num_threads(args.threads or 1)
    device = open_device(args.device)
    if device.type == "cuda":
        # The shapes never change, so the search for the fastest kernels pays.
        torch.backends.cudnn.benchmark = True
    wanted, rows = list(runs(args)), rows_of(args.output)
    state = args.output / "state"
    if all(settings.id in rows.ids() for settings in wanted):
        return
    state.mkdir(parents=True, exist_ok=True)
    source = decoded.load(
        args.data,
        data_dir=args.data_dir,
        cache_dir=args.cache_dir or args.output / "cache",
        size=args.image_size,
        download=args.download,
    )
    rows.same_images(args.data, args.image_size, source.digest, source.origin)
    for settings in wanted:
        with claim(state / f"{settings.id}.lock") as mine:
            if not mine or settings.id in rows.ids():
                continue
            checkpoint = state / f"{settings.id}.pt"
            # Several processes cannot each keep a line of the terminal moving.
            with console.status(settings.name) if alone else contextlib.nullcontext() as status:

                def show(text: str, settings: Settings = settings, status: Any = status) -> None:
                    if status is not None:
                        status.update(f"{settings.name}: {text}")

                row = _run(settings, source, device, checkpoint, args, show)
            rows.append(row)
            checkpoint.unlink(missing_ok=True)
        console.print(
            f"{settings.name}: held-out loss {row['held_out_loss']:.5f}, distance "
            f"{row['distance']:.4g} after {row['trained_epochs']:.4g} epochs, "
            f"{row['train_s']:.1f} s",
            highlight=False,
        )


def _run(
    settings: Settings,
    source: decoded.Source,
    device: torch.device,
    checkpoint: Path,
    args: argparse.Namespace,
    show: Any,
) -> dict[str, Any]:
    # In [-1, 1], mirrored but not cropped.
    data = source.data(settings.share, settings.seed)
    colours = data.channels
    half = (0.5,) * colours
    data = dataclasses.replace(data, mean=half, std=half, pad=0)
    if len(data.train) < settings.batch_size:
        raise UserError(
            f"--batch-size {settings.batch_size} is more than the {len(data.train)} training images"
        )
    batches = Batches(
        data,
        batch_size=settings.batch_size,
        device=device,
        channels=colours,
        augment=True,
        channels_last=settings.channels_last,
    )
    net = model.build(settings, colours)
    cost = costs.StepCost(net, model.inputs(settings, colours), exclude=settings.exclude)
    steps = settings.epochs * batches.steps_per_epoch
    schedule = ssp.parse_schedule(settings.schedule) if settings.schedule else None
    if settings.method == "dense-equal-compute":
        per_t = 1 if schedule.interval == "step" else batches.steps_per_epoch
        steps = costs.equal_steps(cost, [schedule(step // per_t) for step in range(steps)])
    trained = training.train(
        settings,
        batches,
        lambda: model.build(settings, colours),
        steps,
        schedule if settings.method == "ssprop" else None,
        checkpoint,
        lambda done, text: show(f"step {done} of {steps} {text}"),
    )
    show("held-out loss")
    losses = [measure.held_out_loss(m, settings, batches) for m in (trained.average, trained.model)]
    show("generating")
    images = measure.generate(trained.average, settings, device, colours)
    picture = f"{settings.name}.png"
    measure.write_grid(args.output / picture, images)
    show("the classifier of the distance")
    features = distance.trained_features(settings, source, device, args.output / "state")
    found, real = distance.distances(features, source, images, device)
    forward, backward = cost.total(trained.clock.rates)
    times = clocks.summary(trained.clock)
    return {
        "id": settings.id,
        **cells(settings),
        **{name: times[name] for name in RESULTS if name in times},
        "steps": steps,
        "steps_per_epoch": batches.steps_per_epoch,
        "trained_epochs": steps / batches.steps_per_epoch,
        "mean_drop_rate": math.fsum(trained.clock.rates) / steps,
        "parameters": sum(p.numel() for p in net.parameters()),
        "train_loss": trained.history.epochs[-1]["train_loss"],
        "held_out_loss": losses[0],
        "held_out_loss_not_averaged": losses[1],
        "distance": found,
        "distance_of_real": real,
        "feature_accuracy": features.accuracy,
        "forward_flops": forward,
        "backward_flops": backward,
        "total_flops": forward + backward,
        "train_images": len(data.train),
        "test_images": len(data.test),
        "origin": source.origin,
        "digest": source.digest,
        "weights": fingerprint(trained.average),
        "picture": picture,
        **machine(device, args.jobs),
        "diffusers": diffusers.__version__,
        "torchmetrics": torchmetrics.__version__,
    }
