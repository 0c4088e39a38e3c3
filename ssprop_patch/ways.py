"""Ways to compute the gradients of a convolution's kept channels: all the same, but for speed.

A way is a name and a function from :class:`~ssprop_patch.kept.Kept` to dX or to dW:

- ``gather``: the backward of a smaller convolution, on the kept channels of dy and of the weight.
- ``forward``: dX as an ordinary convolution of dy with the weight turned around.
- ``matmul``: a 1x1 convolution as a matrix product.
- ``mask``: the dense kernel on a dy whose dropped channels are zero.
- ``direct``: C functions of our own for few kept channels (:mod:`ssprop_patch.native.conv`).
- ``rows``: one of them for a single position (:mod:`ssprop_patch.native.rows`).

``gather``, ``forward`` and ``mask`` exist with ``_nhwc``, too: through copies in channels_last, for
contiguous tensors on a CPU whose kernels are much faster in that format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .kept import ConvParams, Grads, Kept, Mask, can_be_direct, dense_backward
from .native.conv import conv_backward, conv_db, conv_dw, conv_dx, is_small
from .native.tensors import check_memory
from .passes import is_channels_last, is_done_by_c, put_sums

_convolution = torch.ops.aten.convolution.default


# --- gather and mask ----------------------------------------------------------------------------

_DX, _DW = (True, False, False), (False, True, False)


def gather(kept: Kept, needed: Mask) -> Grads:
    """Return dX, dW and db by the backward of the smaller convolution."""
    if _is_fatal(kept):
        dw = matmul_dw(kept) if needed[1] else None
        dx = matmul_dx(kept) if needed[0] else None
        return dx, dw, kept.db() if needed[2] else None
    dy, x = _one_format(kept.dy), _one_format(kept.x)
    dx, dw, db = dense_backward(dy, x, kept.w, kept.params, needed)
    return kept.spread_dx(dx), kept.spread_dw(dw), kept.spread_db(db)


def _is_fatal(kept: Kept) -> bool:
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


def gather_nhwc(kept: Kept, needed: Mask) -> Grads:
    """As :func:`gather`, in channels_last."""
    x = _nhwc(kept.x) if needed[1] else _nhwc_shape(kept.x)
    dx, dw, db = dense_backward(_nhwc(kept.dy), x, _nhwc(kept.w), kept.params, needed)
    dx = None if dx is None else dx.contiguous()
    return kept.spread_dx(dx), kept.spread_dw(dw), kept.spread_db(db)


def mask(kept: Kept, needed: Mask) -> Grads:
    """Return dX, dW and db by the dense kernel."""
    return dense_backward(kept.masked_dy, kept.whole_x, kept.whole_w, kept.p, needed)


def mask_nhwc(kept: Kept, needed: Mask) -> Grads:
    """As :func:`mask`, in channels_last."""
    x = _nhwc(kept.whole_x) if needed[1] else _nhwc_shape(kept.whole_x)
    dx, dw, db = dense_backward(_nhwc(kept.masked_dy), x, _nhwc(kept.whole_w), kept.p, needed)
    dx, dw = (None if t is None else t.contiguous() for t in (dx, dw))
    return dx, dw, db


def _nhwc(t: Tensor) -> Tensor:
    check_memory(t)  # as torch's convolutions do, but not its copies
    return t.contiguous(memory_format=torch.channels_last)


def _nhwc_shape(x: Tensor) -> Tensor:
    # dX depends on the shape and the format of x alone: memory that nobody reads or writes.
    return torch.empty_like(x, memory_format=torch.channels_last)


# --- forward ------------------------------------------------------------------------------------


def forward_dx(kept: Kept) -> Tensor:
    """Return dX by a convolution of dy with the weight turned around; for a stride of 1."""
    dx = _forward_dx(kept, kept.dy, kept.w)
    if is_channels_last(kept.whole_x) and not is_channels_last(dx):
        dx = torch.empty_like(kept.whole_x).copy_(dx)  # of one channel formats look the same
    return dx


def forward_dx_nhwc(kept: Kept) -> Tensor:
    """As :func:`forward_dx`, in channels_last."""
    return _forward_dx(kept, _nhwc(kept.dy), _nhwc(kept.w)).contiguous()


def _forward_dx(kept: Kept, dy: Tensor, w: Tensor) -> Tensor:
    p, kernel = kept.params, w.shape[2:]
    # (groups * k, C_in / groups, ...) to (groups * C_in / groups, k, ...)
    turned = w.unflatten(0, (p.groups, -1)).transpose(1, 2).flatten(0, 1)
    if any(n > 1 for n in kernel):
        turned = turned.flip(*range(2, w.dim()))
    padding = [d * (n - 1) - pad for d, n, pad in zip(p.dilation, kernel, p.padding, strict=True)]
    none = [0] * len(kernel)
    dx = _convolution(dy, turned, None, p.stride, padding, p.dilation, False, none, p.groups)
    return kept.spread_dx(dx)


# --- matmul -------------------------------------------------------------------------------------


def matmul_dx(kept: Kept) -> Tensor:
    """Return dX of a 1x1 convolution as a matrix product, in the memory format of ``x``."""
    dy, x = kept.dy, kept.whole_x
    matrix = kept.w.flatten(1)  # (k, C_in)
    if _is_single(x):
        return (dy.flatten(1) @ matrix).view(x.shape)
    if is_channels_last(x):
        last = dy.movedim(1, -1)
        dx = (_rows(dy) @ matrix).view(*last.shape[:-1], -1).movedim(-1, 1)
    else:
        turned = matrix.t().expand(dy.shape[0], -1, -1)
        dx = torch.bmm(turned, dy.flatten(2)).view(*x.shape[:2], *dy.shape[2:])
    if dx.shape == x.shape:
        return dx
    # A stride leaves positions that the convolution never read.
    out = torch.zeros_like(x)
    out[_read(kept)] = dx
    return out


def matmul_dw(kept: Kept) -> Tensor:
    """Return dW of a 1x1 convolution as a matrix product."""
    dy, x = kept.dy, kept.whole_x
    if _is_single(x):
        dw = dy.flatten(1).t() @ x.flatten(1)
    else:
        read = x if max(kept.p.stride) == 1 else x[_read(kept)]
        if is_channels_last(x):
            dw = _rows(dy).t() @ _rows(read)
        else:
            parts = _products(dy.flatten(2), read.flatten(2).transpose(1, 2))
            parts = parts.view(*parts.shape[:2], *kept.whole_w.shape[1:])
            return put_sums(parts, kept.index, kept.whole_w)
    return kept.spread_dw(dw.view(kept.w.shape))


# Products of so many elements in all are added up on the way, which takes no longer.
_LARGE_PRODUCTS = 2**18


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return matrix products of a batch whose sum is that of all ``a[i] @ b[i]``."""
    n, size = a.shape[0], a.shape[0] * a.shape[1] * b.shape[2]
    whole = size < _LARGE_PRODUCTS or not a.is_cpu or torch.is_grad_enabled()
    if torch.compiler.is_compiling() or whole or n <= (at_a_time := torch.get_num_threads()):
        return torch.bmm(a, b)
    products = torch.bmm(a[:at_a_time], b[:at_a_time])
    for first in range(at_a_time, n, at_a_time):
        some = slice(first, min(first + at_a_time, n))
        products[: some.stop - first].baddbmm_(a[some], b[some])
    return products


