"""Sums over the cells of maps of one or two dimensions, and what spreads them again.

As in the rest of this package, ask for ``is_available`` first, of each tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .cell_shape import CellShape
from .tensors import library_for, pointer, threads_for

if TYPE_CHECKING:
    from ...core.cells import Cells


def sum_cells(t: Tensor, cells: Cells) -> Tensor | None:
    """Return the sum over each cell, (N, C, *number), in the memory format of ``t``.

    Args:
        t: (N, C, *length).
        cells: The division.

    Returns:
        None where that is torch's to compute, or to refuse.
    """
    if not can_describe(t, cells):
        return None
    shape, out = describe(t, cells), empty_of_cells(t, cells)
    threads = threads_for(t)
    work = t.new_empty(threads * shape.length[1] * shape.c) if shape.c > 1 else None
    library_for(t).sum_cells(t.data_ptr(), shape, out.data_ptr(), pointer(work), threads)
    return out


def add_cells(to: Tensor, values: Tensor, cells: Cells) -> bool:
    """Add each cell's value to all of its positions; return False where that is torch's to do.

    Args:
        to: (N, C, *length).
        values: (N, C, *number).
        cells: The division.
    """
    fits = values.shape == (*to.shape[:2], *cells.number) and values.dtype is to.dtype
    if not (can_describe(to, cells) and fits) or values.device != to.device:
        return False
    shape = describe(to, cells)
    values = values.contiguous() if to.is_contiguous() else values.movedim(1, -1).contiguous()
    library_for(to).add_cells(values.data_ptr(), shape, to.data_ptr(), threads_for(to))
    return True


def can_describe(t: Tensor, cells: Cells) -> bool:
    """Whether C can divide ``t``: the cells are of its maps, of one or two dimensions."""
    return len(cells.length) in (1, 2) and tuple(t.shape[2:]) == cells.length and t.numel() > 0


def describe(t: Tensor, cells: Cells) -> CellShape:
    """Return the division of ``t`` as C reads it.

    Raises:
        ValueError: If :func:`can_describe` does not hold.
    """
    if not can_describe(t, cells):
        raise ValueError(f"cells of maps of {cells.length} for a tensor of {tuple(t.shape)}")
    side_by_side, dims = not t.is_contiguous(), len(cells.length)
    fill = (1,) * (2 - dims)
    return CellShape(
        maps=t.shape[0] * (1 if side_by_side else t.shape[1]),
        c=t.shape[1] if side_by_side else 1,
        length=(*fill, *cells.length),
        start=(*(0,) * (2 - dims), *cells.start),
        size=(*fill, *cells.size),
        number=(*fill, *cells.number),
    )


def empty_of_cells(t: Tensor, cells: Cells) -> Tensor:
    """Return memory for a number of each cell of ``t``, (N, C, *number), in its format."""
    n, c = t.shape[:2]
    if t.is_contiguous():
        return t.new_empty(n, c, *cells.number)
    return t.new_empty(n, *cells.number, c).movedim(-1, 1)
