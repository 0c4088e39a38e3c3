"""The sparse backward of a layer: dX, dW and db of the kept channels, zero rows elsewhere.

What is computed depends on the arguments alone; in which way (:mod:`ssprop_patch.ways`) is a
matter of speed, chosen per call (:mod:`ssprop_patch.kernels`).
"""

from __future__ import annotations

import math
from typing import Protocol

from torch import Tensor

from . import kernels
from .kept import ConvParams, Grads, Kept, Mask, dense_backward
from .native.tensors import check_memory
from .passes import put_rows, take_channels
from .selection import ScoreFn, select_channels, selectable_channels


class Record(Protocol):
    """What is told of each call of a layer that is being metered."""

    def forward(self, x: Tensor, w: Tensor, y: Tensor) -> None:
        """A forward pass ran."""

    def backward(self, x: Tensor, w: Tensor, dy: Tensor, k: int, mask: Mask) -> None:
        """A backward pass ran, with ``k`` channels of each choice."""

    def selected(self, index: Tensor) -> None:
        """The kept channels, in a sparse backward."""

    def computed(self, ways: str) -> None:
        """How a sparse backward of a convolution was computed, see :mod:`ssprop_patch.ways`."""

    def dense(self, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> None:
        """A forward ran in torch's own way, and so will its backward."""


def sparse_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    p: ConvParams,
    k: int,
    score_fn: ScoreFn,
    mask: Mask,
    record: Record | None = None,
) -> Grads:
    """Return (dX, dW, db) of the kept channels; None where ``mask`` is False.

    Args:
        dy: Gradient of the output, (N, C_out, *out).
        x: Input, (N, C_in, *in).
        w: Weight, (C_out, C_in / groups, *kernel); (C_in, C_out / groups, *kernel) if transposed.
        p: Geometry.
        k: Channels to keep of each choice; the dense gradient when that is all of them.
        score_fn: Scores the channels of ``dy``.
        mask: Which of dX, dW, db are needed.
        record: Is told what ran.

    Returns:
        dX of ``x``'s shape; dW and db exactly zero for channels not kept. The operations are
        differentiable, so that a double backward differentiates through the kept channels.
    """
    if record is not None:
        record.backward(x, w, dy, k, mask)
    channels = p.out_channels(w)
    # What was changed after the forward is an error, which torch's own kernels raise.
    changed = dy.shape[1] != channels or not w.dim() == x.dim() == dy.dim()
    if changed or k >= selectable_channels(channels, p.groups):
        return dense_backward(dy, x, w, p, mask)
    if p.transposed:  # of others it is seen when C functions are asked for
        check_memory(x)
        check_memory(w)
    kept = Kept(dy, x, w, p, k, score_fn)
    ways = kernels.choose(kept, *mask[:2])
    grads = ways.run(kept, mask)
    if record is not None:
        record.selected(kept.index)
        record.computed(str(ways))
    return grads


def _scatter_rows(rows: Tensor, size: int, index: Tensor) -> Tensor:
    return rows.new_zeros(size).index_copy_(0, index, rows)


# --- linear layers ----------------------------------------------------------------------------


def linear_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    k: int,
    score_fn: ScoreFn,
    mask: Mask,
    record: Record | None = None,
) -> Grads:
    """Return (dX, dW, db) of ``F.linear`` for the kept output features; None where not needed.

    Args:
        dy: Gradient of the output, (*, out_features).
        x: Input, (*, in_features).
        w: Weight, (out_features, in_features).
        k: Features to keep.
        score_fn: Scores the features; is given dy as (rows, out_features).
        mask: Which of dX, dW, db are needed.
        record: Is told what ran.
    """
    if record is not None:
        record.backward(x, w, dy, k, mask)
    need_x, need_w, need_b = mask
    number = math.prod(dy.shape[:-1])  # for -1 there would have to be elements
    rows = dy.reshape(number, w.shape[0])
    if k < w.shape[0]:
        index = select_channels(rows, k, 1, score_fn)
        if record is not None:
            record.selected(index)
        rows = take_channels(rows, index)
        w_kept = w.index_select(0, index)
    else:
        index, w_kept = None, w
    dx = (rows @ w_kept).view(x.shape) if need_x else None
    dw = rows.t() @ x.reshape(number, x.shape[-1]) if need_w else None
    db = rows.sum(0) if need_b else None
    if index is not None:
        dw = put_rows(dw, index, w) if need_w else None
        db = _scatter_rows(db, w.shape[0], index) if need_b else None
    return dx, dw, db