def _is_single(x: Tensor) -> bool:
    """Whether there is one position: a row of channels for each sample."""
    return x.shape[2:].numel() == 1


def _are_rows(x: Tensor, w: Tensor, p: ConvParams) -> bool:
    """Whether a convolution is a matrix product with one row for each sample."""
    return p.groups == 1 and _is_single(x) and is_pointwise(w.shape, p)


def _rows(t: Tensor) -> Tensor:
    """Return (N, C, *spatial) as a matrix of positions by channels."""
    return t.movedim(1, -1).reshape(-1, t.shape[1])


def _read(kept: Kept) -> tuple[slice, ...]:
    return (slice(None), slice(None), *(slice(None, None, s) for s in kept.p.stride))


# --- direct -------------------------------------------------------------------------------------


def direct_dx(kept: Kept) -> Tensor:
    """Return dX by a C function, or by torch where it has to."""
    dx = conv_dx(*_for_c(kept)) if kept.can_be_direct else None
    return gather(kept, _DX)[0] if dx is None else dx


def direct_dw(kept: Kept) -> Tensor:
    """As :func:`direct_dx`, dW."""
    dw = conv_dw(*_for_c(kept)) if kept.can_be_direct else None
    return gather(kept, _DW)[1] if dw is None else dw


def direct(kept: Kept, needed: Mask) -> Grads:
    """Return dX, dW and db by C functions: by one, which also chooses the channels, if it can."""
    grads = _all_in_one(kept, needed)
    if grads is not None:
        return grads
    need_x, need_w, need_b = needed
    dw = direct_dw(kept) if need_w else None
    dx = direct_dx(kept) if need_x else None
    return dx, dw, _direct_db(kept) if need_b else None


def _direct_db(kept: Kept) -> Tensor:
    db = conv_db(*_for_c(kept)) if kept.can_be_direct else None
    return kept.db() if db is None else db


def _for_c(kept: Kept) -> tuple[Tensor, Tensor, Tensor, Tensor, ConvParams]:
    return kept.dy, kept.whole_x, kept.whole_w, kept.index, kept.p


