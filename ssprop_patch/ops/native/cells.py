"""Sums over the cells of maps of one or two dimensions, and what spreads them again.

As in the rest of this package, ask for ``is_available`` first, of each tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .cell_shape import CellShape
from .tensors import library_for, threads_for

if TYPE_CHECKING:
    from ...core.coarse import Cells


def sum_cells(t: Tensor, cells: Cells) -> Tensor | None:
    """Return the sum over each cell, (N, C, *number), in the memory format of ``t``.

    Args:
        t: (N, C, *length).
        cells: The division.

    Returns:
        None where that is torch's to compute, or to refuse.
    """
    shape = _described(t, cells)
    if shape is None:
        return None
    n, c = t.shape[:2]
    if t.is_contiguous():
        out = t.new_empty(n, c, *cells.number)
    else:
        out = t.new_empty(n, *cells.number, c).movedim(-1, 1)
    threads = threads_for(t)
    work = t.new_empty(threads * shape.length[1] * shape.c)
    library_for(t).sum_cells(t.data_ptr(), shape, out.data_ptr(), work.data_ptr(), threads)
    return out


def add_cells(to: Tensor, values: Tensor, cells: Cells) -> bool:
    """Add each cell's value to all of its positions; return False where that is torch's to do.

    Args:
        to: (N, C, *length).
        values: (N, C, *number).
        cells: The division.
    """
    shape = _described(to, cells)
    fits = values.shape == (*to.shape[:2], *cells.number) and values.dtype is to.dtype
    if shape is None or not fits or values.device != to.device:
        return False
    values = values.contiguous() if to.is_contiguous() else values.movedim(1, -1).contiguous()
    threads = threads_for(to)
    work = to.new_empty(threads * shape.length[1] * shape.c)
    library_for(to).add_cells(values.data_ptr(), shape, to.data_ptr(), work.data_ptr(), threads)
    return True


def _described(t: Tensor, cells: Cells) -> CellShape | None:
    dims = len(cells.length)
    if dims not in (1, 2) or tuple(t.shape[2:]) != cells.length or not t.numel():
        return None
    side_by_side = not t.is_contiguous()
    fill = (1,) * (2 - dims)
    return CellShape(
        maps=t.shape[0] * (1 if side_by_side else t.shape[1]),
        c=t.shape[1] if side_by_side else 1,
        length=(*fill, *cells.length),
        start=(*(0,) * (2 - dims), *cells.start),
        size=(*fill, *cells.size),
        number=(*fill, *cells.number),
    )
