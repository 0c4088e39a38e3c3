"""C functions for the passes of a sparse backward that are bound by memory, on CPUs.

Each does in one reading what takes torch's operations several, or two while what was read is still
in the cache. They take contiguous and channels_last tensors of float32 and float64, sum in float64,
give the same bits in every run with the same number of threads, and use torch's threads. They are
compiled at their first use (a second or two), if there is a C compiler; ask :func:`is_available`
before each. None of them is differentiable, and none is for a traced tensor (torch.compile).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .build import find_compiler, library
from .channels import (
    channel_sums,
    largest,
    largest_channels,
    put_rows,
    put_sums,
    take_channels,
)
from .norm import norm_input_grad, norm_sums
from .rows import rows_backward
from .tensors import NUMBERS, is_last

__all__ = [
    "channel_sums",
    "is_available",
    "largest",
    "largest_channels",
    "may_be_available",
    "norm_input_grad",
    "norm_sums",
    "put_rows",
    "put_sums",
    "rows_backward",
    "take_channels",
]


def is_available(t: Tensor) -> bool:
    """Tell whether the functions here can work on ``t``.

    It is an ordinary tensor with memory of its own on a CPU (no subclass, no transform of
    torch.func), of a supported dtype and layout, nothing asks for the derivative of what is done
    with it, and the functions could be compiled.
    """
    return (
        type(t) in (Tensor, torch.nn.Parameter)
        and t.is_cpu
        and t.dtype in NUMBERS
        and t.layout is torch.strided
        and not (t.requires_grad and torch.is_grad_enabled())
        and not (t.is_neg() or torch._C._functorch.is_functorch_wrapped_tensor(t))
        and (t.is_contiguous() or is_last(t))
        and library(NUMBERS[t.dtype]) is not None
    )


def may_be_available() -> bool:
    """Tell whether there is a C compiler; nothing is compiled yet."""
    return find_compiler() is not None
