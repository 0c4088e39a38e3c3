"""Seconds of the parts of each training step, and what is made of them."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

# One step: getting the batch ready, forward with the loss, backward, the optimizer's step.
LAPS = ("batch", "forward", "backward", "optimizer")
# So many steps of each kind (dense, sparse), but at most half of them, count as warm-up whenever a
# process begins: there kernels are chosen, memory is allocated and graphs are compiled.
WARM_UP = 3


class Clock:
    """Times the laps of each step, waiting for the device at the end of each lap.

    It has a state, so that a resumed run reports on all its steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.laps: list[list[float]] = []  # one row a step
        self.rates: list[float] = []  # the drop rate of each step
        self.begins: list[int] = []  # the steps at which a process began
        self._wait = None if device.type == "cpu" else getattr(torch, device.type).synchronize

    def begin(self) -> None:
        """Note that the next step is the first one of this process."""
        self.begins.append(len(self.laps))

    def start(self) -> None:
        """Start the first lap of a step."""
        self._row: list[float] = []
        self._last = self._now()

    def lap(self) -> None:
        """End a lap; the next begins."""
        now = self._now()
        self._row.append(now - self._last)
        self._last = now

    def end(self, drop_rate: float) -> None:
        """End the step, whose backward pass had this drop rate."""
        assert len(self._row) == len(LAPS)
        self.laps.append(self._row)
        self.rates.append(drop_rate)

    def _now(self) -> float:
        if self._wait is not None:
            self._wait()
        return time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Return all that was noted so far."""
        laps = torch.tensor(self.laps, dtype=torch.float64)
        return {"laps": laps, "rates": list(self.rates), "begins": list(self.begins)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what was noted by a process before this one."""
        self.laps = state["laps"].tolist()
        self.rates, self.begins = list(state["rates"]), list(state["begins"])


def seconds(clock: Clock) -> Tensor:
    """Return the seconds of each step and lap, shape (steps, laps), without warm-up.

    A warm-up step is given the median of the other steps of its kind, so that sums and means over
    a run are those of a machine that was warm from the start. Other steps are left as measured.
    """
    laps = torch.tensor(clock.laps, dtype=torch.float64)
    sparse = torch.tensor(clock.rates) > 0
    for kind in (sparse, ~sparse):
        warming = torch.zeros(len(laps), dtype=torch.bool)
        for first, end in zip(clock.begins, [*clock.begins[1:], len(laps)], strict=True):
            steps = first + kind[first:end].nonzero().flatten()
            warming[steps[: min(WARM_UP, len(steps) // 2)]] = True
        if (steady := kind & ~warming).any():
            laps[warming] = laps[steady].median(0).values
    return laps


def summary(clock: Clock) -> dict[str, float | None]:
    """Return what a run's report says about time, in seconds.

    ``forward_s``, ``backward_s``, ... are means over all steps of the run, so that a run with
    dense and sparse epochs shows what its user waits for; the medians of either kind stand beside.
    """
    laps = seconds(clock)
    sparse = torch.tensor(clock.rates) > 0
    out: dict[str, float | None] = {
        f"{name}_s": mean for name, mean in zip(LAPS, laps.mean(0).tolist(), strict=True)
    }
    out["step_s"] = laps.sum(1).mean().item()
    for name, kind in (("dense", ~sparse), ("sparse", sparse)):
        some = bool(kind.any())
        out[f"{name}_step_median_s"] = laps[kind].sum(1).median().item() if some else None
        backward = laps[kind][:, LAPS.index("backward")]
        out[f"{name}_backward_median_s"] = backward.median().item() if some else None
    out["train_s"] = laps.sum().item()
    out["warm_up_s"] = sum(map(sum, clock.laps)) - out["train_s"]
    return out
