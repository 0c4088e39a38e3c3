"""One run: a model trained from its seed to its last step by the ordinary training loop."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ssprop_patch as ssp
from classifier import checkpoint
from classifier.batches import Batches
from classifier.clock import Clock
from classifier.options import METHODS, Options


@dataclass(frozen=True)
class Run:
    """What is to be trained: a method, a seed and the number of optimizer steps."""

    method: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Return what its files are called."""
        return f"{self.method}-seed{self.seed}"


class History:
    """Accuracy and loss at the end of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the epochs so far."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them up again."""
        self.epochs = list(state["epochs"])


@dataclass(frozen=True)
class Trained:
    """The outcome of a run."""

    model: nn.Module
    clock: Clock
    history: History


def train(
    run: Run,
    options: Options,
    batches: Batches,
    build: Callable[[], nn.Module],
    schedule: Any,
    path: Path,
    progress: Callable[[int, str], None],
) -> Trained:
    """Train a model, going on from the checkpoint at ``path`` where there is one.

    Args:
        run: What to train.
        options: How.
        batches: The data.
        build: Makes the model, from torch's global generator.
        schedule: Of the drop rate, for a sparse method.
        path: Where the state is saved at the end of each epoch.
        progress: Called with the steps done and a line of text.
    """
    device = torch.device(options.device)
    _seed(run.seed)
    model = build().to(device, memory_format=batches.memory_format)
    optimizer = _optimizer(model, options)
    lr_scheduler = _lr_scheduler(optimizer, run.steps, options)
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
    clock, history = Clock(device), History()
    parts: dict[str, checkpoint.Stateful] = {
        "model": model,
        "optimizer": optimizer,
        "lr_scheduler": lr_scheduler,
        "scaler": scaler,
        "random": checkpoint.RandomState(device),
        "clock": clock,
        "history": history,
    }

    # All that ssProp asks of a training script.
    controller = None
    if METHODS[run.method].sparse:
        ssp.convert(
            model,
            schedule=schedule,
            steps_per_epoch=batches.steps_per_epoch,
            selection=options.selection,
            remainder=None if options.remainder == "none" else options.remainder,
            types=tuple(getattr(nn, name) for name in options.types),
            exclude=options.exclude,
            overrides=dict(options.overrides),
        )
        parts["controller"] = controller = ssp.get_controller(model)

    # Building drew as many numbers as it liked; from here all methods draw the same ones.
    _seed(run.seed)
    checkpoint.load(path, parts)
    train_model = model
    if options.compile:
        torch.compiler.reset()  # what was compiled for other runs would count as recompilations
        train_model = torch.compile(model)
    autocast = autocast_of(options)
    done = len(clock.laps)
    clock.begin()
    text = ""
    epochs = math.ceil(run.steps / batches.steps_per_epoch)
    for epoch in range(len(history.epochs), epochs):
        model.train()
        total_loss = torch.zeros((), device=device)
        steps = min(run.steps - done, batches.steps_per_epoch)
        clock.start()
        for images, labels in batches.train(run.seed, epoch, steps):
            clock.lap()
            with autocast:
                logits = train_model(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=options.label_smoothing)
            clock.lap()
            rate = 0.0 if controller is None else controller.drop_rate
            scaler.scale(loss).backward()
            clock.lap()
            scaler.step(optimizer)
            scaler.update()
            lr_scheduler.step()
            optimizer.zero_grad()
            clock.lap()
            clock.end(rate)
            total_loss += loss.detach()
            done += 1
            progress(done, text)
            clock.start()
        entry = {"step": done, "train_loss": total_loss.item() / steps}
        if (epoch + 1) % options.eval_every == 0 or epoch + 1 == epochs:
            entry["accuracy"], entry["test_loss"] = evaluate(model, batches.test(), autocast)
            text = f"{100 * entry['accuracy']:.1f} %"
        history.epochs.append(entry)
        checkpoint.save(path, parts)
        progress(done, text)
    return Trained(model, clock, history)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], autocast: Any
) -> tuple[float, float]:
    """Return the accuracy (0 to 1) and the mean loss over all images of ``batches``."""
    model.eval()
    right: Any = 0
    loss: Any = 0
    count = 0
    for images, labels in batches:
        with autocast:
            logits = model(images).float()
        right = right + (logits.argmax(1) == labels).sum()
        loss = loss + F.cross_entropy(logits, labels, reduction="sum")
        count += len(labels)
    return right.item() / count, loss.item() / count


def autocast_of(options: Options) -> torch.autocast:
    """Return the autocast context that the options ask for, a disabled one for ``off``."""
    return torch.autocast(
        torch.device(options.device).type,
        dtype=torch.float16 if options.amp == "fp16" else torch.bfloat16,
        enabled=options.amp != "off",
    )


def _lr_scheduler(optimizer: torch.optim.Optimizer, steps: int, options: Options) -> Any:
    if options.lr_schedule == "one-cycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(steps))


def warm_cosine(steps: int) -> Callable[[int], float]:
    """Return the learning rate's factor: up over the first twentieth, then half a cosine down."""
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return factor


def fingerprint(model: nn.Module) -> str:
    """Return a digest of the weights and buffers: equal exactly when all bits are equal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    common = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **common)
    kind = torch.optim.Adam if options.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), **common)


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
