"""The backward of grouped convolutions in C, for groups that keep too few channels for a block.

The kernels of convolution libraries take channels in blocks of 8 or 16 and so compute a group that
keeps two of its eight channels as if it kept all. These take positions side by side instead. For
one or two spatial dimensions; as in :mod:`ssprop_patch.native` ask for ``is_available`` first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .build import library
from .tensors import NUMBERS, is_last, threads_for

__all__ = ["grouped_dw", "grouped_dx", "is_supported"]


def is_supported(x: Tensor, w: Tensor) -> bool:
    """Tell whether the functions here can take what ``native.is_available`` has let through.

    Args:
        x: (N, C_in, *in).
        w: (C_out, C_in / groups, *kernel).
    """
    return (
        x.dim() in (3, 4)
        and x.dtype is w.dtype
        and x.numel() > 0
        and w.numel() > 0
        and library(NUMBERS[x.dtype], "grouped") is not None
    )


def grouped_dx(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    index: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return dX of a grouped convolution, groups > 1, from the kept channels of dy.

    Args:
        dy: (N, kept, *out): the kept channels only.
        x: (N, C_in, *in); its shape and memory format count.
        w: (C_out, C_in / groups, *kernel).
        index: (kept,), ascending, the same number in each group; any of them where each group has
            one channel (depthwise). Not checked.
        stride, padding, dilation, groups: Of the convolution; a number for each dimension.

    Raises:
        MemoryError: If there is none for the work of a thread.
    """
    dx = torch.empty_like(x)
    _call("grouped_dx", dy, x, w, w.contiguous(), index, dx, stride, padding, dilation, groups)
    return dx


def grouped_dw(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    index: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return dW of a grouped convolution, zeros where no channel is kept; as :func:`grouped_dx`."""
    dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    _call("grouped_dw", dy, x, w, x, index, dw, stride, padding, dilation, groups)
    return dw if w.is_contiguous() else torch.empty_like(w).copy_(dw)


def _call(
    name: str,
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    other: Tensor,
    index: Tensor,
    out: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    if not (dy.is_contiguous() or is_last(dy)):
        dy = dy.contiguous()
    index = index.contiguous()
    n, c_in, *size = x.shape
    out_size, kernel = dy.shape[2:], w.shape[2:]
    if len(size) == 1:  # one row
        size, out_size, kernel, stride, dilation = (
            (1, *numbers) for numbers in (size, out_size, kernel, stride, dilation)
        )
        padding = (0, *padding)
    depthwise, kept = groups == w.shape[0], dy.shape[1]
    computed, per_group = (kept, 1) if depthwise else (groups, kept // groups)
    shape = _Shape(
        n, c_in, *size, *out_size, w.shape[0], computed, per_group, w.shape[1], depthwise,
        *kernel, *stride, *padding, *dilation, not x.is_contiguous(), not dy.is_contiguous(),
    )  # fmt: skip
    function = getattr(library(NUMBERS[x.dtype], "grouped"), name)
    done = function(
        dy.data_ptr(), other.data_ptr(), index.data_ptr(), shape, out.data_ptr(), threads_for(x)
    )
    if not done:
        raise MemoryError("no memory for the backward of a grouped convolution")


_Shape = ctypes.c_int64 * 21  # as grouped.c has it
