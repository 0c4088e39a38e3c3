"""The sparse backward of a layer: one gradient, computed in the way that fits the layer.

What is computed depends on the arguments alone: dX, dW and db of the kept channels, and zero
rows elsewhere. How (gather and a smaller convolution, matrix products, or mask and the dense
kernel) is a matter of speed, chosen per call by :func:`choose_kernel`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .deferred import NormGradient
from .passes import is_channels_last, take_channels
from .selection import ScoreFn, select_channels, selectable_channels

aten = torch.ops.aten


class ConvParams(NamedTuple):
    """The geometry of one convolution, as ``aten.convolution`` takes it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()  # none at all stands for zeros

    def out_channels(self, w: Tensor) -> int:
        """Return C_out of a convolution with the weight ``w``."""
        return w.shape[1] * self.groups if self.transposed else w.shape[0]


Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
Mask = tuple[bool, bool, bool]


class Record(Protocol):
    """What is told of each call of a layer that is being metered."""

    def forward(self, x: Tensor, w: Tensor, y: Tensor) -> None:
        """A forward pass ran."""

    def backward(self, x: Tensor, w: Tensor, dy: Tensor, k: int, mask: Mask) -> None:
        """A backward pass ran, with ``k`` channels of each choice."""

    def selected(self, index: Tensor) -> None:
        """The kept channels, in a sparse backward."""

    def dense(self, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> None:
        """A forward ran in torch's own way, and so will its backward."""




def dense_backward(dy: Tensor, x: Tensor, w: Tensor, p: ConvParams, mask: Mask) -> Grads:
    """Return (dX, dW, db) of the ordinary convolution; None where ``mask`` is False."""
    output_padding = p.output_padding or (0,) * len(p.stride)
    grads = aten.convolution_backward(
        dy, x, w, [p.out_channels(w)], p.stride, p.padding, p.dilation,
        p.transposed, output_padding, p.groups, mask,
    )  # fmt: skip
    # For an empty batch some versions of torch return what was not asked for.
    return tuple(g if needed else None for g, needed in zip(grads, mask, strict=True))


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
    if k >= selectable_channels(p.out_channels(w), p.groups):
        return dense_backward(dy, x, w, p, mask)
    index = select_channels(dy, k, p.groups, score_fn)
    if record is not None:
        record.selected(index)
    kernel = choose_kernel(x, w, p, k)
    if kernel == "mask":
        return _by_mask(dy, x, w, p, index, mask)
    return _by_gather(dy, x, w, p, index, mask, matmul=kernel == "matmul")


def choose_kernel(x: Tensor, w: Tensor, p: ConvParams, k: int) -> str:
    """Return ``"gather"``, ``"matmul"`` or ``"mask"``: the fastest way to the same gradient.

    The rules are from timings of single layers at drop rate 0.8 on two CPU cores (AMD EPYC, torch
    2.15); other devices keep to their convolution kernels:

    - Smaller grouped convolutions run slower than the whole one, and so do smaller depthwise ones
      in channels_last: there the dense kernel gets a masked gradient.
    - A 1x1 convolution is a matrix product, which wins where its sides are long enough (256 to 64
      channels at 40x40: 0.31 of dense, the smaller convolution 0.50; 512 to 2048 at 5x5 the other
      way round), and always with a stride (256 to 512 at 40x40: the convolution 0.72).
    """
    if p.groups > 1:
        depthwise = p.groups == p.out_channels(w)
        return "gather" if depthwise and not is_channels_last(x) else "mask"
    pointwise = all(n == 1 for n in w.shape[2:]) and not any(p.padding)
    if not pointwise or p.transposed or x.device.type != "cpu":
        return "gather"
    if is_channels_last(x):
        return "matmul" if k >= 32 else "gather"
    # A batch of products is summed at last: in half precision that would round in between.
    exact = x.dtype in (torch.float32, torch.float64)
    positions = math.prod(x.shape[2:])
    return "matmul" if exact and (positions >= 100 or max(p.stride) > 1) else "gather"


def _by_mask(
    dy: Tensor, x: Tensor, w: Tensor, p: ConvParams, index: Tensor, mask: Mask
) -> Grads:
    keep = torch.zeros(dy.shape[1], dtype=torch.bool, device=dy.device).index_fill_(0, index, True)
    if isinstance(dy, NormGradient):
        masked = dy.form_masked(keep)
    else:
        # where, not a product: a dropped channel may hold inf or nan, and 0 * inf is nan.
        masked = torch.where(keep.view(-1, *[1] * (dy.dim() - 2)), dy, 0)
    return dense_backward(masked, x, w, p, mask)


def _by_gather(
    dy: Tensor, x: Tensor, w: Tensor, p: ConvParams, index: Tensor, mask: Mask, matmul: bool
) -> Grads:
    need_x, need_w, need_b = mask
    channels = dy.shape[1]
    dy_kept = dy.take(index) if isinstance(dy, NormGradient) else take_channels(dy, index)
    db = _scatter_rows(dy_kept.sum([0, *range(2, dy.dim())]), channels, index) if need_b else None
    if not (need_x or need_w):
        return None, None, db

    depthwise = p.groups > 1 and p.groups == channels
    index_in = _inputs_of_groups(index, x.shape[1] // channels) if depthwise else None
    # A group that is left out takes its input channels with it.
    x_kept = take_channels(x, index_in) if depthwise else x
    p_kept = p._replace(groups=index.shape[0]) if depthwise else p
    # Where the weight of the kept channels lies. A transposed convolution has its output channels
    # in dim 1, but its groups, as in dim 0 the inputs, one after the other.
    w_dim, w_index = (0, index) if not p.transposed else (0, index_in) if depthwise else (1, index)
    w_kept = w.index_select(w_dim, w_index)
    if matmul:
        dx, dw_kept = _pointwise_backward(dy_kept, x, w_kept, p.stride, need_x, need_w)
    else:
        needed = (need_x, need_w, False)
        dx, dw_kept, _ = dense_backward(dy_kept, x_kept, w_kept, p_kept, needed)
    if depthwise and need_x:
        dx = torch.zeros_like(x).index_copy_(1, index_in, dx)
    dw = torch.zeros_like(w).index_copy_(w_dim, w_index, dw_kept) if need_w else None
    return dx, dw, db


def _inputs_of_groups(index: Tensor, per_group: int) -> Tensor:
    """Return the input channels that belong to the groups ``index``."""
    if per_group == 1:
        return index
    steps = torch.arange(per_group, device=index.device)
    return (index.unsqueeze(1) * per_group + steps).flatten()


def _pointwise_backward(
    dy: Tensor, x: Tensor, w: Tensor, stride: tuple[int, ...], need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return (dX, dW) of a 1x1 convolution as matrix products, in the memory format of ``x``."""
    matrix = w.flatten(1)  # (k, C_in)
    read = (slice(None), slice(None), *(slice(None, None, s) for s in stride))
    x_read = x[read]  # a strided one reads some positions only
    dx = dw = None
    if is_channels_last(x):
        rows = dy.movedim(1, -1).reshape(-1, dy.shape[1])
        if need_x:
            dx = (rows @ matrix).view(*dy.movedim(1, -1).shape[:-1], x.shape[1]).movedim(-1, 1)
        if need_w:
            dw = rows.t() @ x_read.movedim(1, -1).reshape(-1, x.shape[1])
    else:
        flat = dy.flatten(2)
        if need_x:
            dx = (matrix.t() @ flat).view(x_read.shape)
        if need_w:
            dw = torch.bmm(flat, x_read.flatten(2).transpose(1, 2)).sum(0)
    if need_x and x_read.shape != x.shape:
        dx_read, dx = dx, torch.zeros_like(x)
        dx[read] = dx_read
    return dx, None if dw is None else dw.view(w.shape)


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
    rows = dy.reshape(-1, w.shape[0])
    if k < w.shape[0]:
        index = select_channels(rows, k, 1, score_fn)
        if record is not None:
            record.selected(index)
        # gather, not index_select, as in take_channels: the features are the last dimension.
        rows = rows.gather(1, index.expand(rows.shape[0], -1))
        w_kept = w.index_select(0, index)
    else:
        index, w_kept = None, w
    dx = (rows @ w_kept).view(x.shape) if need_x else None
    dw = rows.t() @ x.reshape(-1, x.shape[-1]) if need_w else None
    db = rows.sum(0) if need_b else None
    if index is not None:
        dw = torch.zeros_like(w).index_copy_(0, index, dw) if need_w else None
        db = _scatter_rows(db, w.shape[0], index) if need_b else None
    return dx, dw, db
