"""C functions for the passes of a sparse backward that are bound by memory, on CPUs.

Each does in one reading what takes torch's operations several, or two while what was read is still
in the cache. They take contiguous and channels_last tensors of float32 and float64, sum in float64,
give the same bits in every run with the same number of threads, and use torch's threads. They are
compiled at their first use on a machine (some seconds), if there is a C compiler; ask
:func:`is_available` of their tensors first. None of them is differentiable, and none is for a
traced tensor (torch.compile). Shapes that do not fit and indices that are none of a channel are
errors.
"""

from __future__ import annotations

from .batch_norm import norm_input_grad, norm_sums, norm_sums_and_cells
from .build import are_compiling, find_compiler, why_unavailable
from .channel_ops import (
    channel_sums,
    put_rows,
    put_sums,
    take_channels,
    topk_channels,
    topk_indices,
)
from .rows import rows_backward
from .tensors import is_available

__all__ = [
    "are_compiling",
    "channel_sums",
    "is_available",
    "may_be_available",
    "norm_input_grad",
    "norm_sums",
    "norm_sums_and_cells",
    "put_rows",
    "put_sums",
    "rows_backward",
    "take_channels",
    "topk_channels",
    "topk_indices",
    "why_unavailable",
]


def may_be_available() -> bool:
    """Tell whether there is a C compiler; nothing is compiled yet.

    Where there is none, :func:`why_unavailable` says why, and also if the compiler fails.
    """
    return find_compiler() is not None
