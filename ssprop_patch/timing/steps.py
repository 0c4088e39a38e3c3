"""Whole training steps of a model, dense and sparse: seconds, and joules with a counter."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._device import waiter
from .._validate import check_count, check_drop_rate
from ..core.rule import Remainder, Selection
from ..metering import EnergyCounter
from ..metering.instrument import unmetered
from ..patching.conversion import Conversion, apply_conversion
from ..patching.convert import convert, revert
from ..patching.eligibility import DEFAULT_TYPES, Types
from .interleaved import Quantiles, alternate
from .networks import loss_of
from .recorded_calls import Inputs, as_arguments, autocasting, device_of

#: What is timed of a step; ``step`` is all of it, with zero_grad and the optimizer.
Mode = Literal["forward", "backward", "step"]
MODES: tuple[Mode, ...] = ("forward", "backward", "step")
# How long one reading of an energy counter should last: NVML's is renewed every 0.1 s.
_ENERGY_SECONDS = 2.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one part of a step."""

    mode: Mode
    dense_s: Quantiles
    sparse_s: Quantiles

    @property
    def share(self) -> float:
        """The sparse median as a share of the dense one."""
        return self.sparse_s.p50 / self.dense_s.p50


def training_step(
    loss: Callable[[], Tensor], optimizer: Optimizer, device: torch.device
) -> Callable[[], list[float]]:
    """Return a function that trains one step and returns the seconds of ``MODES``.

    Args:
        loss: Runs the model, under autocast if wanted, and returns its loss.
        optimizer: Makes the step.
        device: Is waited for between the parts.
    """
    wait = waiter(device)

    def now() -> float:
        wait()
        return time.perf_counter()

    def step() -> list[float]:
        start = now()
        optimizer.zero_grad()
        before = now()
        value = loss()
        forward = now()
        value.backward()
        backward = now()
        optimizer.step()
        return [forward - before, backward - forward, now() - start]

    return step


def time_steps(
    model: nn.Module,
    inputs: Inputs,
    drop_rate: float = 0.8,
    *,
    types: Types = DEFAULT_TYPES,
    selection: Selection = "l1",
    remainder: Remainder = None,
    autocast: torch.dtype | None = None,
    iterations: int = 15,
    progress: Callable[[int, int], None] | None = None,
) -> list[StepTime]:
    """Time whole training steps of ``model``, dense and sparse in turns.

    The model trains with SGD at learning rate 0: its parameters stay, its buffers (running means)
    do not, and its gradients are cleared. Conversion itself is not timed.

    Args:
        model: Any module in training mode, on the device and in the memory format to be timed.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        drop_rate, types, selection, remainder, autocast, iterations: As for :func:`time_layers`.
        progress: Is called with how many of how many measurements are done.

    Returns:
        A row for each of ``MODES``.
    """
    iterations = check_count(iterations, "iterations", 1)
    sparse = _sparse(drop_rate, types, selection, remainder)
    with _sides(model, inputs, sparse, autocast) as sides:
        taken = alternate(sides, iterations, progress=progress)
    return [StepTime(mode, taken["dense"][i], taken["sparse"][i]) for i, mode in enumerate(MODES)]


def joules_per_step(
    counter: EnergyCounter,
    model: nn.Module,
    inputs: Inputs,
    drop_rate: float = 0.8,
    *,
    types: Types = DEFAULT_TYPES,
    selection: Selection = "l1",
    remainder: Remainder = None,
    autocast: torch.dtype | None = None,
    seconds: float = _ENERGY_SECONDS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Measure the joules of a training step, ``{"dense": ..., "sparse": ...}``.

    Each side trains for about ``seconds`` twice, in turns; ``progress`` is called with how many of
    these four are done.
    """
    joules = {"dense": 0.0, "sparse": 0.0}
    steps = {"dense": 0, "sparse": 0}
    sparse = _sparse(drop_rate, types, selection, remainder)
    with _sides(model, inputs, sparse, autocast) as sides:
        for step in sides.values():
            step()
        for done, side in enumerate(("dense", "sparse", "sparse", "dense"), 1):
            counter.begin()
            end = time.perf_counter() + seconds
            while True:
                sides[side]()
                steps[side] += 1
                if time.perf_counter() >= end:
                    break
            joules[side] += sum(counter.end().values())
            if progress is not None:
                progress(done, 4)
    return {side: joules[side] / steps[side] for side in joules}


def _sparse(
    drop_rate: float, types: Types, selection: Selection, remainder: Remainder
) -> dict[str, Any]:
    rate = check_drop_rate(drop_rate)
    return {"schedule": rate, "types": types, "selection": selection, "remainder": remainder}


@contextlib.contextmanager
def _sides(
    model: nn.Module,
    inputs: Inputs,
    sparse: Mapping[str, Any],
    autocast: torch.dtype | None,
) -> Iterator[Mapping[str, Callable[[], list[float]]]]:
    """Yield a training step as it is and a converted one, of the same model."""
    args, kwargs = as_arguments(inputs)
    device = device_of(model, inputs)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def loss() -> Tensor:
        with autocasting(device, autocast):
            out = model(*args, **kwargs)
        return loss_of(out)

    step = training_step(loss, optimizer, device)

    def sparse_step() -> list[float]:
        apply_conversion(conversion, within=model)
        try:
            return step()
        finally:
            revert(model)

    with unmetered(model):
        before = Conversion.of(model)
        revert(model)
        try:
            # Once for all steps, as directions last from one to the next.
            convert(model, **sparse)
            conversion = Conversion.of(model)
            revert(model)
            yield {"dense": step, "sparse": sparse_step}
        finally:
            optimizer.zero_grad()
            apply_conversion(before, within=model)
