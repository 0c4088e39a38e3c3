"""The backward of batch norm in training mode, and of a ReLU after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cells import describe, empty_of_cells
from .tensors import (
    as_index,
    check,
    doubles,
    empty_of_channels,
    is_available,
    is_matrix,
    library_for,
    pointer,
    sizes,
    threads_for,
)

if TYPE_CHECKING:
    from ...core.cells import Cells

#: The numbers of ``BLOCK`` in csrc/common.h.
_BLOCK = 2048


def norm_sums(
    dz: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    order: int,
    relu_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return three sums over each channel: of dz, of dz times the normalised x, of ``|dy|**order``.

    The first two are the gradients of a batch norm's bias and weight. dy is the gradient of its
    input, which is not formed.

    Args:
        dz: Gradient of the norm's output, (N, C, *spatial) or (rows, C); of the output of the ReLU
            after it if ``relu_out`` is given.
        x: The norm's input, of the same shape.
        weight: (C,), or None.
        mean, invstd: Of the batch, (C,).
        order: 1 or 2.
        relu_out: Output of the ReLU, of the same shape; where it is <= 0, ``dz`` counts as 0.

    Returns:
        Three of shape (C,), of ``x``'s dtype.
    """
    return _norm_sums(dz, x, weight, mean, invstd, order, relu_out)[0]


def norm_sums_and_cells(
    dz: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    order: int,
    relu_out: Tensor | None,
    cells: Cells,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return :func:`norm_sums`, and the sums of dy over cells, (N, C, *number), in the format of x.

    Args:
        dz, x, weight, mean, invstd, order, relu_out: As for :func:`norm_sums`.
        cells: A division of maps of one or two dimensions, from their first position on.
    """
    sums, of_cells = _norm_sums(dz, x, weight, mean, invstd, order, relu_out, cells)
    assert of_cells is not None
    return sums, of_cells


def _norm_sums(
    dz: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    order: int,
    relu_out: Tensor | None,
    cells: Cells | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    last, threads = is_matrix(x), threads_for(x)
    c, room, of_cells, shape = x.shape[1], 3 * x.shape[1], None, None
    if cells is not None:
        if any(cells.start):
            raise ValueError(f"cells begin at {cells.start}, not at the first position")
        shape, of_cells = describe(x, cells), empty_of_cells(x, cells)
        last = not x.is_contiguous()  # also of single positions, as for the cells
        if last:
            room += threads * c
        else:
            room = threads * max(_BLOCK, shape.size[0] * shape.length[1])
    dz, relu, relu_out = _behind_relu(dz, relu_out, x)
    weight = None if weight is None else vector(weight, x)
    mean, invstd = vector(mean, x), vector(invstd, x)
    sums = x.new_empty(3, c)
    work = doubles(x, threads * 3 * c) if last else None
    lines = x.new_empty(room) if last or cells is not None else None
    library_for(x).norm_sums(
        dz.data_ptr(),
        relu_out.data_ptr(),
        x.data_ptr(),
        mean.data_ptr(),
        invstd.data_ptr(),
        pointer(weight),
        *sizes(x),
        last,
        relu,
        order,
        shape,
        sums.data_ptr(),
        pointer(of_cells),
        pointer(work),
        pointer(lines),
        threads,
    )
    sum_dz, sum_dz_xhat, sum_dy = sums.unbind()
    return (sum_dz, sum_dz_xhat, sum_dy), of_cells


def norm_input_grad(
    dz: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    index: Tensor,
    relu_out: Tensor | None = None,
) -> Tensor:
    """Return the gradient of batch norm's input, in training mode, of the channels ``index``.

    Args:
        dz, x, weight, mean, invstd, relu_out: As for :func:`norm_sums`.
        sum_dz, sum_dz_xhat: What that returned.
        index: (k,), the channels.

    Returns:
        (N, k, *spatial), of ``x``'s dtype and memory format.
    """
    k = index.shape[0]
    dz, relu, relu_out = _behind_relu(dz, relu_out, x)
    index = as_index(index, k)
    weight = None if weight is None else vector(weight, x)
    mean, invstd = vector(mean, x), vector(invstd, x)
    sum_dz, sum_dz_xhat = vector(sum_dz, x), vector(sum_dz_xhat, x)
    threads = threads_for(x)
    out, lines = empty_of_channels(x, k), x.new_empty((3 + threads) * x.shape[1])
    check(
        library_for(x).norm_input_grad(
            dz.data_ptr(),
            relu_out.data_ptr(),
            x.data_ptr(),
            mean.data_ptr(),
            invstd.data_ptr(),
            pointer(weight),
            sum_dz.data_ptr(),
            sum_dz_xhat.data_ptr(),
            index.data_ptr(),
            k,
            *sizes(x),
            is_matrix(x),
            relu,
            out.data_ptr(),
            lines.data_ptr(),
            threads,
        )
    )
    return out


def vector(v: Tensor, x: Tensor) -> Tensor:
    """Return a vector as C reads it, one number for each channel of ``x``."""
    if v.shape != x.shape[1:2]:
        raise RuntimeError(f"{tuple(v.shape)} for the channels of a batch norm of {x.shape[1]}")
    if v.dtype is x.dtype and v.is_contiguous() and is_available(v):
        return v
    return x.new_empty(v.shape).copy_(v)


def _behind_relu(dz: Tensor, relu_out: Tensor | None, x: Tensor) -> tuple[Tensor, bool, Tensor]:
    """Return dz, whether there is a ReLU, and its output (anything where there is none)."""
    dz = _lying_like(dz, x)
    return dz, relu_out is not None, dz if relu_out is None else _lying_like(relu_out, x)


def _lying_like(t: Tensor, x: Tensor) -> Tensor:
    if t.shape != x.shape:
        raise RuntimeError(
            f"a gradient of shape {tuple(t.shape)} for a batch norm of {tuple(x.shape)}"
        )
    if t.dtype is x.dtype and t.stride() == x.stride() and is_available(t):
        return t
    return torch.empty_like(x).copy_(t)
