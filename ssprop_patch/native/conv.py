"""The backward of convolutions in C, for few kept channels.

The kernels of convolution libraries take channels in blocks of 8 or 16. They compute a group that
keeps two of its eight channels as if it kept all, and copy tensors into blocks and back. These take
positions side by side instead. As in :mod:`ssprop_patch.native` ask for ``is_available`` first, of
input and weight. What the functions here cannot compute is left to torch: they return None then.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .build import library
from .tensors import NUMBERS, as_index, check, is_available, pointer, threads_for

if TYPE_CHECKING:
    from ..kept import ConvParams

__all__ = ["conv_backward", "conv_db", "conv_dw", "conv_dx", "is_small", "is_supported"]


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


def conv_dx(dy: Tensor, x: Tensor, w: Tensor, index: Tensor, p: ConvParams) -> Tensor | None:
    """Return dX of a convolution from the kept channels of dy.

    Args:
        dy: (N, kept, *out): the kept channels only.
        x: (N, C_in, *in); its shape and memory format count.
        w: (C_out, C_in / groups, *kernel).
        index: (kept,), ascending, the same number in each group; any of them where each of several
            groups has one channel (depthwise).
        p: Geometry, not transposed.

    Returns:
        dX; None where it is torch's to compute or to refuse.

    Raises:
        MemoryError: If there is none for the work of a thread.
        IndexError: If the indices are not those.
    """
    dx, function = torch.empty_like(x), library(NUMBERS[x.dtype], "conv").conv_dx
    return dx if _call(function, dy, w.contiguous(), x, w, index, p, dx) else None


def conv_dw(dy: Tensor, x: Tensor, w: Tensor, index: Tensor, p: ConvParams) -> Tensor | None:
    """Return dW, zeros where no channel is kept; otherwise as :func:`conv_dx`."""
    dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    if not _call(library(NUMBERS[x.dtype], "conv").conv_dw, dy, x, x, w, index, p, dw):
        return None
    return dw if w.is_contiguous() else torch.empty_like(w).copy_(dw)


def conv_db(dy: Tensor, x: Tensor, w: Tensor, index: Tensor, p: ConvParams) -> Tensor | None:
    """Return db, zeros where no channel is kept; otherwise as :func:`conv_dx`."""
    dy, shape = _described(dy, x, w, p)
    if shape is None:
        return None
    db, index = w.new_empty(w.shape[0]), as_index(index, dy.shape[1])
    check(library(NUMBERS[x.dtype], "conv").conv_db(
        dy.data_ptr(), index.data_ptr(), shape, db.data_ptr()
    ))  # fmt: skip
    return db


def conv_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    p: ConvParams,
    k: int,
    order: int,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]] | None:
    """Choose the kept channels and return them with dX, dW and db, those that are ``needed``.

    Args:
        dy: (N, C_out, *out), all channels; ``native.is_available``.
        x, w, p: As for :func:`conv_dx`.
        k: Channels to keep of each choice, see :func:`ssprop_patch.selection.selectable_channels`.
        order: They are chosen by their sums of ``|dy| ** order``.
        needed: Which of the three.

    Returns:
        None at all where it is torch's to compute or to refuse.

    Raises:
        MemoryError: If there is none for the work of a thread.
    """
    choices = 1 if p.groups == w.shape[0] else p.groups
    formats = not x.is_contiguous(), not dy.is_contiguous()
    shape = _shape(dy.shape, None, choices * k, x.shape, w.shape, p, *formats)
    if shape is None:
        return None
    index = dy.new_empty(choices * k, dtype=torch.int64)
    dx = torch.empty_like(x) if needed[0] else None
    dw = torch.empty_like(w, memory_format=torch.contiguous_format) if needed[1] else None
    db = w.new_empty(w.shape[0]) if needed[2] else None
    whole_w = w.contiguous()
    done = library(NUMBERS[x.dtype], "conv").conv_backward(
        dy.data_ptr(), x.data_ptr(), whole_w.data_ptr(), shape, order, choices, k,
        index.data_ptr(), pointer(dx), pointer(dw), pointer(db),
        threads_for(x, dy.numel() // dy.shape[1] * choices * k),
    )  # fmt: skip
    if not check(done):
        return None
    if dw is not None and not w.is_contiguous():
        dw = torch.empty_like(w).copy_(dw)
    return index, (dx, dw, db)


def _call(
    function: Callable[..., int],
    dy: Tensor,
    other: Tensor,
    x: Tensor,
    w: Tensor,
    index: Tensor,
    p: ConvParams,
    out: Tensor,
) -> bool:
    """Call a function of conv.c, which reads ``dy`` and ``other``, if it can take them."""
    dy, shape = _described(dy, x, w, p)
    if shape is None:
        return False
    index = as_index(index, dy.shape[1])
    return check(function(
        dy.data_ptr(), other.data_ptr(), index.data_ptr(), shape, out.data_ptr(),
        threads_for(x, dy.numel()),
    ))  # fmt: skip


def _described(dy: Tensor, x: Tensor, w: Tensor, p: ConvParams) -> tuple[Tensor, Any]:
    """Return the kept channels of dy, as C reads them, and the sizes; None if they do not fit."""
    if not is_available(dy):
        dy = dy.contiguous()
        if not is_available(dy):  # it was not for its layout
            return dy, None
    if dy.dtype is not x.dtype:
        return dy, None
    formats = not x.is_contiguous(), not dy.is_contiguous()
    kept = dy.shape[1]
    return dy, _shape(dy.shape, kept, kept, x.shape, w.shape, p, *formats)


_Shape = ctypes.c_int64 * 28  # as layout.h has it


@functools.lru_cache(maxsize=4096)  # a small layer takes longer to describe than to compute
def _shape(
    dy: torch.Size,
    dy_channels: int | None,
    kept: int,
    x: torch.Size,
    w: torch.Size,
    p: ConvParams,
    x_last: bool,
    dy_last: bool,
) -> ctypes.Array[ctypes.c_int64] | None:
    """Return what C believes of a convolution; None if it is none, or none for the functions here.

    Args:
        dy, x, w: Shapes.
        dy_channels: Those that dy must have; None for all.
        kept: Of how many channels dX, dW and db are computed.
        p: Geometry.
        x_last, dy_last: Whether they lie in channels_last.
    """
    if not (_fits(dy, w[0] if dy_channels is None else dy_channels, x, w, p) and is_small(x, w, p)):
        return None
    depthwise = 1 < p.groups == w[0]
    computed, per_group = (kept, 1) if depthwise else (p.groups, kept // p.groups)
    most = (w[0], 1) if depthwise else (p.groups, w[0] // p.groups)
    if computed * per_group != kept or not (1 <= computed <= most[0] and 1 <= per_group <= most[1]):
        return None
    sizes = (x[2:], dy[2:], w[2:], p.stride, p.padding, p.dilation)
    missing = 5 - len(x)  # of three spatial dimensions
    size, out_size, *rest = (
        (*[filling] * missing, *numbers)
        for filling, numbers in zip((1, 1, 1, 1, 0, 1), sizes, strict=True)
    )
    return _Shape(
        *x[:2], *size, *out_size, w[0], p.groups, depthwise, computed, per_group, w[1],
        *(number for numbers in rest for number in numbers), x_last, dy_last,
    )  # fmt: skip


def _fits(
    dy: torch.Size, dy_channels: int, x: torch.Size, w: torch.Size, p: ConvParams
) -> bool:
    """Whether the shapes are those of one convolution, and none of its sizes is zero."""
    dims = len(x) - 2
    if p.transposed or dims not in (1, 2, 3) or not len(w) == len(dy) == len(x):
        return False
    if not all(len(numbers) == dims for numbers in p[:3]) or 0 in (*x, *w):
        return False
    if p.groups < 1 or min(*p.stride, *p.dilation) < 1 or min(p.padding) < 0:
        return False
    out = tuple(
        (size + 2 * pad - step * (taps - 1) - 1) // stride + 1
        for size, taps, stride, pad, step in zip(x[2:], w[2:], *p[:3], strict=True)
    )
    return (
        x[1] == w[1] * p.groups
        and w[0] % p.groups == 0
        and tuple(dy) == (x[0], dy_channels, *out)
        and min(out) > 0
    )


# The layout of a channel may take so many times the memory of its input and output, and of small
# ones so many numbers. Usual layers are far below.
_MOST_TIMES, _FEW_NUMBERS = 32, 4096


@functools.lru_cache(maxsize=4096)
def is_small(x: torch.Size, w: torch.Size, p: ConvParams) -> bool:
    """Whether the memory that conv.c works in is in proportion to the tensors.

    Its gaps between rows grow with the dilation, and with a stride it has as many parts, each of
    them with such gaps; so a stride or a dilation far beyond the input's size is torch's. What is
    in proportion also has no size beyond the integers of C.

    Args:
        x: Shape of the input.
        w: Shape of the weight.
        p: Geometry.
    """
    if p.transposed or not len(x) - 2 == len(w) - 2 == len(p.stride) > 0:
        return False
    wide, reach, positions = [], [], 1
    for size, taps, stride, pad, step in zip(x[2:], w[2:], *p[:3], strict=True):
        out = (size + 2 * pad - step * (taps - 1) - 1) // stride + 1
        positions *= out
        wide.append(max(-(-(size + pad) // stride), out))
        reach.append((taps - 1) * step // stride)
    margin = 0
    for length, steps in zip(wide, reach, strict=True):  # as layout.h has it
        margin = margin * length + steps
    numbers = math.prod(p.stride) * (2 * margin + math.prod(wide))
    return numbers <= max(_MOST_TIMES * (math.prod(x[2:]) + positions), _FEW_NUMBERS)
