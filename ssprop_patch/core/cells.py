"""Maps divided into cells: sums over each, and what spreads them again."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


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

    def sums_over(self, t: Tensor, other: Cells) -> Tensor:
        """Return ``other.sums(spread(t))``, which is not formed.

        Args:
            t: (N, C, *number).
            other: Another division of the same map.
        """
        if self == other:
            return t * prod(self.size) if self.are_whole() else t * self.inside(t)
        for dim in range(len(self.length)):
            common = t.new_tensor(self.common(other, dim))
            t = (t.movedim(2 + dim, -1) @ common).movedim(-1, 2 + dim)
        return t.contiguous()

    def common(self, other: Cells, dim: int) -> list[list[int]]:
        """Return how many positions each cell has in common with each of ``other``, in ``dim``."""
        ends = []
        for cells in (self, other):
            start, size = cells.start[dim], cells.size[dim]
            edges = [start + i * size for i in range(cells.number[dim] + 1)]
            inside = [min(max(edge, 0), cells.length[dim]) for edge in edges]
            ends.append(list(itertools.pairwise(inside)))
        return [[max(0, min(b, d) - max(a, c)) for c, d in ends[1]] for a, b in ends[0]]

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
