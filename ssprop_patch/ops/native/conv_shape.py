"""The shape of a convolution as the C functions take it, and which shapes they take."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ...core.geometry import ConvParams

_INT64 = ctypes.c_int64
_DIMS = _INT64 * 3


class ConvShape(ctypes.Structure):
    """The structure of that name in csrc/ssprop.h, which explains it."""

    _fields_ = (
        ("n", _INT64),
        ("c_in", _INT64),
        ("in_size", _DIMS),
        ("out_size", _DIMS),
        ("c_out", _INT64),
        ("groups", _INT64),
        ("depthwise", _INT64),
        ("computed", _INT64),
        ("kept", _INT64),
        ("inputs", _INT64),
        ("kernel", _DIMS),
        ("stride", _DIMS),
        ("padding", _DIMS),
        ("dilation", _DIMS),
        ("x_last", _INT64),
        ("dy_last", _INT64),
    )


@functools.lru_cache(maxsize=4096)  # a small layer takes longer to describe than to compute
def describe(
    dy: torch.Size,
    dy_channels: int | None,
    kept: int,
    x: torch.Size,
    w: torch.Size,
    p: ConvParams,
    x_last: bool,
    dy_last: bool,
) -> ConvShape | None:
    """Return what C is told of a convolution; None if it is none, or none for the functions here.

    Args:
        dy, x, w: Shapes.
        dy_channels: Those that dy must have; None for all.
        kept: Of how many channels dX, dW and db are computed.
        p: Geometry.
        x_last, dy_last: Whether they lie in channels_last.
    """
    if not (_fits(dy, w[0] if dy_channels is None else dy_channels, x, w, p) and is_small(x, w, p)):
        return None
    depthwise = 1 < p.groups == w[0]
    computed, per_group = (kept, 1) if depthwise else (p.groups, kept // p.groups)
    most = (w[0], 1) if depthwise else (p.groups, w[0] // p.groups)
    if computed * per_group != kept or not (1 <= computed <= most[0] and 1 <= per_group <= most[1]):
        return None
    return ConvShape(
        n=x[0],
        c_in=x[1],
        in_size=_three(x[2:], 1),
        out_size=_three(dy[2:], 1),
        c_out=w[0],
        groups=p.groups,
        depthwise=depthwise,
        computed=computed,
        kept=per_group,
        inputs=w[1],
        kernel=_three(w[2:], 1),
        stride=_three(p.stride, 1),
        padding=_three(p.padding, 0),
        dilation=_three(p.dilation, 1),
        x_last=x_last,
        dy_last=dy_last,
    )


def _three(numbers: tuple[int, ...], filling: int) -> tuple[int, ...]:
    """Return the numbers of three spatial dimensions."""
    return (*[filling] * (3 - len(numbers)), *numbers)


def _fits(dy: torch.Size, dy_channels: int, x: torch.Size, w: torch.Size, p: ConvParams) -> bool:
    """Whether the shapes are those of one convolution, and none of its sizes is zero."""
    dims = len(x) - 2
    if p.transposed or dims not in (1, 2, 3) or not len(w) == len(dy) == len(x):
        return False
    if not all(len(numbers) == dims for numbers in p[:3]) or 0 in (*x, *w):
        return False
    if p.groups < 1 or min(*p.stride, *p.dilation) < 1 or min(p.padding) < 0:
        return False
    out = tuple(
        (size + 2 * pad - step * (taps - 1) - 1) // stride + 1
        for size, taps, stride, pad, step in zip(x[2:], w[2:], *p[:3], strict=True)
    )
    return (
        x[1] == w[1] * p.groups
        and w[0] % p.groups == 0
        and tuple(dy) == (x[0], dy_channels, *out)
        and min(out) > 0
    )


# The layout of a channel may take this many times the memory of its input and output, and in any
# case this many numbers. Usual layers take far less.
_MOST_TIMES, _FEW_NUMBERS = 32, 4096


@functools.lru_cache(maxsize=4096)
def is_small(x: torch.Size, w: torch.Size, p: ConvParams) -> bool:
    """Whether the memory that conv.c works in is in proportion to the tensors.

    Its gaps between rows grow with the dilation, and with a stride it has as many parts, each of
    them with such gaps; so a stride or a dilation far beyond the input's size is torch's. What is
    in proportion also has no size beyond the integers of C.

    Args:
        x: Shape of the input.
        w: Shape of the weight.
        p: Geometry.
    """
    if p.transposed or not len(x) - 2 == len(w) - 2 == len(p.stride) > 0:
        return False
    wide, reach, positions = [], [], 1
    for size, taps, stride, pad, step in zip(x[2:], w[2:], *p[:3], strict=True):
        out = (size + 2 * pad - step * (taps - 1) - 1) // stride + 1
        positions *= out
        wide.append(max(-(-(size + pad) // stride), out))
        reach.append((taps - 1) * step // stride)
    margin = 0
    for length, steps in zip(wide, reach, strict=True):  # as layout.h has it
        margin = margin * length + steps
    numbers = math.prod(p.stride) * (2 * margin + math.prod(wide))
    return numbers <= max(_MOST_TIMES * (math.prod(x[2:]) + positions), _FEW_NUMBERS)
