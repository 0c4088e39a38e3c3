"""Which channels each layer keeps over time: whether the same filters always win."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .counting import LayerRecord, Window


class ChannelHistory:
    """Counts, in windows of some optimizer steps, how often each channel was kept.

    Nothing is read from the device before :meth:`shares` is called.

    Args:
        records: Of the layers, by name.
        every: Optimizer steps in a window.
    """

    def __init__(self, records: Mapping[str, LayerRecord], every: int) -> None:
        self.every = every
        self._records = records
        self._steps = 0
        self._windows: dict[str, list[Window]] = {name: [] for name in records}

    def step(self) -> None:
        """An optimizer step is done."""
        self._steps += 1
        if self._steps % self.every == 0:
            for name, record in self._records.items():
                self._windows[name].append(record.take_window())

    def shares(self) -> dict[str, Tensor]:
        """Return for each layer the share of the backwards in which each channel was kept.

        Returns:
            By name: float32, shape (windows, C_out), on the CPU. Dense backwards keep every
            channel. NaN where a layer ran no backward in a window. Layers that never dropped a
            channel are left out, and so is a window that is not complete.
        """
        found = {}
        for name, windows in self._windows.items():
            channels = next((len(w.times_kept) for w in windows if w.times_kept is not None), None)
            if channels is not None:
                found[name] = torch.stack([_share(window, channels) for window in windows])
        return found


def _share(window: Window, channels: int) -> Tensor:
    if window.backwards == 0:
        return torch.full((channels,), float("nan"))
    dense = window.backwards - window.sparse
    kept = torch.zeros(channels) if window.times_kept is None else window.times_kept.cpu()
    return (kept + dense) / window.backwards
