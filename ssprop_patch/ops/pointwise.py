"""1x1 convolutions as matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.geometry import ConvParams
from .channel_gradients import KeptChannels
from .channel_ops import is_channels_last, put_sums


def is_pointwise(w: Sequence[int], p: ConvParams) -> bool:
    """Whether a convolution with a weight of shape ``w`` reads one position for each output."""
    return all(n == 1 for n in w[2:]) and not any(p.padding)


def matmul_dx(kept: KeptChannels) -> Tensor:
    """Return dX of a 1x1 convolution as a matrix product, in the memory format of ``x``."""
    dy, x = kept.dy, kept.whole_x
    matrix = kept.w.flatten(1)  # (k, C_in)
    if is_single(x):
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


def matmul_dw(kept: KeptChannels) -> Tensor:
    """Return dW of a 1x1 convolution as a matrix product."""
    dy, x = kept.dy, kept.whole_x
    if is_single(x):
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


# Products of this many elements in all are summed as they are made, which takes no longer.
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


def is_single(x: Tensor) -> bool:
    """Whether there is one position: a row of channels for each sample."""
    return x.shape[2:].numel() == 1


def are_rows(x: Tensor, w: Tensor, p: ConvParams) -> bool:
    """Whether a convolution is a matrix product with one row for each sample."""
    return p.groups == 1 and is_single(x) and is_pointwise(w.shape, p)


def _rows(t: Tensor) -> Tensor:
    """Return (N, C, *spatial) as a matrix of positions by channels."""
    return t.movedim(1, -1).reshape(-1, t.shape[1])


def _read(kept: KeptChannels) -> tuple[slice, ...]:
    return (slice(None), slice(None), *(slice(None, None, s) for s in kept.p.stride))
