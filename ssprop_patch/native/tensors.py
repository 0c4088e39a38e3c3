"""How the C functions see tensors: their memory, sizes and threads."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .build import library

NUMBERS = {torch.float32: "float", torch.float64: "double"}

# Of fewer elements one thread does it all: waking another takes longer.
_ENOUGH = 2**15

# Small layers spend more time in these lines of Python than in C: nothing here is made twice.

# What is_available has let through is contiguous or in channels_last.


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
    return torch.get_num_threads() if max(t.numel(), other) >= _ENOUGH else 1


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
