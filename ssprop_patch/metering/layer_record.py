"""What a layer really ran: its calls by shape and kept channels, turned into FLOPs when asked."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from operator import add
from typing import Any, NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor

from .._torch_compat import FakeTensor
from .._validate import check_count
from ..core.operations import OutputMask
from ..core.rule import TOP_K, BackwardKind, Extent
from ..flops.gradient import layer_flops
from ..flops.totals import Flops
from ..flops.trace import Shape
from .other_work import OtherWork


class _Call(NamedTuple):
    """Shapes of x, w and y; of a backward also k (None: all), which of dX, dW, db, and its kind."""

    x: Shape
    w: Shape
    y: Shape
    k: int | None = None
    output_mask: OutputMask | None = None
    kind: BackwardKind = TOP_K


@dataclass(frozen=True)
class LayerTotals:
    """What one layer did, added up.

    Attributes:
        forwards: Forward calls; those that checkpointing repeats count again.
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
        return LayerTotals(*map(add, self._values(), other._values()))

    def __rmul__(self, n: int) -> LayerTotals:
        return LayerTotals(*(n * value for value in self._values()))

    def _values(self) -> tuple[int, ...]:
        return tuple(vars(self).values())  # in the order of the fields

    @classmethod
    def checked(cls, state: Mapping[str, int], name: str) -> LayerTotals:
        """Return the totals of a state of layer ``name``.

        Raises:
            TypeError, ValueError: If it is not one.
        """
        names = [f.name for f in fields(cls)]
        if not isinstance(state, Mapping) or set(state) != set(names):
            raise ValueError(f"the state of layer {name!r} must have {', '.join(names)}")
        return cls(**{n: check_count(state[n], f"{n} of layer {name!r}", 0) for n in names})

    @property
    def flops(self) -> Flops:
        """FLOPs alone."""
        return Flops(self.forward_flops, self.dense_backward_flops, self.backward_flops)

    @property
    def drop_rate(self) -> float:
        """Share of the channels dropped, mean over the backward calls."""
        return 1 - self.kept / self.channels if self.channels else 0.0

    @property
    def backward_saved(self) -> float:
        """Share of the backward FLOPs saved."""
        return self.flops.backward_saved

    @property
    def total_saved(self) -> float:
        """Share of the forward and backward FLOPs saved."""
        return self.flops.total_saved


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


