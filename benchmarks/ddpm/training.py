"""One run: a denoiser trained from its seed to its last step by an ordinary loop."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from classifier import checkpoint
from classifier.batches import Batches
from classifier.clock import Clock
from classifier.training import History, warm_cosine
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ssprop_patch as ssp
from ddpm.model import TRAIN_STEPS, noise_schedule
from ddpm.settings import Settings


@dataclass(frozen=True)
class Trained:
    """The outcome of a run: the weights, their moving average, and how it went."""

    model: nn.Module
    average: nn.Module
    clock: Clock
    history: History


def train(
    settings: Settings,
    batches: Batches,
    build: Callable[[], nn.Module],
    steps: int,
    schedule: Any,
    path: Path,
    progress: Callable[[int, str], None],
) -> Trained:
    """Train a model, going on from the checkpoint at ``path`` where there is one.

    Args:
        settings: Which run.
        batches: Images in [-1, 1].
        build: Makes the model, from torch's global generator.
        steps: How many optimizer steps.
        schedule: Of the drop rate, None for a dense method.
        path: Where the state is saved at the end of each epoch.
        progress: Called with the steps done and a line of text.
    """
    device = batches.device
    _seed(settings.seed)
    model = build().to(device, memory_format=batches.memory_format)
    # Copied before the conversion: the average is a plain network that is never trained.
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=0.0)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(steps))
    clock, history = Clock(device), History()
    parts: dict[str, checkpoint.Stateful] = {
        "model": model,
        "average": average,
        "optimizer": optimizer,
        "lr_scheduler": lr_scheduler,
        "random": checkpoint.RandomState(device),
        "clock": clock,
        "history": history,
    }
    controller = None
    if schedule is not None:
        ssp.convert(
            model,
            schedule,
            steps_per_epoch=batches.steps_per_epoch,
            exclude=settings.exclude,
            selection=settings.selection,
        )
        parts["controller"] = controller = ssp.get_controller(model)
    # Building drew as many numbers as it liked; from here all methods draw the same ones.
    _seed(settings.seed)
    checkpoint.load(path, parts)
    train_model = model
    if settings.compile:
        torch.compiler.reset()  # what was compiled for other runs would count as recompilations
        train_model = torch.compile(model)
    noises = noise_schedule()
    done = len(clock.laps)
    clock.begin()
    model.train()
    for epoch in range(len(history.epochs), math.ceil(steps / batches.steps_per_epoch)):
        total_loss = torch.zeros((), device=device)
        count = min(steps - done, batches.steps_per_epoch)
        clock.start()
        for images, _ in batches.train(settings.seed, epoch, count):
            noise = torch.randn_like(images)
            times = torch.randint(TRAIN_STEPS, (len(images),), device=device)
            noisy = noises.add_noise(images, noise, times)
            clock.lap()
            with autocast(settings, device):
                loss = F.mse_loss(train_model(noisy, times).float(), noise)
            clock.lap()
            rate = 0.0 if controller is None else controller.drop_rate
            loss.backward()
            clock.lap()
            # In place of a warm-up of many steps, which a short run cannot have.
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            average.update_parameters(model)
            clock.lap()
            clock.end(rate)
            total_loss += loss.detach()
            done += 1
            progress(done, "")
            clock.start()
        history.epochs.append({"step": done, "train_loss": total_loss.item() / count})
        checkpoint.save(path, parts)
        progress(done, f"loss {history.epochs[-1]['train_loss']:.4f}")
    return Trained(model, average, clock, history)


def autocast(settings: Settings, device: torch.device) -> torch.autocast:
    """Return the autocast context that the settings ask for."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.amp == "bf16")


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
