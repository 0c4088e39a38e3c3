"""How the C functions see tensors: which they take, their memory, sizes and threads.

C trusts what it is given, so all that comes from outside is looked at here, in :mod:`.conv` (shapes
of a convolution against each other) or, indices, in C before anything is written.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..._torch_compat import is_functorch_wrapped_tensor
from .build import library

NUMBERS = {torch.float32: "float", torch.float64: "double"}

# Of fewer elements one thread does it all: waking another takes longer.
_ENOUGH = 2**15
# More threads than any machine has: memory is taken for each of them.
_MOST_THREADS = 1024

# Small layers spend more time in these lines of Python than in C: nothing here is made twice.
_ORDINARY = (Tensor, torch.nn.Parameter)


# What is_available has let through is contiguous or in channels_last.


def is_available(t: Tensor) -> bool:
    """Tell whether the functions of :mod:`ssprop_patch.ops.native` can work on ``t``.

    It is an ordinary tensor with memory of its own on a CPU (no subclass, no transform of
    torch.func), of a supported dtype and layout, nothing asks for the derivative of what is done
    with it, and the functions could be compiled.

    Raises:
        RuntimeError: If its memory was taken away, see :func:`check_memory`.
    """
    if (
        type(t) not in _ORDINARY
        or not t.is_cpu
        or t.layout is not torch.strided
        or is_functorch_wrapped_tensor(t)
    ):
        return False
    if not (t.is_contiguous() or is_last(t)):
        check_memory(t)
        return False
    # Not check_memory, which also takes strides that are not dense.
    if t.untyped_storage().nbytes() < t.nbytes + t.storage_offset() * t.itemsize and t.numel():
        raise RuntimeError(_TOO_SHORT.format(shape=tuple(t.shape)))
    return (
        t.dtype in NUMBERS
        and not (t.requires_grad and torch.is_grad_enabled())
        and not t.is_neg()
        and library(NUMBERS[t.dtype]) is not None
    )


def check_memory(t: Tensor) -> None:
    """Raise an error if the storage of an ordinary tensor on a CPU ends before the tensor does.

    Storages can be resized while a tensor, as autograd saves it, goes on to show its former shape.
    Some of torch's own operations notice, others read what is not theirs.

    Raises:
        RuntimeError: If it does.
    """
    if (
        torch.compiler.is_compiling()
        or type(t) not in _ORDINARY
        or not t.is_cpu
        or t.layout is not torch.strided
        or is_functorch_wrapped_tensor(t)
    ):
        return
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    end = (t.storage_offset() + last + 1) * t.itemsize
    if t.numel() and t.untyped_storage().nbytes() < end:
        raise RuntimeError(_TOO_SHORT.format(shape=tuple(t.shape)))


_TOO_SHORT = (
    "a tensor of shape {shape} that a backward needs has no memory any more: its storage was "
    "resized after the forward; its data is not allocated"
)


def check(done: int) -> bool:
    """Return False if a function of C found a number that is not finite where it could not go on.

    Args:
        done: What the function returned.

    Raises:
        MemoryError: If there is no memory for the work of a thread.
        IndexError: If the indices were not what they have to be; nothing was written then.
    """
    if done == 1:
        return True
    if done == 0:
        raise MemoryError("no memory for a sparse backward")
    if done == 2:
        raise IndexError("indices of kept channels are out of range or not ascending")
    return False


def as_index(index: Tensor, count: int) -> Tensor:
    """Return the indices of ``count`` channels as C reads them; their range is checked there.

    Raises:
        ValueError: If they are not (count,), int64, on a CPU.
    """
    ordinary = type(index) is Tensor and index.is_cpu and index.layout is torch.strided
    if not ordinary or index.dtype is not torch.int64 or index.shape != (count,):
        raise ValueError(
            f"indices of channels must be an int64 tensor of shape ({count},) on the CPU, got "
            f"{index.dtype} of shape {tuple(index.shape)} on {index.device}"
        )
    return index if index.is_contiguous() else index.contiguous()


def library_for(t: Tensor) -> Any:
    """Return the functions over memory for the dtype of ``t``."""
    return library(NUMBERS[t.dtype])


def sizes(t: Tensor) -> tuple[int, int, int]:
    """Return samples, channels and positions."""
    n, c, *spatial = t.shape
    return n, c, math.prod(spatial)


def is_last(t: Tensor) -> bool:
    """Whether ``t``, (N, C, *spatial), lies in channels_last."""
    return t.dim() > 2 and t.movedim(1, -1).is_contiguous()


def is_matrix(t: Tensor) -> bool:
    """Whether the channels lie side by side, as in the rows of a linear layer."""
    return not t.is_contiguous() or math.prod(t.shape[2:]) == 1


def threads_for(t: Tensor, other: int = 0) -> int:
    """Return how many threads work on ``t``, or on ``other`` elements if these are more."""
    if max(t.numel(), other) < _ENOUGH:
        return 1
    return min(torch.get_num_threads(), _MOST_THREADS)


def doubles(t: Tensor, size: int) -> Tensor:
    """Return what sums of ``t`` are made in."""
    return t.new_empty(size, dtype=torch.float64)


def empty_of_channels(t: Tensor, k: int) -> Tensor:
    """Return memory for ``k`` channels of ``t``, in its format."""
    n, _, *spatial = t.shape
    if t.is_contiguous():
        return t.new_empty(n, k, *spatial)
    return t.new_empty(n, *spatial, k).movedim(-1, 1)


def pointer(t: Tensor | None) -> int | None:
    """Return where ``t`` lies."""
    return None if t is None else t.data_ptr()
