"""C functions for the passes of a sparse backward that are bound by memory, on CPUs.

Each does in one reading what takes torch's operations several, or two while what was read is still
in the cache. They take contiguous and channels_last tensors of float32 and float64, sum in float64,
give the same bits in every run with the same number of threads, and use torch's threads. They are
compiled at their first use (half a second), if there is a C compiler; ask :func:`is_available`
before each. None of them is differentiable, and none is for a traced tensor (torch.compile).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .build import find_compiler, library

__all__ = [
    "channel_sums",
    "is_available",
    "may_be_available",
    "norm_input_grad",
    "norm_sums",
    "put_rows",
    "take_channels",
]

_NUMBERS = {torch.float32: "float", torch.float64: "double"}

# Of fewer elements one thread does it all: waking another takes longer.
_ENOUGH = 2**15

# Small layers spend more time in these lines of Python than in C: nothing here is made twice.


def is_available(t: Tensor) -> bool:
    """Tell whether the functions here can work on ``t``.

    It is an ordinary tensor with memory of its own on a CPU (no subclass, no transform of
    torch.func), of a supported dtype and layout, nothing asks for the derivative of what is done
    with it, and the functions could be compiled.
    """
    return (
        type(t) in (Tensor, torch.nn.Parameter)
        and t.device.type == "cpu"
        and t.dtype in _NUMBERS
        and t.layout is torch.strided
        and not (t.requires_grad and torch.is_grad_enabled())
        and not (t.is_neg() or torch._C._functorch.is_functorch_wrapped_tensor(t))
        and (t.is_contiguous() or _is_last(t))
        and library(_NUMBERS[t.dtype]) is not None
    )


def may_be_available() -> bool:
    """Tell whether there is a C compiler; nothing is compiled yet."""
    return find_compiler() is not None


def channel_sums(t: Tensor, order: int) -> Tensor:
    """Return the sum of ``|t| ** order`` over each channel.

    Args:
        t: (N, C, *spatial), or (rows, C).
        order: 1 or 2.

    Returns:
        (C,), of ``t``'s dtype.
    """
    last, threads = _is_matrix(t), _threads(t)
    c = t.shape[1]
    out = t.new_empty(c)
    work = _zeros(threads * c) if last else None
    _library(t).channel_sums(
        t.data_ptr(), *_sizes(t), last, order, out.data_ptr(), _pointer(work), threads
    )
    return out


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
            behind it if ``relu_out`` is given.
        x: The norm's input, of the same shape.
        weight: (C,), or None.
        mean, invstd: Of the batch, (C,).
        order: 1 or 2.
        relu_out: Output of the ReLU, of the same shape; where it is <= 0, ``dz`` counts as 0.

    Returns:
        Three of shape (C,), of ``x``'s dtype.
    """
    last, threads = _is_matrix(x), _threads(x)
    c = x.shape[1]
    dz, relu, relu_out = _behind_relu(dz, relu_out, x)
    weight, mean, invstd = _vectors(x.dtype, weight, mean, invstd)
    sums = x.new_empty(3, c)
    work, lines = (_zeros(threads * 3 * c), x.new_empty(2 * c)) if last else (None, None)
    _library(x).norm_sums(
        dz.data_ptr(), relu_out.data_ptr(), x.data_ptr(), mean.data_ptr(), invstd.data_ptr(),
        _pointer(weight), *_sizes(x), last, relu, order,
        sums.data_ptr(), _pointer(work), _pointer(lines), threads,
    )  # fmt: skip
    return sums.unbind()


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
        index: (k,), the channels; not checked.

    Returns:
        (N, k, *spatial), of ``x``'s dtype and memory format.
    """
    k = index.shape[0]
    dz, relu, relu_out = _behind_relu(dz, relu_out, x)
    index = index.contiguous()
    weight, mean, invstd, sum_dz, sum_dz_xhat = _vectors(
        x.dtype, weight, mean, invstd, sum_dz, sum_dz_xhat
    )
    threads = _threads(x)
    out, lines = _empty_of_channels(x, k), x.new_empty((3 + threads) * x.shape[1])
    _library(x).norm_input_grad(
        dz.data_ptr(), relu_out.data_ptr(), x.data_ptr(), mean.data_ptr(), invstd.data_ptr(),
        _pointer(weight), sum_dz.data_ptr(), sum_dz_xhat.data_ptr(), index.data_ptr(),
        k, *_sizes(x), _is_matrix(x), relu, out.data_ptr(), lines.data_ptr(), threads,
    )  # fmt: skip
    return out


def take_channels(t: Tensor, index: Tensor) -> Tensor:
    """Return ``t[:, index]`` in ``t``'s own memory format.

    Args:
        t: (N, C, *spatial), or (rows, C).
        index: (k,), the channels; not checked.
    """
    if not _is_matrix(t):
        return t.index_select(1, index)  # copies whole channels: nothing to gain
    n, c, s = _sizes(t)
    k, index = index.shape[0], index.contiguous()
    out = _empty_of_channels(t, k)
    _library(t).take_channels(
        t.data_ptr(), index.data_ptr(), k, n * s, c, out.data_ptr(), _threads(t)
    )
    return out


def put_rows(rows: Tensor, index: Tensor, like: Tensor) -> Tensor | None:
    """Return zeros like ``like``, with ``rows`` in the places ``index`` of dim 0.

    Args:
        rows: (k, *), lying in memory as ``like`` does.
        index: (k,), ascending; not checked.
        like: (C, *).

    Returns:
        A tensor as ``torch.zeros_like`` makes it; None where ``rows`` lie otherwise.
    """
    size = math.prod(like.shape[1:])
    if rows.dtype is not like.dtype or rows.stride() != like.stride() or rows.stride(0) != size:
        return None
    out, index = torch.empty_like(like), index.contiguous()
    _library(like).put_rows(
        rows.data_ptr(), index.data_ptr(), rows.shape[0], like.shape[0], size, out.data_ptr(),
        _threads(like),
    )  # fmt: skip
    return out


# What is_available has let through is contiguous or in channels_last.


def _library(t: Tensor) -> Any:
    return library(_NUMBERS[t.dtype])


def _sizes(t: Tensor) -> tuple[int, int, int]:
    """Return samples, channels and positions."""
    n, c, *spatial = t.shape
    return n, c, math.prod(spatial)


def _is_last(t: Tensor) -> bool:
    return t.dim() > 2 and t.movedim(1, -1).is_contiguous()


def _is_matrix(t: Tensor) -> bool:
    """Whether the channels lie side by side, as in the rows of a linear layer."""
    return not t.is_contiguous() or math.prod(t.shape[2:]) == 1


def _threads(t: Tensor) -> int:
    return torch.get_num_threads() if t.numel() >= _ENOUGH else 1


def _zeros(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64)


def _vectors(dtype: torch.dtype, *vectors: Tensor | None) -> Iterator[Tensor | None]:
    """Return the vectors as C reads them."""
    return (
        v if v is None or (v.dtype is dtype and v.is_contiguous()) else v.to(dtype).contiguous()
        for v in vectors
    )


def _behind_relu(dz: Tensor, relu_out: Tensor | None, x: Tensor) -> tuple[Tensor, bool, Tensor]:
    """Return dz, whether there is a ReLU, and its output (anything where there is none)."""
    dz = _lying_like(dz, x)
    return dz, relu_out is not None, dz if relu_out is None else _lying_like(relu_out, x)


def _lying_like(t: Tensor, x: Tensor) -> Tensor:
    if t.dtype is x.dtype and t.stride() == x.stride():
        return t
    return torch.empty_like(x).copy_(t)


def _empty_of_channels(t: Tensor, k: int) -> Tensor:
    n, _, *spatial = t.shape
    if t.is_contiguous():
        return t.new_empty(n, k, *spatial)
    return t.new_empty(n, *spatial, k).movedim(-1, 1)


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
