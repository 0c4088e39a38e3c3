"""Algorithms for the gradients of a convolution's kept channels; they differ in speed only.

An algorithm is a name and a function from :class:`.channel_gradients.KeptChannels` to dX or dW:

- ``gather``: the backward of a smaller convolution, on the kept channels of dy and of the weight.
- ``forward``: dX as an ordinary convolution of dy with the weight turned around.
- ``matmul``: a 1x1 convolution as a matrix product.
- ``mask``: the dense kernel on a dy whose dropped channels are zero.
- ``direct``: C functions of our own for few kept channels (:mod:`ssprop_patch.ops.native.conv`).
- ``rows``: one of them for a single position (:mod:`ssprop_patch.ops.native.rows`).

``gather``, ``forward`` and ``mask`` exist with ``_nhwc``, too: through copies in channels_last, for
contiguous tensors on a CPU whose kernels are much faster in that format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.geometry import ConvParams
from ..core.operations import Grads, OutputMask
from ..core.reference import dense_backward
from . import native
from .channel_gradients import KeptChannels, can_be_direct
from .channel_ops import is_channels_last, is_done_by_c
from .native.conv import conv_backward, conv_db, conv_dw, conv_dx, is_small
from .native.tensors import check_memory
from .pointwise import are_rows, is_pointwise, is_single, matmul_dw, matmul_dx

_convolution = torch.ops.aten.convolution.default


# --- gather and mask ----------------------------------------------------------------------------

_DX, _DW = (True, False, False), (False, True, False)


def gather(kept: KeptChannels, output_mask: OutputMask) -> Grads:
    """Return dX, dW and db by the backward of the smaller convolution."""
    if _is_fatal(kept):
        dw = matmul_dw(kept) if output_mask[1] else None
        dx = matmul_dx(kept) if output_mask[0] else None
        return dx, dw, kept.db() if output_mask[2] else None
    dy, x = _one_format(kept.dy), _one_format(kept.x)
    dx, dw, db = dense_backward(dy, x, kept.w, kept.params, output_mask)
    return kept.spread_dx(dx), kept.spread_dw(dw), kept.spread_db(db)


def _is_fatal(kept: KeptChannels) -> bool:
    """Whether torch 2.14 may write past the heap: a strided 1x1 convolution of a single channel.

    A single channel has the strides of both memory formats; with the other tensor in channels_last
    its kernel for dW takes one for the other.
    """
    p, w = kept.p, kept.whole_w
    if torch.compiler.is_compiling() or p.transposed or p.groups > 1 or max(p.stride) == 1:
        return False
    return is_pointwise(w.shape, p) and (kept.number == 1 or w.shape[1] == 1)


def _one_format(t: Tensor) -> Tensor:
    """Return a single channel with the strides of a contiguous tensor.

    With those of channels_last, which name the same memory, torch 2.14's dW of a 1x1 convolution
    with a stride writes past the heap.
    """
    if torch.compiler.is_compiling() or t.shape[1] > 1 or t.stride(1) > 1:
        return t
    return t.squeeze(1).unsqueeze(1)


def gather_nhwc(kept: KeptChannels, output_mask: OutputMask) -> Grads:
    """As :func:`gather`, in channels_last."""
    x = _nhwc(kept.x) if output_mask[1] else _nhwc_shape(kept.x)
    dx, dw, db = dense_backward(_nhwc(kept.dy), x, _nhwc(kept.w), kept.params, output_mask)
    dx = None if dx is None else dx.contiguous()
    return kept.spread_dx(dx), kept.spread_dw(dw), kept.spread_db(db)


def mask(kept: KeptChannels, output_mask: OutputMask) -> Grads:
    """Return dX, dW and db by the dense kernel."""
    return dense_backward(kept.masked_dy, kept.whole_x, kept.whole_w, kept.p, output_mask)


def mask_nhwc(kept: KeptChannels, output_mask: OutputMask) -> Grads:
    """As :func:`mask`, in channels_last."""
    x = _nhwc(kept.whole_x) if output_mask[1] else _nhwc_shape(kept.whole_x)
    dx, dw, db = dense_backward(_nhwc(kept.masked_dy), x, _nhwc(kept.whole_w), kept.p, output_mask)
    dx, dw = (None if t is None else t.contiguous() for t in (dx, dw))
    return dx, dw, db


def _nhwc(t: Tensor) -> Tensor:
    check_memory(t)  # as torch's convolutions do, but not its copies
    return t.contiguous(memory_format=torch.channels_last)


def _nhwc_shape(x: Tensor) -> Tensor:
    # dX depends on the shape and the format of x alone: memory that nobody reads or writes.
    return torch.empty_like(x, memory_format=torch.channels_last)


# --- forward ------------------------------------------------------------------------------------


def forward_dx(kept: KeptChannels) -> Tensor:
    """Return dX by a convolution of dy with the weight turned around; for a stride of 1."""
    dx = _forward_dx(kept, kept.dy, kept.w)
    if is_channels_last(kept.whole_x) and not is_channels_last(dx):
        dx = torch.empty_like(kept.whole_x).copy_(dx)  # of one channel formats look the same
    return dx


def forward_dx_nhwc(kept: KeptChannels) -> Tensor:
    """As :func:`forward_dx`, in channels_last."""
    return _forward_dx(kept, _nhwc(kept.dy), _nhwc(kept.w)).contiguous()


def _forward_dx(kept: KeptChannels, dy: Tensor, w: Tensor) -> Tensor:
    p, kernel = kept.params, w.shape[2:]
    # (groups * k, C_in / groups, ...) to (groups * C_in / groups, k, ...)
    turned = w.unflatten(0, (p.groups, -1)).transpose(1, 2).flatten(0, 1)
    if any(n > 1 for n in kernel):
        turned = turned.flip(*range(2, w.dim()))
    padding = [d * (n - 1) - pad for d, n, pad in zip(p.dilation, kernel, p.padding, strict=True)]
    none = [0] * len(kernel)
    dx = _convolution(dy, turned, None, p.stride, padding, p.dilation, False, none, p.groups)
    return kept.spread_dx(dx)


# --- direct -------------------------------------------------------------------------------------


def direct_dx(kept: KeptChannels) -> Tensor | None:
    """Return dX by a C function, or by torch where it has to."""
    dx = conv_dx(*_for_c(kept)) if kept.can_be_direct else None
    return gather(kept, _DX)[0] if dx is None else dx


def direct_dw(kept: KeptChannels) -> Tensor | None:
    """As :func:`direct_dx`, dW."""
    dw = conv_dw(*_for_c(kept)) if kept.can_be_direct else None
    return gather(kept, _DW)[1] if dw is None else dw


def direct(kept: KeptChannels, output_mask: OutputMask) -> Grads:
    """Return dX, dW and db by C functions: by one, which also chooses the channels, if it can."""
    grads = _all_in_one(kept, output_mask)
    if grads is not None:
        return grads
    need_x, need_w, need_b = output_mask
    dw = direct_dw(kept) if need_w else None
    dx = direct_dx(kept) if need_x else None
    return dx, dw, _direct_db(kept) if need_b else None


def _direct_db(kept: KeptChannels) -> Tensor:
    db = conv_db(*_for_c(kept)) if kept.can_be_direct else None
    return kept.db() if db is None else db


def _for_c(kept: KeptChannels) -> tuple[Tensor, Tensor, Tensor, Tensor, ConvParams]:
    return kept.dy, kept.whole_x, kept.whole_w, kept.index, kept.p


def rows(kept: KeptChannels, output_mask: OutputMask) -> Grads:
    """As :func:`direct`, of a single position."""
    grads = _all_in_one(kept, output_mask)
    if grads is not None:
        return grads
    if kept.can_be_direct and are_rows(kept.whole_x, kept.whole_w, kept.p):
        args = kept.dy, kept.whole_x, kept.whole_w, kept.index, output_mask
        grads = native.rows_backward(*args)
    return gather(kept, output_mask) if grads is None else grads


def _all_in_one(kept: KeptChannels, output_mask: OutputMask) -> Grads | None:
    dy, order = kept.whole_dy, kept.order
    if order is None or not (kept.can_be_direct and is_done_by_c(dy)):
        return None
    args = dy, kept.whole_x, kept.whole_w, kept.p, kept.k, order, output_mask
    done = conv_backward(*args)
    if done is None:
        return None
    kept.index, grads = done
    return grads


# --- which there are ----------------------------------------------------------------------------


_Together = Callable[[KeptChannels, OutputMask], Grads]


def _dx_of(together: _Together) -> Callable[[KeptChannels], Tensor | None]:
    return lambda kept: together(kept, _DX)[0]


def _dw_of(together: _Together) -> Callable[[KeptChannels], Tensor | None]:
    return lambda kept: together(kept, _DW)[1]


#: Algorithms that compute all gradients in one call, and choose the channels in it where they can.
CHOOSING: dict[str, _Together] = {"direct": direct, "rows": rows}
#: All algorithms that compute all gradients in one call.
TOGETHER: dict[str, _Together] = {
    "gather": gather,
    "gather_nhwc": gather_nhwc,
    "mask": mask,
    "mask_nhwc": mask_nhwc,
    **CHOOSING,
}
DX: dict[str, Callable[[KeptChannels], Tensor | None]] = {
    **{name: _dx_of(way) for name, way in TOGETHER.items()},
    "forward": forward_dx,
    "forward_nhwc": forward_dx_nhwc,
    "matmul": matmul_dx,
    "direct": direct_dx,
}
DW: dict[str, Callable[[KeptChannels], Tensor | None]] = {
    **{name: _dw_of(way) for name, way in TOGETHER.items()},
    "matmul": matmul_dw,
    "direct": direct_dw,
}


class Algorithms(NamedTuple):
    """How a sparse backward is computed: names in :data:`DX` and :data:`DW`."""

    dx: str
    dw: str

    def __str__(self) -> str:
        return self.dx if self.dx == self.dw else f"{self.dx}/{self.dw}"

    def run(self, kept: KeptChannels, output_mask: OutputMask) -> Grads:
        """Return dX, dW and db; None where not needed."""
        need_x, need_w, need_b = output_mask
        if self.dx == self.dw and self.dx in TOGETHER:
            return TOGETHER[self.dx](kept, output_mask)
        # dW first: what it takes on the way is free again before there is a dX.
        dw = DW[self.dw](kept) if need_w else None
        dx = DX[self.dx](kept) if need_x else None
        return dx, dw, kept.db() if need_b else None


def candidates(x: Tensor, w: Tensor, p: ConvParams) -> tuple[list[str], list[str]]:
    """Return the names of the algorithms for dX and for dW that a convolution has."""
    if p.transposed:
        return ["gather"], ["gather"]
    dx, dw = ["gather"], ["gather"]
    if is_pointwise(w.shape, p) and p.groups == 1:
        dx.append("matmul")
        # The products of a batch are summed afterwards: half precision would round in between.
        summed = not (is_single(x) or is_channels_last(x))
        if not summed or x.dtype in (torch.float32, torch.float64):
            dw.append("matmul")
    if has_forward(w.shape, p):
        dx.append("forward")
    if p.groups > 1:
        dx.append("mask")
        dw.append("mask")
    if x.is_cpu and has_nhwc(x.shape, is_channels_last(x)):
        for names in (dx, dw):
            names += [f"{name}_nhwc" for name in names if name != "matmul"]
    if can_be_direct(x, w) and is_small(x.shape, w.shape, p):
        names = ["direct"]
        if are_rows(x, w, p):
            names.append("rows")
        dx += names
        dw += names
    return dx, dw


def is_legal(name: str, x: Sequence[int], w: Sequence[int], p: ConvParams, last: bool) -> bool:
    """Whether an algorithm can be that of a convolution of these shapes: one that was loaded, say.

    The C functions look for themselves whether they can.
    """
    base = name.removesuffix("_nhwc")
    if base != name and not has_nhwc(x, last):
        return False
    if base == "matmul":
        return is_pointwise(w, p) and p.groups == 1
    return base != "forward" or has_forward(w, p)


def has_forward(w: Sequence[int], p: ConvParams) -> bool:
    """Whether dX is a convolution of dy: without stride, padded by no more than the kernel."""
    reach = [d * (n - 1) for d, n in zip(p.dilation, w[2:], strict=True)]
    return set(p.stride) <= {1} and all(a <= b for a, b in zip(p.padding, reach, strict=True))


def has_nhwc(x: Sequence[int], last: bool) -> bool:
    """Whether an input of shape ``x`` can go through channels_last, in which it is not yet.

    The formats differ only where there are several channels and positions.
    """
    return not last and len(x) == 4 and x[1] > 1 and math.prod(x[2:]) > 1
