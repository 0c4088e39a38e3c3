"""A gradient of two resolutions: some channels as they are, of all others the means over blocks.

Where every layer knows its kept channels ahead (:mod:`.ahead`), the dropped ones need never be
formed: they travel back as block means, through convolutions, norms, activations and additions
alike. Each of these takes a gradient of two resolutions, stands for what autograd would make of
the whole of it, and passes on the block means of that:

* a pointwise function multiplies the means by the block means of its derivative,
* batch norm's sums over a block follow from the means and the block sums of its input,
* a convolution sends the kept channels to the kept channels of its input at full resolution, and
  everything to everything through its coarse twin (:mod:`.coarse`). Of dW the rows of kept channels
  are exact.

This is the plain form, for reading and testing; :mod:`ssprop_patch.ops.two_resolutions` is fast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .ahead import KeptSet
from .cells import Cells
from .coarse import CoarseTwin
from .geometry import ConvParams
from .operations import Grads, OutputMask
from .reference import dense_backward


class TwoResolutions(NamedTuple):
    """A gradient of shape (N, C, *positions).

    Attributes:
        kept: The kept channels, (N, k, *positions).
        sums: Sums over blocks of all channels, (N, C, *blocks).
        which: Which channels are kept.
        cells: The blocks.
    """

    kept: Tensor
    sums: Tensor
    which: KeptSet
    cells: Cells

    def whole(self) -> Tensor:
        """Return the tensor that this stands for."""
        means = self.sums / self.cells.inside(self.sums)
        return self.cells.spread(means).index_copy(1, self.which.index, self.kept)


def reduce(gradient: Tensor, which: KeptSet, block: int) -> TwoResolutions:
    """Return what is left of an ordinary gradient.

    Args:
        gradient: (N, C, *positions).
        which: The channels that are kept.
        block: About how many positions a block has in each dimension.
    """
    cells = Cells.blocks(tuple(gradient.shape[2:]), block)
    return TwoResolutions(gradient[:, which.index], cells.sums(gradient), which, cells)


def pointwise(g: TwoResolutions, derivative: Tensor) -> TwoResolutions:
    """Return the gradient of the input of a pointwise function.

    Args:
        g: The gradient of its output.
        derivative: Of the function at each position, (N, C, *positions).
    """
    kept = g.kept * derivative[:, g.which.index]
    sums = g.sums / g.cells.inside(g.sums) * g.cells.sums(derivative)
    return with_sums_of_kept(TwoResolutions(kept, sums, g.which, g.cells))


def batch_norm(
    g: TwoResolutions, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor
) -> tuple[TwoResolutions, Tensor, Tensor]:
    """Return the gradients of the input, the weight and the bias of a batch norm in training mode.

    Args:
        g: The gradient of its output.
        x: Its input, (N, C, *positions).
        weight: (C,), or None.
        mean, invstd: Of the batch, (C,).
    """
    shape = (-1, *[1] * (x.dim() - 2))
    dims = [0, *range(2, x.dim())]
    n, index = x.numel() // x.shape[1], g.which.index
    xhat = (x - mean.view(shape)) * invstd.view(shape)
    inside = g.cells.inside(x)
    sum_dz = g.sums.sum(dims)
    xhat_sums = g.cells.sums(xhat)
    dz_xhat = (g.sums / inside * xhat_sums).sum(dims)
    dz_xhat = dz_xhat.index_copy(0, index, (g.kept * xhat[:, index]).sum(dims))
    scale = (invstd if weight is None else weight * invstd).view(shape)
    shift, slope = (sum_dz / n).view(shape), (dz_xhat / n).view(shape)
    sums = scale * (g.sums - shift * inside - slope * xhat_sums)
    kept = scale[index] * (g.kept - shift[index] - slope[index] * xhat[:, index])
    return TwoResolutions(kept, sums, g.which, g.cells), dz_xhat, sum_dz


def add(a: TwoResolutions, b: TwoResolutions) -> TwoResolutions:
    """Return the sum of two gradients of the same kept channels."""
    return a._replace(kept=a.kept + b.kept, sums=a.sums + b.sums)


def max_pool(
    g: TwoResolutions, kept: Tensor, length: tuple[int, ...], stride: tuple[int, ...], block: int
) -> TwoResolutions:
    """Return the gradient of the input of a max pooling: means go to all that lies below them.

    Args:
        g: The gradient of its output.
        kept: The kept channels of that of its input, (N, k, *length).
        length: Positions of the input in each dimension.
        stride: Of the pooling.
        block: As of :func:`reduce`.
    """
    size = tuple(n * s for n, s in zip(g.cells.size, stride, strict=True))
    tiles = Cells(length, (0,) * len(length), size, g.cells.number)
    cells = Cells.blocks(length, block)
    sums = tiles.sums_over(g.sums / tiles.inside(g.sums), cells)
    return with_sums_of_kept(TwoResolutions(kept, sums, g.which, cells))


def conv_backward(
    g: TwoResolutions,
    x: Tensor,
    w: Tensor,
    params: ConvParams,
    inputs: KeptSet,
    block: int,
    output_mask: OutputMask = (True, True, True),
) -> tuple[TwoResolutions | None, Tensor | None, Tensor | None]:
    """Return (dX, dW, db) of a convolution; None where ``output_mask`` is False.

    Args:
        g: The gradient of its output, with ``block``.
        x: Its input, (N, C_in, *in).
        w: Its weight, (C_out, C_in / groups, *kernel).
        params: Geometry: not transposed, of one group or depthwise (C_in groups of one channel).
        inputs: The channels of ``x`` whose gradient is kept; of a depthwise one those of ``g``.
        block: As of :func:`reduce`.
        output_mask: Which of dX, dW and db are needed.
    """
    index = g.which.index
    twin = CoarseTwin.of(g.kept, x, w, params, block)
    dx = dw = None
    if output_mask[0]:
        from_kept = _of_kept(g, x, w, params, (True, False, False))[0]
        rest = g.sums.index_fill(1, index, 0)
        from_others = twin.of_x.spread(_not_none(twin.backward(rest, x, w, True, False)[0]))
        coarse = _not_none(twin.backward(g.sums, x, w, True, False)[0])
        kept = _not_none(from_kept)[:, inputs.index] + from_others[:, inputs.index]
        cells = Cells.blocks(tuple(x.shape[2:]), block)
        sums = twin.of_x.sums_over(coarse, cells)
        dx = with_sums_of_kept(TwoResolutions(kept, sums, inputs, cells))
    if output_mask[1]:
        dw = twin.spread_taps(_not_none(twin.backward(g.sums, x, w, False, True)[1]), w)
        exact = _of_kept(g, x, w, params, (False, True, False))[1]
        dw = dw.index_copy(0, index, _not_none(exact))
    db = g.sums.sum([0, *range(2, g.sums.dim())]) if output_mask[2] else None
    return dx, dw, db


def _of_kept(
    g: TwoResolutions, x: Tensor, w: Tensor, params: ConvParams, output_mask: OutputMask
) -> Grads:
    """Return the gradients of the kept channels alone: dX whole, dW of their rows."""
    index = g.which.index
    if params.groups == 1:
        return dense_backward(g.kept, x, w[index], params, output_mask)
    smaller = params.with_groups(g.which.k)
    dx, dw, db = dense_backward(g.kept, x[:, index], w[index], smaller, output_mask)
    return None if dx is None else torch.zeros_like(x).index_copy(1, index, dx), dw, db


def with_sums_of_kept(g: TwoResolutions) -> TwoResolutions:
    """Return the same gradient with the sums of kept channels, whatever stood there."""
    return g._replace(sums=g.sums.index_copy(1, g.which.index, g.cells.sums(g.kept)))


def _not_none(t: Tensor | None) -> Tensor:
    assert t is not None
    return t
