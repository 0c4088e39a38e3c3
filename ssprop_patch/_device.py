"""What is asked of a device beside computing: its name, and whether it is done."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import torch


def waiter(device: torch.device) -> Callable[[], None]:
    """Return a function that waits until ``device`` has done all that it was given."""
    if device.type == "cpu":
        return lambda: None
    return getattr(torch, device.type).synchronize


def device_name(device: torch.device) -> str:
    """Return the name of the processor that computes; of a CPU with the instructions torch uses.

    In the cloud a name alone says little: an "AMD EPYC" may be of any generation.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"


def _cpu_name() -> str:
    try:
        # platform.processor() is empty or says only x86_64 on Linux.
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
