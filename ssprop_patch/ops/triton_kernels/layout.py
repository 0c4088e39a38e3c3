"""How a tensor lies in memory, the tiles that the kernels cut it into, and what is checked."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# 8 to 16 elements a thread: enough reads under way, few enough registers for 4 programs or more on
# one multiprocessor (compiled for sm_90: 30 to 64 a thread; for 2 where elements are read one by
# one, as of chosen channels in channels_last and of images of odd size: 60 to 105).
_WARPS = 8
# A read of 16 bytes has 8 elements of half precision.
_LARGEST_DIVISOR = 8
# On the CPU, in Triton's interpreter, programs run one after the other: few, so that what a GPU
# does for large tensors, several tiles a program, is done there for small ones.
_PROGRAMS_ON_CPU = 6
_INT32_SPAN = 2**31

_Maybe = TypeVar("_Maybe", Tensor, Tensor | None)


class Layout(NamedTuple):
    """A tensor as the kernels see it, see :mod:`.kernels`."""

    batches: int
    channels: int
    positions: int
    channels_last: bool


class Tiling(NamedTuple):
    """How the kernels cut a tensor into tiles of ``block_s`` positions by ``block_c`` channels."""

    channels_last: bool
    divisor: int  # a power of 2 that divides the number of elements that lie side by side
    wide: bool  # the offsets within a tile need 64 bits
    block_c: int
    block_s: int
    blocks_c: int  # of the channels
    blocks_s: int  # of the positions of one batch
    tiles: int  # of one block of channels, over all batches

    @property
    def constants(self) -> dict[str, bool | int]:
        """What a kernel is compiled for."""
        return {
            "CHANNELS_LAST": self.channels_last,
            "DIVISOR": self.divisor,
            "WIDE": self.wide,
            "BLOCK_C": self.block_c,
            "BLOCK_S": self.block_s,
            "num_warps": _WARPS,
        }

    def splits(self, device: torch.device, per_multiprocessor: int) -> int:
        """Return among how many programs the tiles of one block of channels are to be shared.

        Args:
            device: Where they run.
            per_multiprocessor: Programs that there should be in all on each of its multiprocessors.
        """
        if device.type == "cpu":
            programs = _PROGRAMS_ON_CPU
        else:
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            programs = processors * per_multiprocessor
        each = _divide_up(self.tiles, min(_divide_up(programs, self.blocks_c), self.tiles))
        # As many as still need this number each: a smaller buffer in the same time.
        return _divide_up(self.tiles, each)


def tiling_of(layout: Layout, channels: int, size: int) -> Tiling:
    """Return the tiling of ``channels`` channels of ``layout`` with ``size`` elements a tile.

    Along the dimension that lies side by side, half a cache line of 128 bytes or more in half
    precision, where there is as much; along the other, what is left of the tile's size.
    """
    if layout.channels_last:
        block_c = _block(channels, 32, 64)
        block_s = size // block_c
    else:
        block_s = _block(layout.positions, 64, 512)
        block_c = min(size // block_s, _power_of_2(channels))
    side_by_side = layout.channels if layout.channels_last else layout.positions
    # From any channel, of as many as are read or written, to any.
    span = max(channels, layout.channels) * (block_s if layout.channels_last else layout.positions)
    blocks_s = _divide_up(layout.positions, block_s)
    return Tiling(
        channels_last=layout.channels_last,
        divisor=math.gcd(side_by_side, _LARGEST_DIVISOR),
        wide=span >= _INT32_SPAN,
        block_c=block_c,
        block_s=block_s,
        blocks_c=_divide_up(channels, block_c),
        blocks_s=blocks_s,
        tiles=blocks_s * layout.batches,
    )


def _block(n: int, smallest: int, largest: int) -> int:
    """Return the power of 2 in a range of which a multiple comes closest above ``n``.

    The idle lanes of a 7x7, 14x14 or 28x28 image in tiles of one fixed width would be a quarter of
    all. Of equals the largest; below ``smallest`` the next power of 2.
    """
    if n <= smallest:
        return _power_of_2(n)
    blocks = [largest >> shift for shift in range((largest // smallest).bit_length())]
    return min(blocks, key=lambda block: _divide_up(n, block) * block)


def _power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least ``n`` >= 1."""
    return 1 << (n - 1).bit_length()


def _divide_up(n: int, by: int) -> int:
    return -(-n // by)


def layout_of(t: Tensor) -> Layout | None:
    """Return how ``t`` lies, None if neither contiguous nor channels_last."""
    channels = t.shape[1]
    if t.is_contiguous():
        positions = math.prod(t.shape[2:])
        if positions == 1:  # (rows, C), and what is the same in memory
            return Layout(1, channels, t.shape[0], True)
        return Layout(t.shape[0], channels, positions, False)
    if t.dim() > 2 and t.movedim(1, -1).is_contiguous():
        return Layout(1, channels, t.numel() // channels, True)
    return None


def checked_layout(t: Tensor, name: str) -> Layout:
    """Return how ``t`` lies.

    Raises:
        ValueError: If the kernels do not take its dtype, number of dimensions or layout.
    """
    if t.dtype not in DTYPES or not 2 <= t.dim() <= 5:
        raise ValueError(
            f"{name} must be a bfloat16, float16, float32 or float64 tensor of 2 to 5 dimensions, "
            f"got {t.dtype} of shape {tuple(t.shape)}; ask is_available first"
        )
    layout = layout_of(t)
    if layout is None:
        raise ValueError(
            f"{name} must be contiguous or channels_last, got shape {tuple(t.shape)} with strides "
            f"{t.stride()}; call {name}.contiguous() first"
        )
    return layout


def lying_like(t: _Maybe, y: Tensor, name: str) -> _Maybe:
    """Return ``t`` as it is, or a copy if it does not lie in memory as ``y`` does.

    Raises:
        ValueError: If its shape is another, or the kernels do not take its dtype.
    """
    if t is None:
        return None
    if t.shape != y.shape or t.dtype not in DTYPES:
        raise ValueError(
            f"{name} must be floating point and have y's shape {tuple(y.shape)}, "
            f"got {t.dtype} of shape {tuple(t.shape)}"
        )
    return t if layout_of(t) == layout_of(y) else torch.empty_like(y, dtype=t.dtype).copy_(t)


def check_vectors(channels: int, **vectors: Tensor | None) -> None:
    """Raise ValueError unless each is None or of shape (channels,)."""
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (channels,):
            raise ValueError(
                f"{name} must have one number per channel, shape ({channels},), "
                f"got {tuple(vector.shape)}"
            )


def empty_of_channels(t: Tensor, kept: int) -> Tensor:
    """Return an uninitialised tensor like ``t``, in its memory format, with ``kept`` channels."""
    if t.is_contiguous():
        return t.new_empty((t.shape[0], kept, *t.shape[2:]))
    return t.new_empty((t.shape[0], *t.shape[2:], kept)).movedim(-1, 1)


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if one of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
