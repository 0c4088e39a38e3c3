"""The functions of ``torch.nn.functional`` that can have a sparse backward, and their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .selection import selectable_channels

Size = int | Sequence[int]


class Geometry(NamedTuple):
    """How a convolution lies on its input, as the caller gave it; linear layers: the default."""

    stride: Size = 1
    padding: str | Size = 0
    dilation: Size = 1
    groups: int = 1
    output_padding: Size = 0


class Operation(NamedTuple):
    """One function.

    Attributes:
        dense: The function itself.
        dims: Spatial dimensions; 0 for ``F.linear``.
        transposed: Whether the weight is (C_in, C_out / groups, *kernel).
        arguments: Takes what follows input and weight, returns bias and geometry.
    """

    dense: Callable[..., Tensor]
    dims: int
    transposed: bool
    arguments: Callable[..., tuple[Tensor | None, Geometry]]

    def selectable(self, weight: Tensor, groups: int) -> int:
        """Return how many channels one choice is made from."""
        channels = weight.shape[1] * groups if self.transposed else weight.shape[0]
        return selectable_channels(channels, groups)

    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        """Call the function."""
        if self.dims == 0:
            return self.dense(input, weight, bias)
        own = (g.dilation, g.groups)
        if self.transposed:
            own = (g.output_padding, g.groups, g.dilation)
        return self.dense(input, weight, bias, g.stride, g.padding, *own)


# With the names, the order and the defaults of torch's functions.


def _of_conv(
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> tuple[Tensor | None, Geometry]:
    return bias, Geometry(stride, padding, dilation, groups)


def _of_conv_transpose(
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> tuple[Tensor | None, Geometry]:
    return bias, Geometry(stride, padding, dilation, groups, output_padding)


def _of_linear(bias: Tensor | None = None) -> tuple[Tensor | None, Geometry]:
    return bias, Geometry()


CONV1D = Operation(F.conv1d, 1, False, _of_conv)
CONV2D = Operation(F.conv2d, 2, False, _of_conv)
CONV3D = Operation(F.conv3d, 3, False, _of_conv)
CONV_TRANSPOSE1D = Operation(F.conv_transpose1d, 1, True, _of_conv_transpose)
CONV_TRANSPOSE2D = Operation(F.conv_transpose2d, 2, True, _of_conv_transpose)
CONV_TRANSPOSE3D = Operation(F.conv_transpose3d, 3, True, _of_conv_transpose)
LINEAR = Operation(F.linear, 0, False, _of_linear)

CONVOLUTIONS = (CONV1D, CONV2D, CONV3D)
TRANSPOSED_CONVOLUTIONS = (CONV_TRANSPOSE1D, CONV_TRANSPOSE2D, CONV_TRANSPOSE3D)

