"""Training steps on a GPU's own clock, taken in turns until there are enough or time is up."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssprop_patch.metering import EnergyCounter
from ssprop_patch.metering.energy import find_counter

MODES = ("forward", "backward", "step")
# Fewer measurements say nothing of a spread.
LEAST = 3


class OutOfTime(BaseException):
    """No error, and none that torch.compile or a side's own handler may take for one."""


@contextlib.contextmanager
def budget(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` in here once the time is up, in the middle of a compilation, too."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Side(NamedTuple):
    """One way to train a network.

    Attributes:
        step: Trains one step and returns the seconds of ``MODES``.
        model: What is trained.
    """

    step: Callable[[], Sequence[float]]
    model: nn.Module


class Quartiles(NamedTuple):
    """25th, 50th and 75th percentile."""

    p25: float
    p50: float
    p75: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Interpolate between the sorted values, of which there is at least one."""
        if len(values) == 1:
            return cls(*values, *values, *values)
        return cls(*quantiles(values, n=4, method="inclusive"))


def make_step(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], amp: bool
) -> Callable[[], list[float]]:
    """Return a function that trains one step: zero_grad, forward, backward, SGD.

    On CUDA the parts are timed by events, so that nothing waits in between: what the device does
    while Python is ahead counts as users have it.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> list[float]:
        clock = _Clock(x.device)
        optimizer.zero_grad()
        clock.mark()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            value = loss(model(x))
        clock.mark()
        value.backward()
        clock.mark()
        optimizer.step()
        clock.mark()
        _, forward, backward, _ = parts = clock.parts()
        return [forward, backward, sum(parts)]

    return step


class _Clock:
    """Marks moments: on CUDA in the stream, elsewhere in Python."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        if self._cuda:
            torch.cuda.synchronize(device)
        self.mark()

    def mark(self) -> None:
        if self._cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def parts(self) -> list[float]:
        """Wait, and return the seconds between the marks."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if not self._cuda:
            return [b - a for a, b in pairs]
        self._marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


class Turns(NamedTuple):
    """What came of measuring sides in turns.

    Attributes:
        taken: Of each side, the seconds of ``MODES`` of each of its steps; equally many of all.
        is_over: Whether time was up before the end; then there are fewer, perhaps none.
        errors: Of the sides that raised one, and are not measured therefore.
    """

    taken: dict[str, list[Sequence[float]]]
    is_over: bool
    errors: dict[str, Exception]


def take_turns(sides: Mapping[str, Side], iterations: int, warmup: int = 3) -> Turns:
    """Measure each side once an iteration, in random order within each."""
    order, errors, is_over = random.Random(0), dict[str, Exception](), False
    taken = {side: list[Sequence[float]]() for side in sides}
    try:
        for i in range(warmup + iterations):
            for side in order.sample(list(taken), len(taken)):
                try:
                    found = sides[side].step()
                except Exception as error:
                    errors[side] = error
                    del taken[side]
                    continue
                if i >= warmup:
                    taken[side].append(found)
    except OutOfTime:
        is_over = True
    count = min(map(len, taken.values()), default=0)
    return Turns({side: rows[:count] for side, rows in taken.items()}, is_over, errors)


def peak_mib(side: Side, device: torch.device) -> float | None:
    """Return the MiB that a step takes on top of what is there before it; None but on CUDA."""
    if device.type != "cuda":
        return None
    side.model.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    side.step()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def joules_per_step(side: Side, counter: EnergyCounter | None, seconds: float) -> float | None:
    """Return the joules of a step, a mean over ``seconds`` of them; None without a counter."""
    if counter is None:
        return None
    steps, end = 0, time.perf_counter() + seconds
    counter.begin()
    while not steps or time.perf_counter() < end:
        side.step()  # waits for the device
        steps += 1
    return sum(counter.end().values()) / steps


def find_gpu_counter(device: torch.device) -> EnergyCounter | None:
    """Return what reads the GPU's counter of joules: zeus, or NVML; None where there is neither."""
    if device.type != "cuda":
        return None
    index = device.index or 0
    found, _ = find_counter([index])
    if found is not None:
        return _OnlyGpus(found)
    try:
        return Nvml(index)
    except Exception:  # no library, no driver, no such counter: joules stay blank
        return None


class _OnlyGpus:
    """Without the processor and its memory, which other programs use as well."""

    def __init__(self, counter: EnergyCounter) -> None:
        self.begin, self._counter = counter.begin, counter

    def end(self) -> dict[str, float]:
        return {k: j for k, j in self._counter.end().items() if k.startswith("GPU")}


class Nvml:
    """The counter of NVIDIA's driver.

    Args:
        index: Of the GPU, as torch counts them.
    """

    def __init__(self, index: int) -> None:
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(index).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        self._read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        self._before = self._read()

    def begin(self) -> None:
        self._before = self._read()

    def end(self) -> dict[str, float]:
        return {"GPU": self._read() - self._before}
