"""The functions of ``torch.nn.functional`` that can have a sparse backward, and their arguments.

Tools replace them, to count or to change what is computed (DeepSpeed's profiler, emulators). Then
the replacement is called where torch would call it, and the function of torch's that *it* calls is
the one whose backward is sparse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch_compat import linear
from .geometry import Geometry, Size
from .selection import selectable_channels

#: dX, dW and db; None for what was not asked for.
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
#: dX and dW, as :data:`Grads`.
DxDw = tuple[Tensor | None, Tensor | None]
#: Which of dX, dW and db are needed, as ``aten.convolution_backward`` takes it.
OutputMask = tuple[bool, bool, bool]


class Operation(NamedTuple):
    """One function.

    Attributes:
        name: In ``torch.nn.functional``.
        original: What torch has there.
        dims: Spatial dimensions; 0 for ``F.linear``.
        transposed: Whether the weight is (C_in, C_out / groups, *kernel).
        arguments: Takes what follows input and weight, returns bias and geometry.
    """

    name: str
    original: Callable[..., Tensor]
    dims: int
    transposed: bool
    arguments: Callable[..., tuple[Tensor | None, Geometry]]

    def selectable(self, weight: Tensor, groups: int) -> int:
        """Return how many channels one choice is made from."""
        channels = weight.shape[1] * groups if self.transposed else weight.shape[0]
        return selectable_channels(channels, groups)

    def function(self) -> Callable[..., Tensor]:
        """Return what is in ``torch.nn.functional`` now: the original, or a tool's replacement."""
        return getattr(F, self.name)

    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        """Call the original."""
        if self.dims == 0:
            return self.original(input, weight, bias)
        own: tuple[Size, ...] = (g.dilation, g.groups)
        if self.transposed:
            own = (g.output_padding, g.groups, g.dilation)
        return self.original(input, weight, bias, g.stride, g.padding, *own)


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


# Not those of torch.nn.functional, in whose place a tool may have put its own before this import.
CONV1D = Operation("conv1d", torch.conv1d, 1, False, _of_conv)
CONV2D = Operation("conv2d", torch.conv2d, 2, False, _of_conv)
CONV3D = Operation("conv3d", torch.conv3d, 3, False, _of_conv)
CONV_TRANSPOSE1D = Operation(
    "conv_transpose1d", torch.conv_transpose1d, 1, True, _of_conv_transpose
)
CONV_TRANSPOSE2D = Operation(
    "conv_transpose2d", torch.conv_transpose2d, 2, True, _of_conv_transpose
)
CONV_TRANSPOSE3D = Operation(
    "conv_transpose3d", torch.conv_transpose3d, 3, True, _of_conv_transpose
)
LINEAR = Operation("linear", linear, 0, False, _of_linear)

CONVOLUTIONS = (CONV1D, CONV2D, CONV3D)
TRANSPOSED_CONVOLUTIONS = (CONV_TRANSPOSE1D, CONV_TRANSPOSE2D, CONV_TRANSPOSE3D)