def rows(kept: Kept, needed: Mask) -> Grads:
    """As :func:`direct`, of a single position."""
    grads = _all_in_one(kept, needed)
    if grads is not None:
        return grads
    if kept.can_be_direct and _are_rows(kept.whole_x, kept.whole_w, kept.p):
        args = kept.dy, kept.whole_x, kept.whole_w, kept.index, needed
        grads = native.rows_backward(*args)
    return gather(kept, needed) if grads is None else grads


def _all_in_one(kept: Kept, needed: Mask) -> Grads | None:
    dy, order = kept.whole_dy, kept.order
    if order is None or not (kept.can_be_direct and is_done_by_c(dy)):
        return None
    args = dy, kept.whole_x, kept.whole_w, kept.p, kept.k, order, needed
    done = conv_backward(*args)
    if done is None:
        return None
    kept.index, grads = done
    return grads


# --- which there are ----------------------------------------------------------------------------

#: Ways that compute all gradients in one call, and choose the channels in it where they can.
CHOOSING: dict[str, Callable[[Kept, Mask], Grads]] = {"direct": direct, "rows": rows}
#: All ways that compute all gradients in one call.
TOGETHER: dict[str, Callable[[Kept, Mask], Grads]] = {
    "gather": gather,
    "gather_nhwc": gather_nhwc,
    "mask": mask,
    "mask_nhwc": mask_nhwc,
    **CHOOSING,
}
DX: dict[str, Callable[[Kept], Tensor]] = {
    **{name: lambda kept, way=way: way(kept, _DX)[0] for name, way in TOGETHER.items()},
    "forward": forward_dx,
    "forward_nhwc": forward_dx_nhwc,
    "matmul": matmul_dx,
    "direct": direct_dx,
}
DW: dict[str, Callable[[Kept], Tensor]] = {
    **{name: lambda kept, way=way: way(kept, _DW)[1] for name, way in TOGETHER.items()},
    "matmul": matmul_dw,
    "direct": direct_dw,
}


class Ways(NamedTuple):
    """How a sparse backward is computed: names in :data:`DX` and :data:`DW`."""

    dx: str
    dw: str

    def __str__(self) -> str:
        return self.dx if self.dx == self.dw else f"{self.dx}/{self.dw}"

    def run(self, kept: Kept, needed: Mask) -> Grads:
        """Return dX, dW and db; None where not needed."""
        need_x, need_w, need_b = needed
        if self.dx == self.dw and self.dx in TOGETHER:
            return TOGETHER[self.dx](kept, needed)
        # dW first: what it takes on the way is free again before there is a dX.
        dw = DW[self.dw](kept) if need_w else None
        dx = DX[self.dx](kept) if need_x else None
        return dx, dw, kept.db() if need_b else None


def possible(x: Tensor, w: Tensor, p: ConvParams) -> tuple[list[str], list[str]]:
    """Return the names of the ways to dX and to dW that a convolution has."""
    if p.transposed:
        return ["gather"], ["gather"]
    dx, dw = ["gather"], ["gather"]
    if is_pointwise(w.shape, p) and p.groups == 1:
        dx.append("matmul")
        # A batch of products is summed at last: in half precision that would round in between.
        summed = not (_is_single(x) or is_channels_last(x))
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
        if _are_rows(x, w, p):
            names.append("rows")
        dx += names
        dw += names
    return dx, dw


def is_legal(name: str, x: Sequence[int], w: Sequence[int], p: ConvParams, last: bool) -> bool:
    """Whether a way can be that of a convolution of these shapes: one that was loaded, say.

    The C functions look for themselves whether they can.
    """
    base = name.removesuffix("_nhwc")
    if base != name and not has_nhwc(x, last):
        return False
    if base == "matmul":
        return is_pointwise(w, p) and p.groups == 1
    return base != "forward" or has_forward(w, p)


def is_pointwise(w: Sequence[int], p: ConvParams) -> bool:
    """Whether a convolution with a weight of shape ``w`` reads one position for each output."""
    return all(n == 1 for n in w[2:]) and not any(p.padding)


def has_forward(w: Sequence[int], p: ConvParams) -> bool:
    """Whether dX is a convolution of dy: without stride, padded by no more than the kernel."""
    reach = [d * (n - 1) for d, n in zip(p.dilation, w[2:], strict=True)]
    return set(p.stride) <= {1} and all(a <= b for a, b in zip(p.padding, reach, strict=True))


def has_nhwc(x: Sequence[int], last: bool) -> bool:
    """Whether an input of shape ``x`` can go through channels_last, in which it is not yet.

    The formats differ only where there are several channels and positions.
    """
    return not last and len(x) == 4 and x[1] > 1 and math.prod(x[2:]) > 1
