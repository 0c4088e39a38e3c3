"""Which channels each layer keeps over time: whether the same filters always win."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._validate import check_count
from .layer_record import LayerRecord, Window


class Winners(NamedTuple):
    """Whether the same channels of a layer win again and again.

    Attributes:
        channels: C_out.
        kept: Channels kept in a sparse backward; the mean, rounded.
        top_share: Share of the kept places that the ``kept`` channels kept most often took: 1 if
            it is always the same ones, about ``kept / channels`` if all take turns.
        never: Share of the channels that had no gradient at all, in dense backwards neither.
    """

    channels: int
    kept: int
    top_share: float
    never: float


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
        # Of each layer, and after how many windows it came: one may be converted later.
        self._windows: dict[str, list[Window]] = {}
        self._full = 0

    def step(self) -> None:
        """An optimizer step is done."""
        self._steps += 1
        if self._steps % self.every == 0:
            for name, record in self._records.items():
                unseen = [Window(None, 0, 0)] * self._full
                self._windows.setdefault(name, unseen).append(record.take_window())
            self._full += 1

    def shares(self, *, sparse_only: bool = False) -> dict[str, Tensor]:
        """Return for each layer the share of the backwards in which each channel was kept.

        Args:
            sparse_only: Leave dense backwards, which keep every channel, aside.

        Returns:
            By name: float32, shape (windows, C_out), on the CPU. NaN where a layer ran no such
            backward in a window. Layers that never dropped a channel are left out, and so is a
            window that is not complete.
        """
        found = {}
        for name, windows in self._windows.items():
            channels = next((len(w.times_kept) for w in windows if w.times_kept is not None), None)
            if channels is not None:
                found[name] = torch.stack([_share(w, channels, sparse_only) for w in windows])
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return all that was counted, as JSON can hold it: for pictures after the training."""
        layers = {name: [_plain(w) for w in windows] for name, windows in self._windows.items()}
        return {"every": self.every, "layers": layers}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> ChannelHistory:
        """Return the history that :meth:`to_dict` wrote; it counts no further.

        Raises:
            KeyError, TypeError, ValueError: If it is none.
        """
        history = cls({}, check_count(found["every"], "every", 1))
        for name, windows in found["layers"].items():
            history._windows[name] = [
                Window(None if kept is None else torch.tensor(kept).float(), sparse, backwards)
                for kept, sparse, backwards in windows
            ]
        return history

    def winners(self) -> dict[str, Winners]:
        """Return for each layer of :meth:`shares` whether the same channels always win."""
        found = {}
        everything = self.shares()
        for name, share in self.shares(sparse_only=True).items():
            mean = share.nanmean(0)
            kept = max(1, round(mean.sum().item()))
            top = mean.topk(kept).values.sum() / mean.sum()
            never = (everything[name].nan_to_num(0.0) == 0).all(0).float().mean()
            found[name] = Winners(len(mean), kept, top.item(), never.item())
        return found


def _plain(window: Window) -> tuple[list[int] | None, int, int]:
    kept = None if window.times_kept is None else [int(n) for n in window.times_kept.tolist()]
    return kept, window.sparse, window.backwards


def _share(window: Window, channels: int, sparse_only: bool) -> Tensor:
    backwards = window.sparse if sparse_only else window.backwards
    if backwards == 0:
        return torch.full((channels,), float("nan"))
    dense = backwards - window.sparse
    kept = torch.zeros(channels) if window.times_kept is None else window.times_kept.cpu()
    return (kept + dense) / backwards
