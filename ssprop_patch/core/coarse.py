"""The coarse remainder: what a selection leaves of ``dy`` goes back at a lower resolution.

A convolution has a *coarse twin*. It takes the mean of the input over tiles, applies the kernel
summed over its taps, and repeats each result over a block of ``block`` output positions in every
dimension. Its gradient costs ``1 / (block ** dims * taps)`` of the convolution's own, as it is that
of a 1x1 convolution of small maps; all taps of dW get the same. Each tap counts with the share of
outputs for which it reads the input and not the padding: where the kernel is about as large as the
map, as in the last stages of a network, the plain sum would be several times too large, and in
every layer again.

A tile is ``block * stride`` input positions long and lies in the middle of what its block's outputs
read. Tiles that reach over an edge are clipped. A transposed convolution's twin is the adjoint of
the ordinary one's: blocks of the input, tiles of the output.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._validate import check_count
from .cells import Cells
from .geometry import ConvParams

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Coarse:
    """``remainder="coarse"`` with another resolution.

    Args:
        block_size: Output positions of a block in each dimension. A map is divided evenly, into
            blocks of about this size: of at most half as much again, and of the whole map where
            that is smaller.

    Raises:
        TypeError, ValueError: If it is not a whole number of at least 2.
    """

    block_size: int = 4

    def __post_init__(self) -> None:
        check_count(self.block_size, "block_size", 2)


class CoarseTwin:
    """The coarse twin of a convolution, for inputs of one size.

    Args:
        x_size: Positions of the input in each dimension.
        y_size: Positions of the output.
        kernel: Taps in each dimension.
        params: Geometry.
        block: About how many output positions a block has in each dimension (input positions, if
            transposed).
    """

    cells = Cells

    def __init__(
        self,
        x_size: tuple[int, ...],
        y_size: tuple[int, ...],
        kernel: tuple[int, ...],
        params: ConvParams,
        block: int,
    ) -> None:
        self.transposed = params.transposed
        fine, large = (x_size, y_size) if params.transposed else (y_size, x_size)
        dims = range(len(kernel))
        blocks = self.cells.blocks(fine, block)
        tile = tuple(blocks.size[d] * params.stride[d] for d in dims)
        # Half of what an output reads and the stride does not cover, rounded up.
        middle = [params.dilation[d] * (kernel[d] - 1) + 2 - params.stride[d] for d in dims]
        start = tuple(middle[d] // 2 - params.padding[d] for d in dims)
        tiles = self.cells(large, start, tile, blocks.number)
        self.of_x, self.of_y = (blocks, tiles) if params.transposed else (tiles, blocks)
        self._tiles, self._dims, self._groups = tiles, len(kernel), params.groups
        self._seen = tuple(
            _seen(n, m, taps, stride, padding, dilation)
            for n, m, taps, stride, padding, dilation in zip(
                fine, large, kernel, params.stride, params.padding, params.dilation, strict=True
            )
        )

    @classmethod
    def of(cls, dy: Tensor, x: Tensor, w: Tensor, params: ConvParams, block: int) -> Self:
        """Return the twin of the convolution of ``x`` by ``w`` whose output's gradient is dy."""
        return cls(tuple(x.shape[2:]), tuple(dy.shape[2:]), tuple(w.shape[2:]), params, block)

    def pool_output(self, dy: Tensor) -> Tensor:
        """Return ``dy`` as :meth:`backward` takes it; linear in it.

        Args:
            dy: (N, C_out, *out), or as many channels as one likes.

        Returns:
            (N, C_out, *blocks): sums over blocks; means over tiles, if transposed.
        """
        return self._means(dy) if self.transposed else self.of_y.sums(dy)

    def pool_input(self, x: Tensor) -> Tensor:
        return self.of_x.sums(x) if self.transposed else self._means(x)

    def _means(self, t: Tensor) -> Tensor:
        return self.over_inside(self._tiles.sums(t))

    def over_inside(self, sums: Tensor) -> Tensor:
        """Return means over tiles from sums over them, (N, C, *blocks)."""
        if self._tiles.are_whole():
            return sums / prod(self._tiles.size)
        return sums / self._tiles.inside(sums)

    def backward(
        self, e: Tensor, x: Tensor, w: Tensor, needs_x: bool, needs_w: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the twin's gradients, each None if not needed.

        Args:
            e: A pooled gradient of the output, see :meth:`pool_output`.
            x: Input, (N, C_in, *in).
            w: Weight of the convolution.

        Returns:
            That of the input, (N, C_in, *blocks), for ``of_x.spread``; and that of the weight, of
            the shape of ``w`` with one tap, for :meth:`spread_taps`.
        """
        matrix = self.sum_of_taps(w)
        if self._groups == 1:
            dx, dw = self._of_rows(e, x, matrix, needs_x, needs_w)
        else:
            dx = self._products(e, matrix) if needs_x else None
            if dx is not None and not self.transposed:
                dx = self.over_inside(dx)
            dw = self._sums(e, self.pool_input(x), matrix) if needs_w else None
        return dx, None if dw is None else dw.view(*dw.shape, *(1,) * self._dims)

    def spread_taps(self, dw: Tensor, w: Tensor) -> Tensor:
        """Return the gradient of all taps of ``w``."""
        return dw.expand_as(w) if self._all_seen() else dw * self.seen_taps(dw)

    def add_taps(self, to: Tensor, dw: Tensor) -> Tensor:
        """Return ``to + spread_taps(dw)``; in place, where nothing of ``to`` is recorded."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return to + self.spread_taps(dw, to)
        return to.add_(dw) if self._all_seen() else to.addcmul_(dw, self.seen_taps(dw))

    def _all_seen(self) -> bool:
        return all(share == 1 for shares in self._seen for share in shares)

    def seen_taps(self, like: Tensor) -> Tensor:
        """Return of each tap the share of outputs for which it reads the input, (1, 1, *kernel)."""
        shares = [prod(each) for each in itertools.product(*self._seen)]
        return like.new_tensor(shares).view(1, 1, *map(len, self._seen))

    def sum_of_taps(self, w: Tensor) -> Tensor:
        taps = w.flatten(2)
        if taps.shape[2] == 1 and self._all_seen():
            return taps.squeeze(2)
        # Several times as fast as a sum over so few.
        return taps @ self.seen_taps(w).flatten()

    def _of_rows(
        self, e: Tensor, x: Tensor, matrix: Tensor, needs_x: bool, needs_w: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the 1x1 convolution by ``matrix``, of one group."""
        rows, dx, dw = channel_rows(e), None, None
        if needs_w:
            of_x = channel_rows(self.pool_input(x))
            dw = of_x.t() @ rows if self.transposed else rows.t() @ of_x
        if needs_x:
            dx = self.as_cells(rows @ (matrix.t() if self.transposed else matrix), e)
        return dx, dw

    def as_cells(self, rows: Tensor, e: Tensor) -> Tensor:
        """Return dX of :meth:`backward` from its channels, one row for each block of ``e``."""
        dx = rows.view(e.shape[0], *e.shape[2:], -1).movedim(-1, 1)
        return dx if self.transposed else self.over_inside(dx)

    def _products(self, e: Tensor, matrix: Tensor) -> Tensor:
        """Return the gradient of the input of the 1x1 convolution by ``matrix``."""
        rows = e.reshape(e.shape[0], self._groups, e.shape[1] // self._groups, -1)
        parts = matrix.reshape(self._groups, -1, matrix.shape[1])
        turned = parts if self.transposed else parts.transpose(1, 2)
        one = turned.shape[2] == 1  # depthwise: nothing to add up
        dx = turned * rows if one else turned @ rows
        return dx.reshape(e.shape[0], -1, *e.shape[2:])

    def _sums(self, e: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
        """Return the gradient of ``matrix``."""
        a, b = (x, e) if self.transposed else (e, x)
        a, b = (t.reshape(t.shape[0], self._groups, t.shape[1] // self._groups, -1) for t in (a, b))
        if a.shape[2] == 1:
            return (a * b).sum((0, 3)).view(matrix.shape)
        return (a @ b.transpose(2, 3)).sum(0).view(matrix.shape)


def _seen(
    fine: int, large: int, kernel: int, stride: int, padding: int, dilation: int
) -> tuple[float, ...]:
    """Return of each tap of a dimension the share of positions for which it lies in the map."""
    shares = []
    for tap in range(kernel):
        start = tap * dilation - padding
        first, last = max(0, -(start // stride)), min(fine - 1, (large - 1 - start) // stride)
        shares.append(max(0, last - first + 1) / fine if fine else 0.0)
    return tuple(shares)


def channel_rows(t: Tensor) -> Tensor:
    """Return (N, C, *positions) as a matrix of positions by channels."""
    return t.movedim(1, -1).reshape(-1, t.shape[1])
