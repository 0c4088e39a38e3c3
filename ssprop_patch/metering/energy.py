"""Joules, where the machine has a counter; a reason, where it has none. Never an estimate.

The counters are read by zeus (https://ml.energy/zeus, ``pip install "ssprop_patch[energy]"``):
NVML on NVIDIA, AMDSMI on AMD, RAPL on Intel and AMD processors, Apple silicon.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

WINDOW = "ssprop_patch"


class EnergyCounter(Protocol):
    """Something that measures energy; another one than zeus may stand in for it."""

    def begin(self) -> None:
        """Start measuring."""

    def end(self) -> dict[str, float]:
        """Stop measuring; return joules by scope, such as ``{"GPU 0": 12.5, "DRAM 0": 1.5}``."""


@dataclass(frozen=True)
class Energy:
    """What was measured, or why nothing was.

    Attributes:
        joules: By scope; empty if nothing was measured.
        reason: Why nothing was measured; with joules, why a part of the run was not: it was
            resumed from a checkpoint, or runs on several ranks, and only some have a counter.
    """

    joules: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def total(self) -> float | None:
        """Joules of all scopes together, or None."""
        return sum(self.joules.values()) if self.joules else None

    def co2_grams(self, grams_per_kwh: float) -> float | None:
        """Return grams of CO2 with the grid intensity given, or None if nothing was measured."""
        if not 0 <= grams_per_kwh < float("inf"):
            raise ValueError(
                f"grams_per_kwh must be a finite number that is not negative, got {grams_per_kwh!r}"
            )
        return None if self.total is None else self.total / 3.6e6 * grams_per_kwh

    def __str__(self) -> str:
        if not self.joules:
            return f"not measured ({self.reason})"
        scopes = ", ".join(f"{scope} {joules:.1f} J" for scope, joules in self.joules.items())
        gap = f"; a part of the run was not measured: {self.reason}" if self.reason else ""
        return f"{self.total:.1f} J ({scopes}){gap}"


# The parts of Apple's chips, without the parts of these parts.
_APPLE = {"CPU": "cpu_total_mj", "GPU": "gpu_mj", "ANE": "ane_mj", "DRAM": "dram_mj"}


class ZeusCounter:
    """The counters that zeus finds on this machine."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def begin(self) -> None:
        """Start measuring."""
        self._monitor.begin_window(WINDOW, sync_execution=False)

    def end(self) -> dict[str, float]:
        """Stop measuring; return joules by scope."""
        found = self._monitor.end_window(WINDOW, sync_execution=False)
        joules = {f"GPU {i}": float(j) for i, j in found.gpu_energy.items()}
        joules |= {f"CPU package {i}": float(j) for i, j in (found.cpu_energy or {}).items()}
        joules |= {f"DRAM {i}": float(j) for i, j in (found.dram_energy or {}).items()}
        soc = getattr(found, "soc_energy", None)
        for scope, name in _APPLE.items():
            millijoules = getattr(soc, name, None)
            if millijoules is not None:
                joules[scope] = millijoules / 1000
        return joules


def find_counter(gpus: Sequence[int] | None = None) -> tuple[EnergyCounter | None, str]:
    """Return a counter of this machine; or None, and why.

    Args:
        gpus: Indices of the CUDA devices to measure, as torch counts them; None: all. The ranks of
            a training see each other's.
    """
    try:
        from zeus.monitor import ZeusMonitor
    except ImportError:
        return None, 'zeus is not installed: pip install "ssprop_patch[energy]"'
    level = logging.getLogger("zeus").level
    logging.getLogger("zeus").setLevel(logging.ERROR)  # what it does not find is said below
    try:
        monitor = ZeusMonitor(None if gpus is None else list(gpus))
    except Exception as error:  # drivers fail in many ways, and training must go on
        return None, f"zeus finds no counter: {type(error).__name__}: {error}"
    finally:
        logging.getLogger("zeus").setLevel(level)
    counter = ZeusCounter(monitor)
    try:
        counter.begin()
        scopes = counter.end()
    except Exception as error:
        return None, f"zeus cannot read the counter: {type(error).__name__}: {error}"
    if not scopes:
        return None, "no energy counter: no supported GPU, no RAPL that may be read"
    return counter, ""


class EnergyMeter:
    """Adds up what a counter measures, and remembers why something was not measured.

    Args:
        energy: Whether to measure, or the counter to measure with.
        devices: Those of the model: of the GPUs only theirs are measured.

    Raises:
        TypeError: If ``energy`` is neither.
    """

    def __init__(self, energy: bool | EnergyCounter, devices: Iterable[torch.device]) -> None:
        self._counter: EnergyCounter | None = None
        self._reason = ""
        self._joules: dict[str, float] = {}
        if isinstance(energy, bool):
            gpus = sorted({d.index or 0 for d in devices if d.type == "cuda"})
            self._counter, self._reason = find_counter(gpus) if energy else (None, "not asked for")
        elif all(callable(getattr(energy, name, None)) for name in ("begin", "end")):
            self._counter = energy
        else:
            raise TypeError(
                f"energy must be True, False or a counter with begin() and end(), got {energy!r}"
            )

    def begin(self) -> None:
        """Measure from here on."""
        if self._counter is not None:
            self._counter.begin()

    def so_far(self) -> Energy:
        """Return what was measured, and go on."""
        self._read(go_on=True)
        return self._energy()

    def load(self, joules: Mapping[str, float], reason: str) -> None:
        """Go on from what another run measured."""
        self._read(go_on=True)
        self._joules = dict(joules)
        self._reason = self._reason or reason

    def end(self) -> None:
        """Measure no more."""
        self._read(go_on=False)
        self._counter = None

    def _read(self, go_on: bool) -> None:
        if self._counter is None:
            return
        try:
            joules = self._counter.end()
            if go_on:
                self._counter.begin()
        except Exception as error:  # as in find_counter: hours of training are worth more
            self._counter = None
            self._reason = f"the counter failed: {type(error).__name__}: {error}"
            return
        for scope, value in joules.items():
            self._joules[scope] = self._joules.get(scope, 0.0) + value

    def _energy(self) -> Energy:
        nothing = "the counter has measured nothing" if self._counter is not None else ""
        return Energy(dict(self._joules), self._reason or ("" if self._joules else nothing))
