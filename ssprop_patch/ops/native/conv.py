"""The backward of convolutions in C, for few kept channels.

The kernels of convolution libraries take channels in blocks of 8 or 16. They compute a group that
keeps two of its eight channels as if it kept all, and copy tensors into blocks and back. These take
positions side by side instead. As in the rest of this package, ask for ``is_available`` first, of
input and weight. What the functions here cannot compute is left to torch: they return None then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .build import library
from .conv_shape import ConvShape, describe, is_small
from .tensors import NUMBERS, as_index, check, is_available, pointer, threads_for

if TYPE_CHECKING:
    from ...core.geometry import ConvParams

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
    check(
        library(NUMBERS[x.dtype], "conv").conv_db(
            dy.data_ptr(), index.data_ptr(), shape, db.data_ptr()
        )
    )
    return db


def conv_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    p: ConvParams,
    k: int,
    order: int,
    output_mask: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]] | None:
    """Choose the kept channels and return them with dX, dW and db, as ``output_mask`` says.

    Args:
        dy: (N, C_out, *out), all channels; ``native.is_available``.
        x, w, p: As for :func:`conv_dx`.
        k: Channels to keep of each choice, see :func:`.selection.selectable_channels`.
        order: They are chosen by their sums of ``|dy| ** order``.
        output_mask: Which of the three.

    Returns:
        None at all where it is torch's to compute or to refuse.

    Raises:
        MemoryError: If there is none for the work of a thread.
    """
    choices = 1 if p.groups == w.shape[0] else p.groups
    formats = not x.is_contiguous(), not dy.is_contiguous()
    shape = describe(dy.shape, None, choices * k, x.shape, w.shape, p, *formats)
    if shape is None:
        return None
    index = dy.new_empty(choices * k, dtype=torch.int64)
    dx = torch.empty_like(x) if output_mask[0] else None
    dw = torch.empty_like(w, memory_format=torch.contiguous_format) if output_mask[1] else None
    db = w.new_empty(w.shape[0]) if output_mask[2] else None
    whole_w = w.contiguous()
    done = library(NUMBERS[x.dtype], "conv").conv_backward(
        dy.data_ptr(),
        x.data_ptr(),
        whole_w.data_ptr(),
        shape,
        order,
        choices,
        k,
        index.data_ptr(),
        pointer(dx),
        pointer(dw),
        pointer(db),
        threads_for(x, dy.numel() // dy.shape[1] * choices * k),
    )
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
    return check(
        function(
            dy.data_ptr(),
            other.data_ptr(),
            index.data_ptr(),
            shape,
            out.data_ptr(),
            threads_for(x, dy.numel()),
        )
    )


def _described(dy: Tensor, x: Tensor, w: Tensor, p: ConvParams) -> tuple[Tensor, ConvShape | None]:
    """Return the kept channels of dy, as C reads them, and the sizes; None if they do not fit."""
    if not is_available(dy):
        dy = dy.contiguous()
        if not is_available(dy):  # it was not for its layout
            return dy, None
    if dy.dtype is not x.dtype:
        return dy, None
    formats = not x.is_contiguous(), not dy.is_contiguous()
    kept = dy.shape[1]
    return dy, describe(dy.shape, kept, kept, x.shape, w.shape, p, *formats)
