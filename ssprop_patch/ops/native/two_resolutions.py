"""Gradients of two resolutions through a batch norm and a ReLU, see core/two_resolutions.py.

As in the rest of this package, ask for ``is_available`` first, of each tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .batch_norm import vector
from .cells import can_describe, describe, empty_of_cells
from .tensors import (
    as_index,
    check,
    doubles,
    empty_of_channels,
    is_available,
    library_for,
    pointer,
    threads_for,
)

if TYPE_CHECKING:
    from ...core.cells import Cells
    from ...core.two_resolutions import TwoResolutions


def can_take(g: TwoResolutions, like: Tensor) -> bool:
    """Whether the functions here can take a gradient of the tensor ``like``, (N, C, *positions).

    Args:
        g: The gradient.
        like: ``is_available``.
    """
    k, (n, c) = g.which.k, like.shape[:2]
    return (
        can_describe(like, g.cells)
        and not any(g.cells.start)
        and g.which.channels == c
        and g.kept.shape == (n, k, *like.shape[2:])
        and g.sums.shape == (n, c, *g.cells.number)
        and all(t.dtype is like.dtype and t.is_cpu for t in g[:2])
    )


def two_norm(
    g: TwoResolutions,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    relu_out: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Return the gradient of the input of a batch norm in training mode: kept channels, and sums.

    Args:
        g: The gradient of its output; of the output of the ReLU after it if ``relu_out`` is given.
            :func:`can_take` it.
        x: The norm's input, (N, C, *positions).
        weight: (C,), or None.
        mean, invstd: Of the batch, (C,).
        relu_out: Output of the ReLU.
        counts: How often it is above zero, as :func:`positive_cells` returned of it.

    Returns:
        And the gradients of weight and bias, (C,) each; None where it is torch's to compute.
    """
    last, threads = not x.is_contiguous(), threads_for(x)
    n, c = x.shape[:2]
    if relu_out is not None and not _lies_like(relu_out, x):
        return None
    kept, sums = _in_format(g.kept, last), _in_format(g.sums, last)
    if not (is_available(kept) and is_available(sums)):
        return None
    shape = describe(x, g.cells)
    out, of_kept = empty_of_cells(x, g.cells), empty_of_channels(x, g.which.k)
    both = x.new_empty(2, c)
    cells = sums.numel() // (n * c)
    if last:
        room, work, xs = (3 + threads) * c, doubles(x, threads * 2 * c), x.new_empty(sums.numel())
    else:
        room, work, xs = threads * (2 * x.shape[-1] + (n + 1) * cells), None, None
    line = x.new_empty(room)
    weight = None if weight is None else vector(weight, x)
    mean, invstd = vector(mean, x), vector(invstd, x)
    index, place = as_index(g.which.index, g.which.k), as_index(g.which.place, c)
    check(
        library_for(x).two_norm(
            kept.data_ptr(),
            sums.data_ptr(),
            pointer(counts),
            (x if relu_out is None else relu_out).data_ptr(),
            x.data_ptr(),
            mean.data_ptr(),
            invstd.data_ptr(),
            pointer(weight),
            index.data_ptr(),
            place.data_ptr(),
            g.which.k,
            n,
            c,
            shape,
            last,
            relu_out is not None,
            of_kept.data_ptr(),
            out.data_ptr(),
            both.data_ptr(),
            pointer(work),
            line.data_ptr(),
            pointer(xs),
            threads,
        )
    )
    db, dw = both.unbind()
    return of_kept, out, dw, db


def two_relu(
    g: TwoResolutions, relu_out: Tensor, counts: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Return the gradient of the input of a ReLU: kept channels, and sums.

    Args:
        g: The gradient of its output. :func:`can_take` it.
        relu_out: Its output, (N, C, *positions).
        counts: As for :func:`two_norm`.

    Returns:
        None where it is torch's to compute.
    """
    last, threads = not relu_out.is_contiguous(), threads_for(relu_out)
    n, c = relu_out.shape[:2]
    kept, sums = _in_format(g.kept, last), _in_format(g.sums, last)
    if not (is_available(kept) and is_available(sums)):
        return None
    out, of_kept = empty_of_cells(relu_out, g.cells), empty_of_channels(relu_out, g.which.k)
    room = c if last else relu_out.shape[-1] + g.cells.number[-1]
    line = relu_out.new_empty(threads * room)
    index, place = as_index(g.which.index, g.which.k), as_index(g.which.place, c)
    check(
        library_for(relu_out).two_relu(
            kept.data_ptr(),
            sums.data_ptr(),
            pointer(counts),
            relu_out.data_ptr(),
            index.data_ptr(),
            place.data_ptr(),
            g.which.k,
            n,
            c,
            describe(relu_out, g.cells),
            last,
            of_kept.data_ptr(),
            out.data_ptr(),
            line.data_ptr(),
            threads,
        )
    )
    return of_kept, out


def positive_cells(x: Tensor, cells: Cells) -> tuple[Tensor, Tensor] | None:
    """Return the sum over each cell of ``x``, and how often it is above zero, in the format of x.

    Args:
        x: (N, C, *positions).
        cells: From the first position on.

    Returns:
        (N, C, *number) each; None where that is torch's to compute.
    """
    if not can_describe(x, cells) or any(cells.start):
        return None
    last, threads = not x.is_contiguous(), threads_for(x)
    sums, counts = empty_of_cells(x, cells), empty_of_cells(x, cells)
    line = x.new_zeros(x.shape[1]) if last else x.new_empty(threads * 2 * x.shape[-1])
    library_for(x).positive_cells(
        x.data_ptr(),
        *x.shape[:2],
        describe(x, cells),
        last,
        sums.data_ptr(),
        counts.data_ptr(),
        line.data_ptr(),
        threads,
    )
    return sums, counts


def _in_format(t: Tensor, last: bool) -> Tensor:
    if not last:
        return t.contiguous()
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _lies_like(t: Tensor, x: Tensor) -> bool:
    return (
        t.shape == x.shape and t.dtype is x.dtype and t.stride() == x.stride() and is_available(t)
    )
