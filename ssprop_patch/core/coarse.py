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

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._validate import check_count
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


def divide(length: int, block: int) -> tuple[int, int]:
    """Return the size and the number of the blocks of one dimension.

    As many as ``length / block`` is when it is rounded, half down: a map of 5 positions is one
    block, and not one of 4 and a sliver that costs as much.
    """
    if not length:
        return 0, 0
    wanted = max(1, -((block - 2 * length) // (2 * block)))
    size = -(-length // wanted)
    return size, -(-length // size)


def count_blocks(length: Sequence[int], block: int) -> tuple[int, ...]:
    """Return how many blocks a map has in each dimension."""
    return tuple(divide(n, block)[1] for n in length)


class Cells(NamedTuple):
    """A division of a map into cells, for each dimension.

    Attributes:
        length: Positions of the map.
        start: Where the first cell begins; may lie outside.
        size: Positions of a cell.
        number: Cells.
    """

    length: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    number: tuple[int, ...]

    @classmethod
    def blocks(cls, length: tuple[int, ...], block: int) -> Self:
        """Return cells of about ``block`` positions in each dimension, see :func:`divide`."""
        size, number = zip(*(divide(n, block) for n in length), strict=True)
        return cls(length, (0,) * len(length), size, number)

    def sums(self, t: Tensor) -> Tensor:
        """Return the sum over each cell's positions inside the map, (N, C, *count).

        Args:
            t: (N, C, *length).
        """
        # A last cell that is cut short needs no zeros, as the pooling cuts it short as well.
        if not all(
            start == 0 and size <= length and -size < length - size * count <= 0
            for length, start, size, count in zip(*self, strict=True)
        ):
            pads = [
                n
                for start, reach, length in zip(self.start, self._reach(), self.length, strict=True)
                for n in (start + reach - length, -start)
            ]
            t = F.pad(t, pads[::-1])
        return _pool(t, self.size)

    def spread(self, t: Tensor) -> Tensor:
        """Return each cell's value at all of its positions inside the map, zero elsewhere.

        Args:
            t: (N, C, *count).
        """
        view, shape = t, [*t.shape[:2]]
        for d, (size, count) in enumerate(zip(self.size, self.number, strict=True)):
            view = view.unsqueeze(3 + 2 * d)
            shape += [count, size]
        whole = view.expand(shape).reshape(*shape[:2], *self._reach())
        pads = [
            n
            for start, reach, length in zip(self.start, self._reach(), self.length, strict=True)
            for n in (length - start - reach, start)
        ]
        return F.pad(whole, pads[::-1]) if any(pads) else whole

    def add_spread(self, to: Tensor, t: Tensor) -> Tensor:
        """Return ``to + spread(t)``; in place, where nothing of ``to`` is recorded."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return to + self.spread(t)
        if any(self.start) or self._reach() != self.length:
            return to.add_(self.spread(t))
        cells, values = to, t
        if to.is_contiguous():  # rows of the map whole, as additions of a few numbers are slow
            row = t.unsqueeze(-1).expand(*t.shape, self.size[-1])
            values = row.reshape(*t.shape[:-1], self.length[-1])
        for d, size in enumerate(self.size[: -1 if to.is_contiguous() else None]):
            cells = cells.unflatten(2 + 2 * d, (-1, size))
            values = values.unsqueeze(3 + 2 * d)
        cells.add_(values)
        return to

    def inside(self, like: Tensor) -> Tensor:
        """Return how many positions of each cell lie inside the map, (*count), at least 1."""
        # Dynamo traces through a cache, with a warning.
        count = _count_inside if torch.compiler.is_compiling() else _inside
        counts = torch.tensor(count(self), dtype=like.dtype, device=like.device)
        return counts.view(self.number)

    def are_whole(self) -> bool:
        """Whether all cells lie inside the map."""
        ends = zip(self.length, self.start, self._reach(), strict=True)
        return min(self.start) >= 0 and all(start + reach <= n for n, start, reach in ends)

    def _reach(self) -> tuple[int, ...]:
        return tuple(size * count for size, count in zip(self.size, self.number, strict=True))


def _count_inside(cells: Cells) -> list[int]:
    each = [
        [max(1, min(length, start + (i + 1) * size) - max(0, start + i * size)) for i in range(n)]
        for length, start, size, n in zip(*cells, strict=True)
    ]
    return [prod(counts) for counts in itertools.product(*each)]


_inside = functools.lru_cache(maxsize=256)(_count_inside)


def _pool(t: Tensor, size: tuple[int, ...]) -> Tensor:
    # A traced pooling is one fused loop in any format.
    ordinary = t.dim() == 4 and not torch.compiler.is_compiling()
    if ordinary and t.is_contiguous() and t.shape[2] % size[0] == t.shape[3] % size[1] == 0:
        # Twice as fast on a CPU. The second sum is of so few numbers that a product is faster.
        rows = t.unflatten(2, (-1, size[0])).sum(3)
        return rows.unflatten(3, (-1, size[1])) @ t.new_ones(size[1])
    # The divisor makes means sums, also of the last windows, of which less lies inside.
    if len(size) == 3:
        return F.avg_pool3d(t, size, size, ceil_mode=True, divisor_override=1)
    if len(size) == 2:
        return F.avg_pool2d(t, size, size, ceil_mode=True, divisor_override=1)
    flat = F.avg_pool2d(t.unsqueeze(2), (1, *size), (1, *size), ceil_mode=True, divisor_override=1)
    return flat.squeeze(2)


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

    def _pool_input(self, x: Tensor) -> Tensor:
        return self.of_x.sums(x) if self.transposed else self._means(x)

    def _means(self, t: Tensor) -> Tensor:
        return self._over_inside(self._tiles.sums(t))

    def _over_inside(self, sums: Tensor) -> Tensor:
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
        matrix = self._sum_of_taps(w)
        if self._groups == 1:
            dx, dw = self._of_rows(e, x, matrix, needs_x, needs_w)
        else:
            dx = self._products(e, matrix) if needs_x else None
            if dx is not None and not self.transposed:
                dx = self._over_inside(dx)
            dw = self._sums(e, self._pool_input(x), matrix) if needs_w else None
        return dx, None if dw is None else dw.view(*dw.shape, *(1,) * self._dims)

    def spread_taps(self, dw: Tensor, w: Tensor) -> Tensor:
        """Return the gradient of all taps of ``w``."""
        return dw.expand_as(w) if self._all_seen() else dw * self._seen_taps(dw)

    def add_taps(self, to: Tensor, dw: Tensor) -> Tensor:
        """Return ``to + spread_taps(dw)``; in place, where nothing of ``to`` is recorded."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return to + self.spread_taps(dw, to)
        return to.add_(dw) if self._all_seen() else to.addcmul_(dw, self._seen_taps(dw))

    def _all_seen(self) -> bool:
        return all(share == 1 for shares in self._seen for share in shares)

    def _seen_taps(self, like: Tensor) -> Tensor:
        """Return of each tap the share of outputs for which it reads the input, (1, 1, *kernel)."""
        shares = [prod(each) for each in itertools.product(*self._seen)]
        return like.new_tensor(shares).view(1, 1, *map(len, self._seen))

    def _sum_of_taps(self, w: Tensor) -> Tensor:
        taps = w.flatten(2)
        if taps.shape[2] == 1 and self._all_seen():
            return taps.squeeze(2)
        # Several times as fast as a sum over so few.
        return taps @ self._seen_taps(w).flatten()

    def _of_rows(
        self, e: Tensor, x: Tensor, matrix: Tensor, needs_x: bool, needs_w: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the 1x1 convolution by ``matrix``, of one group."""
        rows, dx, dw = channel_rows(e), None, None
        if needs_w:
            of_x = channel_rows(self._pool_input(x))
            dw = of_x.t() @ rows if self.transposed else rows.t() @ of_x
        if needs_x:
            dx = self._as_cells(rows @ (matrix.t() if self.transposed else matrix), e)
        return dx, dw

    def _as_cells(self, rows: Tensor, e: Tensor) -> Tensor:
        """Return dX of :meth:`backward` from its channels, one row for each block of ``e``."""
        dx = rows.view(e.shape[0], *e.shape[2:], -1).movedim(-1, 1)
        return dx if self.transposed else self._over_inside(dx)

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
