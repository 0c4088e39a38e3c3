"""What a layer really ran: its calls by shape and kept channels, turned into FLOPs when asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..flops import layer_flops
from ..selection import selectable_channels
from ..trace import Shape


@dataclass
class LayerTotals:
    """What one layer did, added up.

    Attributes:
        forwards: Forward calls in training mode; those that checkpointing repeats count again.
        backwards: Backward calls.
        sparse: Those of them that dropped a channel.
        channels: Output channels, added up over the backward calls.
        kept: Kept channels, added up over the backward calls.
        forward_flops, dense_backward_flops, backward_flops: What the forwards cost, what the
            backwards would have cost dense, and what they did cost.
    """

    forwards: int = 0
    backwards: int = 0
    sparse: int = 0
    channels: int = 0
    kept: int = 0
    forward_flops: int = 0
    dense_backward_flops: int = 0
    backward_flops: int = 0

    def __add__(self, other: LayerTotals) -> LayerTotals:
        names = [f.name for f in fields(self)]
        return LayerTotals(*(getattr(self, n) + getattr(other, n) for n in names))

    @property
    def drop_rate(self) -> float:
        """Share of the channels dropped, mean over the backward calls."""
        return 1 - self.kept / self.channels if self.channels else 0.0


class Window(NamedTuple):
    """How often each channel of a layer was kept in some backward calls.

    Attributes:
        times_kept: In the sparse ones, shape (C_out,), on the layer's device; None without any.
        sparse: How many of the calls were sparse.
        backwards: How many there were.
    """

    times_kept: Tensor | None
    sparse: int
    backwards: int


class LayerRecord:
    """Takes note of the calls of one layer; asks no device for anything.

    Args:
        name: Fully qualified name of the layer.
        transposed: Whether it is a transposed convolution.
        count_channels: Also count how often each channel was kept.
    """

    def __init__(
        self, name: str, transposed: bool = False, *, count_channels: bool = False
    ) -> None:
        self.name = name
        self._transposed = transposed
        self._forwards: Counter[Any] = Counter()
        self._backwards: Counter[Any] = Counter()
        self._before = LayerTotals()
        self._latest: tuple[Any, ...] | None = None
        self._count_channels = count_channels
        self._times_kept: Tensor | None = None  # of each channel, on the layer's device
        self._uses = self._sparse_uses = 0  # backward calls behind these counts

    def forward(self, x: Tensor, w: Tensor, y: Tensor) -> None:
        """A forward pass ran."""
        self._forwards[x.shape, w.shape, y.shape] += 1

    def backward(
        self, x: Tensor, w: Tensor, dy: Tensor, k: int, mask: tuple[bool, bool, bool]
    ) -> None:
        """A backward pass ran, with ``k`` channels of each choice."""
        self._latest = call = (x.shape, w.shape, dy.shape, k, mask)
        self._backwards[call] += 1
        self._uses += 1

    def selected(self, index: Tensor) -> None:
        """These channels were kept, in the sparse backward just told of."""
        if not self._count_channels:
            return
        if self._times_kept is None:
            _, w, dy, *_ = self._latest
            self._times_kept = torch.zeros(_channels(w, dy), device=index.device)
        self._times_kept.index_add_(0, index, torch.ones_like(index, dtype=torch.float32))
        self._sparse_uses += 1

    def take_window(self) -> Window:
        """Return how often each channel was kept since the last call."""
        window = Window(self._times_kept, self._sparse_uses, self._uses)
        self._times_kept, self._uses, self._sparse_uses = None, 0, 0
        return window

    @property
    def latest(self) -> tuple[int, int] | None:
        """Kept and all output channels of the latest backward, or None before the first."""
        if self._latest is None:
            return None
        x, w, dy, k, mask = self._latest
        return self._flops(x, w, dy, k, mask).kept, _channels(w, dy)

    def totals(self) -> LayerTotals:
        """Return what has been counted so far."""
        total = self._before
        for (x, w, y), n in self._forwards.items():
            costs = self._flops(x, w, y, None, (False, False, False))
            total += LayerTotals(forwards=n, forward_flops=n * costs.forward)
        for (x, w, dy, k, mask), n in self._backwards.items():
            costs = self._flops(x, w, dy, k, mask)
            channels = _channels(w, dy)
            total += LayerTotals(
                backwards=n,
                sparse=n * (costs.kept < channels),
                channels=n * channels,
                kept=n * costs.kept,
                dense_backward_flops=n * costs.dense_backward,
                backward_flops=n * costs.backward,
            )
        return total

    def _flops(self, x: Shape, w: Shape, y: Shape, k: int | None, needs: Any) -> Any:
        channels = _channels(w, y)
        groups = 1 if len(w) == 2 else channels // w[1] if self._transposed else x[1] // w[1]
        each = selectable_channels(channels, groups)
        at = x if self._transposed else y  # where the kernel is applied
        macs = prod(at) // (at[1] if len(w) > 2 else at[-1]) * prod(w)
        kept = channels if k is None else k * (channels // each)
        return layer_flops(macs, prod(y), channels, kept, needs)

    def state_dict(self) -> dict[str, int]:
        """Return the totals as plain numbers."""
        return asdict(self.totals())

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from these totals."""
        self._before = LayerTotals(**state)
        self._forwards.clear()
        self._backwards.clear()


def _channels(w: Shape, y: Shape) -> int:
    return y[1] if len(w) > 2 else y[-1]