class Metering(Protocol):
    """What a record knows of the :class:`ssprop_patch.Meter` that it belongs to."""

    @property
    def total_saved(self) -> float | None:
        """Share of the FLOPs of the whole network saved so far; None if that is not known."""

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Count nothing meanwhile."""

    def close(self) -> Any:
        """Stop counting."""


class LayerRecord:
    """Takes note of the calls of one layer; asks no device for anything.

    A copy or a pickle of a metered layer is not metered: a record becomes None there.

    Args:
        name: Fully qualified name of the layer.
        transposed: Whether it is a transposed convolution.
        count_channels: Also count how often each channel was kept.
        others: Counts what runs beside the layers, and is to leave this one's calls out.
        meter: Whose record this is.
    """

    # Calls that wait to be added up. A layer has few shapes, or a new one at each step (detection
    # on images as they come): so the calls are kept, but not for long.
    _ENOUGH = 1024

    def __init__(
        self,
        name: str,
        transposed: bool = False,
        *,
        count_channels: bool = False,
        others: OtherWork,
        meter: Metering,
    ) -> None:
        self.name, self._others = name, others
        self.meter = ref(meter)
        self._transposed = transposed
        # Threads of autograd and of DataParallel append to it, which is atomic.
        self._calls: deque[_Call] = deque()
        self.calls = 0  # forward calls since this was made
        self._adding_up = threading.Lock()
        self._totals = LayerTotals()
        self._latest: _Call | None = None
        self._count_channels = count_channels
        self._times_kept: Tensor | None = None  # of each channel, on the layer's device
        self._uses = self._sparse_uses = 0  # backward calls in these counts

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def forward(self, x: Tensor, w: Tensor, y: Tensor) -> None:
        """A forward pass ran."""
        if type(x) is not FakeTensor:  # a summary, a tracer: nothing ran
            self.ran(_Call(x.shape, w.shape, y.shape))

    def backward(
        self,
        x: Tensor,
        w: Tensor,
        dy: Tensor,
        k: int,
        output_mask: OutputMask,
        kind: BackwardKind = TOP_K,
    ) -> None:
        """A backward pass ran, with ``k`` channels, or directions, of each choice."""
        if type(x) is not FakeTensor:
            self.ran(_Call(x.shape, w.shape, dy.shape, k, output_mask, kind))

    def dense(self, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> None:
        """A forward ran in torch's own way, and so will its backward, if there is one."""
        if type(y) is FakeTensor:
            return
        batch = (1,) if 2 < w.dim() == y.dim() + 1 else ()
        shapes: tuple[Shape, Shape, Shape] = (
            (*batch, *x.shape),
            tuple(w.shape),
            (*batch, *y.shape),
        )
        self.ran(_Call(*shapes))
        if y.requires_grad:  # by shapes: nothing is kept alive
            need_x, need_w, need_b = (t is not None and t.requires_grad for t in (x, w, b))
            call = _Call(*shapes, None, (need_x, need_w, need_b))
            y.register_hook(lambda dy: self.ran(call))

    def ran(self, call: _Call) -> None:
        """Take note of a call by its shapes: x, w, y; of a backward also k (None: all) and mask."""
        self._calls.append(call)
        if call.output_mask is None:
            self.calls += 1
            if self._others.is_watching:
                self._others.claim(_cost(call, self._transposed).forward_flops)
        else:
            self._latest = call
            self._uses += 1
        if len(self._calls) >= self._ENOUGH:
            self._add_up()

    def selected(self, index: Tensor) -> None:
        """These channels were kept, in the sparse backward that was reported last."""
        latest = self._latest
        if latest is None or not self._count_channels or type(index) is FakeTensor:
            return
        if self._times_kept is None:
            self._times_kept = torch.zeros(_channels(latest.w, latest.y), device=index.device)
        self._times_kept.index_add_(0, index, torch.ones_like(index, dtype=torch.float32))
        self._sparse_uses += 1

    def computed(self, algorithms: str) -> None:
        """Nothing to count: FLOPs are those that the gradient needs."""

    def saved_so_far(self) -> float | None:
        """Share of the FLOPs of the whole network saved so far; None if that is not known."""
        meter = self.meter()
        return None if meter is None else meter.total_saved

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
        cost = _cost(self._latest, self._transposed)
        return cost.kept, cost.channels

    def totals(self) -> LayerTotals:
        """Return what has been counted so far."""
        self._add_up()
        return self._totals

    def _add_up(self) -> None:
        calls: Counter[_Call] = Counter()
        with self._adding_up:
            with contextlib.suppress(IndexError):  # until it is empty
                while True:
                    calls[self._calls.popleft()] += 1
            for call, n in calls.items():
                self._totals += n * _cost(call, self._transposed)

    def state_dict(self) -> dict[str, int]:
        """Return the totals as plain numbers."""
        return asdict(self.totals())

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from these totals."""
        self._calls.clear()
        self._totals = LayerTotals.checked(state, self.name)


@lru_cache(maxsize=4096)
def _cost(call: _Call, transposed: bool) -> LayerTotals:
    """Return what one call adds to the totals."""
    x, w, y, k, output_mask, kind = call
    channels = _channels(w, y)
    groups = 1 if len(w) == 2 else channels // w[1] if transposed else x[1] // w[1]
    extent = Extent.of(x, w, y, groups, transposed, kind.block)
    flops = layer_flops(extent, kind, k, output_mask or (False, False, False))
    if output_mask is None:
        return LayerTotals(forwards=1, forward_flops=flops.forward)
    return LayerTotals(
        backwards=1,
        sparse=int(flops.kept < channels),
        channels=channels,
        kept=flops.kept,
        dense_backward_flops=flops.dense_backward,
        backward_flops=flops.backward,
    )


def _channels(w: Shape, y: Shape) -> int:
    return y[1] if len(w) > 2 else y[-1]
