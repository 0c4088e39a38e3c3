"""The backward of convolutions in C, for few kept channels.

The kernels of convolution libraries take channels in blocks of 8 or 16. They compute a group that
keeps two of its eight channels as if it kept all, and copy tensors into blocks and back. These take
positions side by side instead. As in
:mod:`ssprop_patch.native` ask for ``is_available`` first.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .build import library
from .tensors import NUMBERS, is_last, pointer, threads_for

if TYPE_CHECKING:
    from ..kept import ConvParams

__all__ = ["conv_backward", "conv_db", "conv_dw", "conv_dx", "is_supported"]


def is_supported(x: Tensor, w: Tensor) -> bool:
    """Tell whether the functions here can take what ``native.is_available`` has let through.

    Args:
        x: (N, C_in, *in).
        w: (C_out, C_in / groups, *kernel).
    """
    return (
        x.dim() in (3, 4, 5)
        and x.dtype is w.dtype
        and x.numel() > 0
        and w.numel() > 0
        and library(NUMBERS[x.dtype], "conv") is not None
    )


def conv_dx(dy: Tensor, x: Tensor, w: Tensor, index: Tensor, p: ConvParams) -> Tensor:
    """Return dX of a convolution from the kept channels of dy.

    Args:
        dy: (N, kept, *out): the kept channels only.
        x: (N, C_in, *in); its shape and memory format count.
        w: (C_out, C_in / groups, *kernel).
        index: (kept,), ascending, the same number in each group; any of them where each of several
            groups has one channel (depthwise). Not checked.
        p: Geometry, not transposed.

    Raises:
        MemoryError: If there is none for the work of a thread.
    """
    dx, function = torch.empty_like(x), library(NUMBERS[x.dtype], "conv").conv_dx
    _call(function, dy, w.contiguous(), x, w, index, p, dx)
    return dx


def conv_dw(dy: Tensor, x: Tensor, w: Tensor, index: Tensor, p: ConvParams) -> Tensor:
    """Return dW, zeros where no channel is kept; arguments as for :func:`conv_dx`."""
    dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    _call(library(NUMBERS[x.dtype], "conv").conv_dw, dy, x, x, w, index, p, dw)
    return dw if w.is_contiguous() else torch.empty_like(w).copy_(dw)


def conv_db(dy: Tensor, x: Tensor, w: Tensor, index: Tensor, p: ConvParams) -> Tensor:
    """Return db, zeros where no channel is kept; arguments as for :func:`conv_dx`."""
    db = w.new_empty(w.shape[0])
    dy, shape = _described(dy, x, w, p)
    index = index.contiguous()
    library(NUMBERS[x.dtype], "conv").conv_db(
        dy.data_ptr(), index.data_ptr(), shape, db.data_ptr()
    )
    return db


def conv_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    p: ConvParams,
    k: int,
    order: int,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Choose the kept channels and return them with dX, dW and db, those that are ``needed``.

    Args:
        dy: (N, C_out, *out), all channels.
        x, w, p: As for :func:`conv_dx`.
        k: Channels to keep of each choice, see :func:`ssprop_patch.selection.selectable_channels`.
        order: They are chosen by their sums of ``|dy| ** order``.
        needed: Which of the three.

    Raises:
        MemoryError: If there is none for the work of a thread.
    """
    choices = 1 if p.groups == w.shape[0] else p.groups
    index = dy.new_empty(choices * k, dtype=torch.int64)
    dx = torch.empty_like(x) if needed[0] else None
    dw = torch.empty_like(w, memory_format=torch.contiguous_format) if needed[1] else None
    db = w.new_empty(w.shape[0]) if needed[2] else None
    formats = not x.is_contiguous(), not dy.is_contiguous()
    whole_w = w.contiguous()
    done = library(NUMBERS[x.dtype], "conv").conv_backward(
        dy.data_ptr(), x.data_ptr(), whole_w.data_ptr(),
        _shape(dy.shape, choices * k, x.shape, w.shape, p, *formats), order, choices, k,
        index.data_ptr(), pointer(dx), pointer(dw), pointer(db),
        threads_for(x, dy.numel() // dy.shape[1] * choices * k),
    )  # fmt: skip
    if not done:
        raise MemoryError(_NO_MEMORY)
    if dw is not None and not w.is_contiguous():
        dw = torch.empty_like(w).copy_(dw)
    return index, (dx, dw, db)


_NO_MEMORY = "no memory for the backward of a convolution"


def _call(
    function: Callable[..., int],
    dy: Tensor,
    other: Tensor,
    x: Tensor,
    w: Tensor,
    index: Tensor,
    p: ConvParams,
    out: Tensor,
) -> None:
    """Call a function of conv.c, which reads ``dy`` and ``other``."""
    dy, shape = _described(dy, x, w, p)
    index = index.contiguous()
    done = function(
        dy.data_ptr(), other.data_ptr(), index.data_ptr(), shape, out.data_ptr(),
        threads_for(x, dy.numel()),
    )
    if not done:
        raise MemoryError(_NO_MEMORY)


def _described(dy: Tensor, x: Tensor, w: Tensor, p: ConvParams) -> tuple[Tensor, Any]:
    """Return the kept channels of dy, as C reads them, and the sizes."""
    if not (dy.is_contiguous() or is_last(dy)):
        dy = dy.contiguous()
    formats = not x.is_contiguous(), not dy.is_contiguous()
    return dy, _shape(dy.shape, dy.shape[1], x.shape, w.shape, p, *formats)


_Shape = ctypes.c_int64 * 27  # as layout.h has it


@functools.lru_cache(maxsize=4096)  # a small layer takes longer to describe than to compute
def _shape(
    dy: torch.Size,
    kept: int,
    x: torch.Size,
    w: torch.Size,
    p: ConvParams,
    x_last: bool,
    dy_last: bool,
) -> ctypes.Array[ctypes.c_int64]:
    sizes = (x[2:], dy[2:], w[2:], p.stride, p.padding, p.dilation)
    missing = 5 - len(x)  # of three spatial dimensions
    size, out_size, *rest = (
        (*[filling] * missing, *numbers)
        for filling, numbers in zip((1, 1, 1, 1, 0, 1), sizes, strict=True)
    )
    depthwise = 1 < p.groups == w[0]
    computed, per_group = (kept, 1) if depthwise else (p.groups, kept // p.groups)
    return _Shape(
        *x[:2], *size, *out_size, w[0], computed, per_group, w[1], depthwise,
        *(number for numbers in rest for number in numbers), x_last, dy_last,
    )  # fmt: skip
