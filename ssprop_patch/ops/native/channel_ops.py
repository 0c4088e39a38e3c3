"""Sums over channels, the choice of the topk_indices, and what takes and puts them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.selection import check_topk
from .tensors import (
    as_index,
    check,
    doubles,
    empty_of_channels,
    is_matrix,
    library_for,
    pointer,
    sizes,
    threads_for,
)


def channel_sums(t: Tensor, order: int) -> Tensor:
    """Return the sum of ``|t| ** order`` over each channel.

    Args:
        t: (N, C, *spatial), or (rows, C).
        order: 1 or 2.

    Returns:
        (C,), of ``t``'s dtype.
    """
    last, threads = is_matrix(t), threads_for(t)
    c = t.shape[1]
    out = t.new_empty(c)
    work = doubles(t, threads * c) if last else None
    library_for(t).channel_sums(
        t.data_ptr(), *sizes(t), last, order, out.data_ptr(), pointer(work), threads
    )
    return out


def topk_indices(scores: Tensor, k: int, groups: int) -> Tensor:
    """Return the indices of the ``k`` largest scores of each group, ascending.

    Args:
        scores: (C,), of ``groups`` groups one after the other. A nan counts as larger than all
            numbers; of equal scores the first are taken.
        k: At most the channels of a group.
        groups: A divisor of C.

    Returns:
        int64, (groups * k,).

    Raises:
        ValueError: If k or groups is not that.
    """
    check_topk(k, scores.shape[0], groups)
    scores, size = scores.contiguous(), scores.shape[0] // groups
    index = scores.new_empty(groups * k, dtype=torch.int64)
    work = scores.new_empty(size)
    library_for(scores).topk_indices(
        scores.data_ptr(), groups, size, k, work.data_ptr(), index.data_ptr()
    )
    return index


def topk_channels(t: Tensor, order: int, k: int, groups: int) -> Tensor:
    """Return :func:`topk_indices` of :func:`channel_sums`."""
    n, c, s = sizes(t)
    check_topk(k, c, groups)
    threads = threads_for(t)
    index = t.new_empty(groups * k, dtype=torch.int64)
    work = doubles(t, (threads + 2) * c)
    library_for(t).topk_channels(
        t.data_ptr(),
        n,
        c,
        s,
        is_matrix(t),
        order,
        groups,
        k,
        work.data_ptr(),
        index.data_ptr(),
        threads,
    )
    return index


def take_channels(t: Tensor, index: Tensor) -> Tensor:
    """Return ``t[:, index]`` in ``t``'s own memory format.

    Args:
        t: (N, C, *spatial), or (rows, C).
        index: (k,), the channels.
    """
    if not is_matrix(t):
        return t.index_select(1, index)  # copies whole channels: nothing to gain
    n, c, s = sizes(t)
    k = index.shape[0]
    index = as_index(index, k)
    out = empty_of_channels(t, k)
    check(
        library_for(t).take_channels(
            t.data_ptr(), index.data_ptr(), k, n * s, c, out.data_ptr(), threads_for(t)
        )
    )
    return out


def put_rows(rows: Tensor, index: Tensor, like: Tensor) -> Tensor | None:
    """Return zeros like ``like``, with ``rows`` in the places ``index`` of dim 0.

    Args:
        rows: (k, *), lying in memory as ``like`` does.
        index: (k,), ascending.
        like: (C, *).

    Returns:
        A tensor as ``torch.zeros_like`` makes it; None where ``rows`` lie or are otherwise.
    """
    size = math.prod(like.shape[1:])
    if rows.dtype is not like.dtype or rows.stride() != like.stride() or rows.stride(0) != size:
        return None
    if rows.shape[1:] != like.shape[1:]:
        return None
    k = rows.shape[0]
    out, index = torch.empty_like(like), as_index(index, k)
    check(
        library_for(like).put_rows(
            rows.data_ptr(),
            index.data_ptr(),
            k,
            like.shape[0],
            size,
            out.data_ptr(),
            threads_for(like),
        )
    )
    return out


def put_sums(parts: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Return zeros like ``like``, with the sum of ``parts`` over dim 0 in the places ``index``.

    Args:
        parts: (N, k, *), contiguous.
        index: (k,), ascending.
        like: (C, *), contiguous, of ``parts``' dtype.
    """
    if parts.dtype is not like.dtype or parts.shape[2:] != like.shape[1:]:
        raise ValueError(f"parts of {tuple(parts.shape)} for a tensor of {tuple(like.shape)}")
    n, k = parts.shape[:2]
    out, index = torch.empty_like(like), as_index(index, k)
    check(
        library_for(like).put_sums(
            parts.data_ptr(),
            n,
            index.data_ptr(),
            k,
            like.shape[0],
            math.prod(like.shape[1:]),
            out.data_ptr(),
            threads_for(parts),
        )
    )
    return out
