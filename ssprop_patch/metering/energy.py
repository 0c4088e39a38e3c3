"""Joules, where the machine has a counter; a reason, where it has none. Never an estimate.

The counters are read by zeus (https://ml.energy/zeus, ``pip install "ssprop_patch[energy]"``):
NVML on NVIDIA, AMDSMI on AMD, RAPL on Intel and AMD processors, Apple silicon.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Protocol

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
        reason: Why nothing was measured; empty if something was.
    """

    joules: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def total(self) -> float | None:
        """Joules of all scopes together, or None."""
        return sum(self.joules.values()) if self.joules else None

    def co2_grams(self, grams_per_kwh: float) -> float | None:
        """Return grams of CO2 with the grid intensity given, or None if nothing was measured."""
        if not grams_per_kwh >= 0:
            raise ValueError(f"grams_per_kwh must not be negative, got {grams_per_kwh!r}")
        return None if self.total is None else self.total / 3.6e6 * grams_per_kwh

    def __str__(self) -> str:
        if not self.joules:
            return f"not measured ({self.reason})"
        scopes = ", ".join(f"{scope} {joules:.1f} J" for scope, joules in self.joules.items())
        return f"{self.total:.1f} J ({scopes})"


# The parts of Apple's chips, without the parts of these parts.
_APPLE = {"CPU": "cpu_total_mj", "GPU": "gpu_mj", "ANE": "ane_mj", "DRAM": "dram_mj"}


class ZeusCounter:
    """The counters that zeus finds on this machine."""

    def __init__(self, monitor: object) -> None:
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


def find_counter() -> tuple[EnergyCounter | None, str]:
    """Return a counter of this machine; or None, and why."""
    try:
        from zeus.monitor import ZeusMonitor
    except ImportError:
        return None, 'zeus is not installed: pip install "ssprop_patch[energy]"'
    level = logging.getLogger("zeus").level
    logging.getLogger("zeus").setLevel(logging.ERROR)  # what it does not find is said below
    try:
        monitor = ZeusMonitor()
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
        return None, "no energy counter: no supported GPU, and no RAPL that may be read"
    return counter, ""
