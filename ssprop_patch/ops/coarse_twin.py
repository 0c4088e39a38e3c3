"""The coarse twin of a convolution, with C functions for its passes over whole maps."""

from __future__ import annotations

import functools
from math import prod

import torch
from torch import Tensor

from ..core.coarse import Cells, CoarseTwin
from .channel_ops import are_for_c
from .native.cells import add_cells, sum_cells


class FastCells(Cells):
    """As :class:`ssprop_patch.core.coarse.Cells`."""

    def sums(self, t: Tensor) -> Tensor:
        """Return the sum over each cell's positions inside the map, (N, C, *number)."""
        done = sum_cells(t, self) if are_for_c(t) else None
        return super().sums(t) if done is None else done

    def add_spread(self, to: Tensor, t: Tensor) -> Tensor:
        """Return ``to + spread(t)``; in place, where nothing of ``to`` is recorded."""
        if not torch.is_grad_enabled() and are_for_c(to, t):
            if to.is_contiguous() and prod(self.length) <= _SMALL_MAP:
                to.view(-1, prod(self.length)).addmm_(
                    t.reshape(-1, prod(self.number)), _cell_of(self, to.dtype)
                )
                return to
            if add_cells(to, t, self):
                return to
        return super().add_spread(to, t)


# For maps of fewer positions a matrix product is three times as fast as loops over their rows.
_SMALL_MAP = 200


@functools.lru_cache(maxsize=256)
def _cell_of(cells: Cells, dtype: torch.dtype) -> Tensor:
    """Return which positions belong to which cell, a 1 for each: (cells, positions)."""
    each = torch.eye(prod(cells.number), dtype=dtype).view(1, -1, *cells.number)
    return cells.spread(each).flatten(2)[0]


class FastTwin(CoarseTwin):
    """As :class:`ssprop_patch.core.coarse.CoarseTwin`."""

    cells = FastCells
