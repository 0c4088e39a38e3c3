"""Sums of a weight's rows over their taps, and rows whose taps are all one number.

As in the rest of this package, ask for ``is_available`` first, of each tensor.
"""

from __future__ import annotations

from torch import Tensor

from .tensors import as_index, check, is_last, library_for, threads_for


def sum_taps(w: Tensor, shares: Tensor, index: Tensor) -> Tensor | None:
    """Return ``(w[index] * shares).sum`` over the taps, (k, C_in / groups).

    Args:
        w: (C_out, C_in / groups, *kernel), contiguous or in channels_last.
        shares: What each tap counts, (taps,).
        index: (k,), the rows.

    Returns:
        None where that is torch's to compute.
    """
    if not _fit(w, shares):
        return None
    out = w.new_empty(index.shape[0], w.shape[1])
    _call("sum_taps", w, w, shares, index, out)
    return out


def put_taps(dw: Tensor, rows: Tensor, shares: Tensor, index: Tensor) -> bool:
    """Write ``rows * shares`` to the rows ``index`` of ``dw``; False where that is torch's to do.

    Args:
        dw: (C_out, C_in / groups, *kernel), contiguous or in channels_last.
        rows: One number for all taps, (k, C_in / groups).
        shares: What each tap counts, (taps,).
        index: (k,), the rows.
    """
    fits = rows.dtype is dw.dtype and rows.shape == (index.shape[0], dw.shape[1])
    if not (fits and rows.device == dw.device and _fit(dw, shares)):
        return False
    _call("put_taps", dw, rows.contiguous(), shares, index, dw)
    return True


def _fit(w: Tensor, shares: Tensor) -> bool:
    taps = w.shape[2:].numel()
    alike = shares.dtype is w.dtype and shares.device == w.device
    # Of a single tap the C functions could do no more than torch's own.
    return alike and shares.shape == (taps,) and taps > 1 and shares.is_contiguous()


def _call(name: str, w: Tensor, first: Tensor, shares: Tensor, index: Tensor, out: Tensor) -> None:
    k, (c_out, c_in) = index.shape[0], w.shape[:2]
    index, taps = as_index(index, k), w.shape[2:].numel()
    check(
        getattr(library_for(w), name)(
            first.data_ptr(),
            index.data_ptr(),
            k,
            c_out,
            c_in,
            taps,
            not w.is_contiguous() and is_last(w),
            shares.data_ptr(),
            out.data_ptr(),
            threads_for(w),
        )
    )
