"""The coarse twin of a convolution, with C functions for its passes over whole maps."""

from __future__ import annotations

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
        by_c = not torch.is_grad_enabled() and are_for_c(to, t)
        return to if by_c and add_cells(to, t, self) else super().add_spread(to, t)


class FastTwin(CoarseTwin):
    """As :class:`ssprop_patch.core.coarse.CoarseTwin`."""

    cells = FastCells
