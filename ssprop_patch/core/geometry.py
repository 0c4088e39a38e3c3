"""How a convolution lies on its input, as callers say it and as ``aten.convolution`` takes it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

Size = int | tuple[int, ...] | list[int]


class Geometry(NamedTuple):
    """How a convolution lies on its input, as the caller gave it; linear layers: the default."""

    stride: Size = 1
    padding: str | Size = 0
    dilation: Size = 1
    groups: int = 1
    output_padding: Size = 0


class ConvParams(NamedTuple):
    """The geometry of one convolution, as ``aten.convolution`` takes it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()  # none at all stands for zeros

    def out_channels(self, w: Tensor) -> int:
        """Return C_out of a convolution with the weight ``w``."""
        return w.shape[1] * self.groups if self.transposed else w.shape[0]

    def with_groups(self, groups: int) -> ConvParams:
        """Return it with other groups, as ``_replace``, which Dynamo of torch 2.6 cannot trace."""
        stride, padding, dilation, _, transposed, output_padding = self
        return ConvParams(stride, padding, dilation, groups, transposed, output_padding)


def conv_params(geometry: Geometry, dims: int, transposed: bool) -> ConvParams:
    """Return the geometry of a convolution of ``dims`` spatial dimensions, in full."""
    stride, padding, dilation, groups, output_padding = geometry
    return ConvParams(
        ntuple(stride, dims),
        ntuple(padding, dims),  # type: ignore[arg-type]  # no text: see resolve_padding
        ntuple(dilation, dims),
        groups,
        transposed,
        ntuple(output_padding, dims),
    )


def convolution_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return (N, C, *positions) of what a linear layer takes or returns, (*, C).

    The first dimension counts samples, those between it and the last are positions: of tokens, or
    of a map whose channels come last.
    """
    *lead, channels = shape
    samples, positions = tuple(lead[:1]), tuple(lead[1:])
    if len(positions) > 3:
        samples, positions = tuple(lead[:-3]), tuple(lead[-3:])
    return prod(samples), channels, *positions, *(1,) * (2 - len(positions))


def ntuple(value: Size, n: int) -> tuple[int, ...]:
    """Return ``value`` for each of ``n`` dimensions."""
    if isinstance(value, (tuple, list)):
        return tuple(value) if len(value) == n else tuple(value) * n
    return (operator.index(value),) * n


def resolve_padding(
    padding: str, input: Tensor, weight: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """Return input and padding numbers that do what torch's padding string does."""
    if padding == "valid":
        return input, (0,) * len(stride)
    if padding != "same":
        raise ValueError(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
    if any(s != 1 for s in stride):
        raise ValueError("padding='same' is not supported for strided convolutions")
    total = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    if any(n % 2 for n in total):  # torch pads the odd one at the end
        input = F.pad(input, [n for odd in reversed(total) for n in (0, odd % 2)])
    return input, tuple(n // 2 for n in total)
