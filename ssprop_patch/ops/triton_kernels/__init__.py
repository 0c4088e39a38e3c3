"""Triton kernels for the passes of a sparse backward that are bound by memory, not by arithmetic.

Each reads its tensors once: the sums by which channels are chosen, the copy of the chosen ones,
and the passes of a batch norm's backward. They take contiguous and channels_last tensors of
bfloat16, float16, float32 and float64, accumulate in float32 (float64 for float64), give the same
bits in every run (partial sums in a buffer, no atomics) and never wait for the device. A first
call for dtypes and sizes of a new kind compiles; after it, calls can be captured in a CUDA graph.
None of them is differentiable, and none is for a traced tensor (torch.compile).

The kernels, and with them triton, are imported by the first call that launches one, not with this
package. Ask :func:`is_available` before each.

**They are experimental, and off unless asked for** (``SSPROP_PATCH_TRITON=1``): their speed has not
been measured. They have been run in Triton's interpreter and compiled for
sm_80, sm_90 and gfx942; no GPU has run them yet. The block sizes follow the rules for kernels bound
by bandwidth: reads of 16 bytes a thread where sizes allow it, tiles as wide as a cache line along
the dimension that lies side by side, several programs on each multiprocessor.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch
from torch import Tensor

from .channel_ops import channel_sums, norm_grad_sums, norm_input_grad, norm_sums, take_channels
from .layout import DTYPES, layout_of

__all__ = [
    "channel_sums",
    "is_available",
    "norm_grad_sums",
    "norm_input_grad",
    "norm_sums",
    "take_channels",
    "why_unavailable",
]


def why_unavailable() -> str | None:
    """Return why no Triton kernel is used, or None where they are; Triton is not imported."""
    if os.environ.get("SSPROP_PATCH_TRITON") != "1":
        return "SSPROP_PATCH_TRITON is not 1"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def is_available(t: Tensor) -> bool:
    """Tell whether the functions here can work on ``t``.

    Triton is installed, ``t`` is on a CUDA or ROCm device that it compiles for, of a supported
    dtype and layout, and nothing asks for the derivative of what is done with it.
    """
    return (
        t.is_cuda
        and t.dtype in DTYPES
        and 2 <= t.dim() <= 5
        and not (t.requires_grad and torch.is_grad_enabled())
        and layout_of(t) is not None
        and _compiles_for(t.get_device(), t.dtype)
    )


@lru_cache
def _compiles_for(device: int, dtype: torch.dtype) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    # bfloat16 has instructions from Ampere on; ROCm's numbers begin with 9 where Triton runs.
    return torch.cuda.get_device_capability(device) >= (
        (8, 0) if dtype == torch.bfloat16 else (7, 0)
    )
