"""The kept channels of one backward: the pieces of dy, x and w, and where their gradients go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._torch_compat import len_torch_dispatch_stack
from ..core.geometry import ConvParams
from ..core.selection import ScoreFn, l1_scores
from .channel_ops import are_for_c, put_channels, put_rows, take_channels
from .channel_scores import order_of, select_channels
from .lazy_grad.gradients import NormGradient
from .native.conv import is_supported

# None where a gradient is not needed.
_Grad = TypeVar("_Grad", Tensor, Tensor | None)


def can_be_direct(x: Tensor, w: Tensor) -> bool:
    """Whether C functions can compute the gradients of a convolution that is not transposed.

    Not under a TorchDispatchMode, such as ``FlopCounterMode``, which would not see it.
    """
    return are_for_c(x, w) and is_supported(x, w) and not len_torch_dispatch_stack()


def _once(make: Callable[[Any], Any]) -> Any:
    """Return a property that is computed when it is first read.

    Not functools.cached_property, whose lock (before Python 3.12) torch.compile cannot trace.
    """
    name = f"_{make.__name__}"

    def get(self: Any) -> Any:
        if getattr(self, name, None) is None:
            setattr(self, name, make(self))
        return getattr(self, name)

    return property(get, doc=make.__doc__)


class KeptChannels:
    """The kept channels of one backward, with what algorithms need, made when first used.

    Args:
        dy: Gradient of the output, (N, C_out, *out).
        x: Input, (N, C_in, *in).
        w: Weight, (C_out, C_in / groups, *kernel); (C_in, C_out / groups, *kernel) if transposed.
        p: Geometry.
        k: Channels to keep of each choice, see :func:`.selection.selectable_channels`.
        score_fn: Scores the channels, when they are first asked for.
    """

    def __init__(
        self, dy: Tensor, x: Tensor, w: Tensor, p: ConvParams, k: int, score_fn: ScoreFn
    ) -> None:
        self.whole_dy, self.whole_x, self.whole_w, self.p = dy, x, w, p
        self.k, self.score_fn = k, score_fn
        self.depthwise = p.groups > 1 and p.groups == dy.shape[1]
        #: How many output channels are kept.
        self.number = k if self.depthwise else k * p.groups
        self._index: Tensor | None = None

    @property
    def index(self) -> Tensor:
        """The kept output channels, ascending; the same number in each group."""
        if self._index is None:
            self._index = select_channels(self.whole_dy, self.k, self.p.groups, self.score_fn)
        return self._index

    @index.setter
    def index(self, index: Tensor) -> None:
        self._index = index

    @property
    def order(self) -> int | None:
        """1 or 2 while the channels are still to be chosen by sums of ``|dy| ** order``."""
        return order_of(self.score_fn) if self._index is None else None

    @_once
    def can_be_direct(self) -> bool:
        """As :func:`can_be_direct`."""
        x = self.whole_x
        return self.whole_dy.dtype is x.dtype and can_be_direct(x, self.whole_w)

    @_once
    def dy(self) -> Tensor:
        """The kept channels of dy, (N, kept, *out)."""
        dy = self.whole_dy
        if isinstance(dy, NormGradient):
            return dy.take(self.index)
        return take_channels(dy, self.index)

    @_once
    def masked_dy(self) -> Tensor:
        """The whole dy with zeros in the dropped channels."""
        dy = self.whole_dy
        keep = torch.zeros(dy.shape[1], dtype=torch.bool, device=dy.device)
        keep = keep.index_fill_(0, self.index, True)
        if isinstance(dy, NormGradient):
            return dy.form_masked(keep)
        # where, not a product: a dropped channel may hold inf or nan, and 0 * inf is nan.
        return torch.where(keep.view(-1, *[1] * (dy.dim() - 2)), dy, 0)

    @_once
    def input_index(self) -> Tensor:
        """The input channels of the kept groups of a depthwise convolution."""
        per_group = self.whole_x.shape[1] // self.p.groups
        if per_group == 1:
            return self.index
        steps = torch.arange(per_group, device=self.index.device)
        return (self.index.unsqueeze(1) * per_group + steps).flatten()

    @_once
    def x(self) -> Tensor:
        """The input that the kept channels see: a group left out takes its channels with it."""
        return take_channels(self.whole_x, self.input_index) if self.depthwise else self.whole_x

    @_once
    def params(self) -> ConvParams:
        """The geometry of the smaller convolution."""
        return self.p.with_groups(self.number) if self.depthwise else self.p

    @_once
    def weight_rows(self) -> tuple[int, Tensor]:
        """Where the weight of the kept channels lies: dimension and indices.

        A transposed convolution has its output channels in dim 1, but its groups, as in dim 0 the
        inputs, one after the other.
        """
        if not self.p.transposed:
            return 0, self.index
        return (0, self.input_index) if self.depthwise else (1, self.index)

    @_once
    def w(self) -> Tensor:
        """The weight of the kept channels."""
        return self.whole_w.index_select(*self.weight_rows)

    def db(self) -> Tensor:
        """Return db of all channels."""
        rows = self.dy.sum([0, *range(2, self.dy.dim())])
        return self.spread_db(rows)

    def spread_db(self, db: _Grad) -> _Grad:
        """Return db of all channels from that of the kept ones."""
        if db is None:
            return None
        return db.new_zeros(self.whole_dy.shape[1]).index_copy_(0, self.index, db)

    def spread_dx(self, dx: _Grad) -> _Grad:
        """Return dX of all input channels from that of :attr:`x`."""
        if dx is None or not self.depthwise:
            return dx
        return put_channels(dx, self.input_index, self.whole_x)

    def spread_dw(self, dw: _Grad) -> _Grad:
        """Return dW of all channels from that of :attr:`w`."""
        if dw is None:
            return None
        dim, index = self.weight_rows
        return put_rows(dw, index, self.whole_w, dim)


class AllChannels(KeptChannels):
    """All channels of a gradient that was made smaller before: nothing is left to be chosen.

    Args:
        dy, x, w, p: As of :class:`KeptChannels`.
    """

    def __init__(self, dy: Tensor, x: Tensor, w: Tensor, p: ConvParams) -> None:
        super().__init__(dy, x, w, p, dy.shape[1] // p.groups, l1_scores)
        self.depthwise, self.number = False, dy.shape[1]
        self._index = torch.arange(dy.shape[1], device=dy.device)
        self._dy = self._masked_dy = dy
        self._w = w

    def spread_dw(self, dw: _Grad) -> _Grad:
        """Return ``dw``, which has all rows."""
        return dw

    def spread_db(self, db: _Grad) -> _Grad:
        """Return ``db``, as :meth:`spread_dw`."""
        return db
