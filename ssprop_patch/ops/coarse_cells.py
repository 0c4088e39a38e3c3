"""The cells of the coarse twin, with C functions for their passes over whole maps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.cells import Cells
from .channel_ops import are_for_c
from .lazy_grad.gradients import NormGradient
from .native.cells import add_cells, sum_cells


class FastCells(Cells):
    """As :class:`ssprop_patch.core.cells.Cells`."""

    def sums(self, t: Tensor) -> Tensor:
        """Return the sum over each cell's positions inside the map, (N, C, *number)."""
        done = None
        if isinstance(t, NormGradient):
            done = t.cell_sums(self)
            t = t if done is not None else t.form()
        if done is None and are_for_c(t):
            done = sum_cells(t, self)
        return super().sums(t) if done is None else done

    def add_spread(self, to: Tensor, t: Tensor) -> Tensor:
        """Return ``to + spread(t)``; in place, where nothing of ``to`` is recorded."""
        if not torch.is_grad_enabled() and are_for_c(to, t) and add_cells(to, t, self):
            return to
        return super().add_spread(to, t)
