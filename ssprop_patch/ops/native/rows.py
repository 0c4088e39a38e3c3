"""The backward of a convolution with a single position, as in squeeze and excitation."""

from __future__ import annotations

import torch
from torch import Tensor

from .tensors import as_index, check, is_available, library_for, pointer, threads_for


def rows_backward(
    dy: Tensor, x: Tensor, w: Tensor, index: Tensor, output_mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
    """Return dX, dW and db, zeros where no channel is kept; None where not ``output_mask``.

    None at all where the tensors do not fit together, which is for torch to say.

    Args:
        dy: (N, kept, *ones): the kept channels only.
        x: (N, C_in, *ones).
        w: (C_out, C_in, *ones).
        index: (kept,), ascending.
        output_mask: Which of the three.
    """
    need_x, need_w, need_b = output_mask
    (n, c_in), k = x.shape[:2], dy.shape[1]
    alike = dy.dtype is x.dtype is w.dtype and x.dim() == w.dim() == dy.dim()
    shaped = x.numel() == n * c_in and dy.numel() == n * k and w.numel() == w.shape[0] * c_in
    if not (alike and shaped and dy.shape[0] == n and w.shape[1] == c_in):
        return None
    dx = torch.empty_like(x) if need_x else None
    dw = torch.empty_like(w) if need_w else None
    db = w.new_empty(w.shape[0]) if need_b else None
    # Held until the function returns.
    dy, x, w, index = dy.contiguous(), x.contiguous(), w.contiguous(), as_index(index, k)
    if not is_available(dy):
        return None
    check(
        library_for(x).rows_backward(
            dy.data_ptr(),
            x.data_ptr(),
            w.data_ptr(),
            index.data_ptr(),
            n,
            c_in,
            w.shape[0],
            k,
            pointer(dx),
            pointer(dw),
            pointer(db),
            threads_for(w if n * c_in < w.numel() else x),
        )
    )
    return dx, dw, db
