"""Ways to compute the gradients of a convolution's kept channels: all the same, but for speed.

A way is a name and a function from :class:`Kept` to dX or to dW:

- ``gather``: the backward of a smaller convolution, on the kept channels of dy and of the weight.
- ``forward``: dX as an ordinary convolution of dy with the weight turned around.
- ``matmul``: a 1x1 convolution as a matrix product.
- ``mask``: the dense kernel on a dy whose dropped channels are zero.

``gather``, ``forward`` and ``mask`` exist with ``_nhwc``, too: through copies in channels_last, for
contiguous tensors on a CPU whose kernels are much faster in that format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .deferred import NormGradient
from .passes import is_channels_last, put_channels, take_channels

_convolution_backward = torch.ops.aten.convolution_backward.default
_convolution = torch.ops.aten.convolution.default


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


def dense_backward(dy: Tensor, x: Tensor, w: Tensor, p: ConvParams, mask: Mask) -> Grads:
    """Return (dX, dW, db) of the ordinary convolution; None where ``mask`` is False."""
    output_padding = p.output_padding or (0,) * len(p.stride)
    grads = _convolution_backward(
        dy, x, w, [p.out_channels(w)], p.stride, p.padding, p.dilation,
        p.transposed, output_padding, p.groups, mask,
    )  # fmt: skip
    # For an empty batch some versions of torch return what was not asked for.
    return tuple(g if needed else None for g, needed in zip(grads, mask, strict=True))


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


class Kept:
    """The kept channels of one backward, and what the ways need of them, made when asked for.

    Args:
        dy: Gradient of the output, (N, C_out, *out).
        x: Input, (N, C_in, *in).
        w: Weight, (C_out, C_in / groups, *kernel); (C_in, C_out / groups, *kernel) if transposed.
        p: Geometry.
        index: The kept output channels, ascending; the same number in each group.
    """

    def __init__(self, dy: Tensor, x: Tensor, w: Tensor, p: ConvParams, index: Tensor) -> None:
        self.whole_dy, self.whole_x, self.whole_w, self.p, self.index = dy, x, w, p, index
        self.depthwise = p.groups > 1 and p.groups == dy.shape[1]

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
        return self.p._replace(groups=self.index.shape[0]) if self.depthwise else self.p

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

    def spread_db(self, db: Tensor | None) -> Tensor | None:
        """Return db of all channels from that of the kept ones."""
        if db is None:
            return None
        return db.new_zeros(self.whole_dy.shape[1]).index_copy_(0, self.index, db)

    def spread_dx(self, dx: Tensor | None) -> Tensor | None:
        """Return dX of all input channels from that of :attr:`x`."""
        if dx is None or not self.depthwise:
            return dx
        return put_channels(dx, self.input_index, self.whole_x)

    def spread_dw(self, dw: Tensor | None) -> Tensor | None:
        """Return dW of all channels from that of :attr:`w`."""
        if dw is None:
            return None
        dim, index = self.weight_rows
        return torch.zeros_like(self.whole_w).index_copy_(dim, index, dw)


# --- gather and mask ----------------------------------------------------------------------------

_DX, _DW = (True, False, False), (False, True, False)


def gather(kept: Kept, needed: Mask) -> Grads:
    """Return dX, dW and db by the backward of the smaller convolution."""
    dx, dw, db = dense_backward(kept.dy, kept.x, kept.w, kept.params, needed)
    return kept.spread_dx(dx), kept.spread_dw(dw), kept.spread_db(db)


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
        dx = (matrix.t() @ dy.flatten(2)).view(*x.shape[:2], *dy.shape[2:])
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
            dw = torch.bmm(dy.flatten(2), read.flatten(2).transpose(1, 2)).sum(0)
    return kept.spread_dw(dw.view(kept.w.shape))


def _is_single(x: Tensor) -> bool:
    """Whether there is one position: a row of channels for each sample."""
    return x.shape[2:].numel() == 1


def _rows(t: Tensor) -> Tensor:
    """Return (N, C, *spatial) as a matrix of positions by channels."""
    return t.movedim(1, -1).reshape(-1, t.shape[1])


def _read(kept: Kept) -> tuple[slice, ...]:
    return (slice(None), slice(None), *(slice(None, None, s) for s in kept.p.stride))


# --- which there are ----------------------------------------------------------------------------

#: Ways that compute all gradients in one call.
TOGETHER: dict[str, Callable[[Kept, Mask], Grads]] = {
    "gather": gather,
    "gather_nhwc": gather_nhwc,
    "mask": mask,
    "mask_nhwc": mask_nhwc,
}
DX: dict[str, Callable[[Kept], Tensor]] = {
    **{name: lambda kept, way=way: way(kept, _DX)[0] for name, way in TOGETHER.items()},
    "forward": forward_dx,
    "forward_nhwc": forward_dx_nhwc,
    "matmul": matmul_dx,
}
DW: dict[str, Callable[[Kept], Tensor]] = {
    **{name: lambda kept, way=way: way(kept, _DW)[1] for name, way in TOGETHER.items()},
    "matmul": matmul_dw,
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
        dx = DX[self.dx](kept) if need_x else None
        dw = DW[self.dw](kept) if need_w else None
        return dx, dw, kept.db() if need_b else None


def possible(x: Tensor, w: Tensor, p: ConvParams) -> tuple[list[str], list[str]]:
    """Return the names of the ways to dX and to dW that a convolution has."""
    if p.transposed:
        return ["gather"], ["gather"]
    dx, dw = ["gather"], ["gather"]
    pointwise = all(n == 1 for n in w.shape[2:]) and not any(p.padding)
    if pointwise and p.groups == 1:
        dx.append("matmul")
        # A batch of products is summed at last: in half precision that would round in between.
        summed = not (_is_single(x) or is_channels_last(x))
        if not summed or x.dtype in (torch.float32, torch.float64):
            dw.append("matmul")
    reach = [d * (n - 1) for d, n in zip(p.dilation, w.shape[2:], strict=True)]
    if set(p.stride) <= {1} and all(a <= b for a, b in zip(p.padding, reach, strict=True)):
        dx.append("forward")
    if p.groups > 1:
        dx.append("mask")
        dw.append("mask")
    # The formats differ only where there are several channels and positions.
    several = x.dim() == 4 and x.shape[1] > 1 and not _is_single(x)
    if several and x.device.type == "cpu" and not is_channels_last(x):
        for names in (dx, dw):
            names += [f"{name}_nhwc" for name in names if name != "matmul"]
    return dx, dw
