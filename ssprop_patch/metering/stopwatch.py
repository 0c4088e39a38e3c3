"""Seconds of the phases of training, on the device's own clock and without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch


class HostClock:
    """For a device whose work is done when the call returns: the CPU."""

    def now(self) -> float:
        """Return a point in time."""
        return time.perf_counter()

    def elapsed(self, start: float, end: float) -> float:
        """Return the seconds between two of them."""
        return end - start

    def is_past(self, point: float) -> bool:
        """Whether the device has reached that point."""
        return True


class CudaClock:
    """Events in the device's stream: recording one costs microseconds and waits for nothing.

    Args:
        device: Whose current stream, which need not be that of the current device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> torch.cuda.Event:
        """Return a point in the stream's work."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def elapsed(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return the seconds between two of them; waits for the second."""
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def is_past(self, point: torch.cuda.Event) -> bool:
        """Whether the device has reached that point."""
        return point.query()


class Stopwatch:
    """Adds up the seconds of phases, by name.

    Args:
        clock: A :class:`HostClock` or a :class:`CudaClock`; None, and no phase is measured.
    """

    # Events waiting to be read; as many as this are kept before the oldest are looked at.
    _ENOUGH = 64

    def __init__(self, clock: HostClock | CudaClock | None) -> None:
        self._clock: Any = clock
        self._running: dict[str, Any] = {}
        self._waiting: deque[tuple[str, Any, Any]] = deque()
        self._seconds: dict[str, float] = {}

    @classmethod
    def on(cls, device: torch.device) -> Stopwatch:
        """Return one for the clock of ``device``."""
        if device.type == "cuda":
            return cls(CudaClock(device))
        # The host's clock would tell how long it takes to queue the work of another device.
        return cls(HostClock() if device.type == "cpu" else None)

    def start(self, phase: str) -> None:
        """A phase begins; one that runs already starts again."""
        if self._clock is not None:
            self._running[phase] = self._clock.now()

    def stop(self, phase: str) -> None:
        """A phase ends; nothing, if it does not run."""
        start = self._running.pop(phase, None)
        if start is None:
            return
        self._waiting.append((phase, start, self._clock.now()))
        while len(self._waiting) > self._ENOUGH and self._clock.is_past(self._waiting[0][2]):
            self._add(*self._waiting.popleft())

    def forget(self, phase: str) -> None:
        """A phase that began has come to no end: an exception left it."""
        self._running.pop(phase, None)

    def is_running(self, phase: str) -> bool:
        """Whether a phase has begun and not ended."""
        return phase in self._running

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase; waits for the device."""
        while self._waiting:
            self._add(*self._waiting.popleft())
        return dict(self._seconds)

    def load(self, seconds: dict[str, float]) -> None:
        """Go on from these seconds."""
        self._running.clear()
        self._waiting.clear()
        self._seconds = {str(name): float(value) for name, value in seconds.items()}

    def _add(self, phase: str, start: Any, end: Any) -> None:
        elapsed = self._clock.elapsed(start, end)
        self._seconds[phase] = self._seconds.get(phase, 0.0) + elapsed
