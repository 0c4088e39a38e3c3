"""The coarse twin of a convolution, with C functions for its passes over whole maps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.coarse import CoarseTwin, channel_rows
from ..core.operations import DxDw
from .channel_ops import are_for_c
from .coarse_cells import FastCells
from .native.taps import put_taps, sum_taps


class FastTwin(CoarseTwin):
    """As :class:`ssprop_patch.core.coarse.CoarseTwin`."""

    cells = FastCells

    def add_backward(self, pair: DxDw, e: Tensor, x: Tensor, w: Tensor) -> DxDw:
        """Return ``pair``, dX and dW, plus the twin's gradients; in place where it can be.

        Args:
            pair: Each None if not needed.
            e, x, w: As for :meth:`backward`.
        """
        dx, dw = self.backward(e, x, w, *(t is not None for t in pair))
        return self.add(pair, (dx, dw))

    def add(self, pair: DxDw, coarse: DxDw) -> DxDw:
        """Return ``pair``, dX and dW, plus what :meth:`backward` returned of them."""
        dx, dw = pair
        if dx is not None:
            assert coarse[0] is not None
            dx = self.of_x.add_spread(dx, coarse[0])
        if dw is not None and coarse[1] is not None:
            dw = self.add_taps(dw, coarse[1])
        return dx, dw

    def add_others(
        self,
        pair: DxDw,
        pooled: Tensor,
        kept: Tensor,
        x: Tensor,
        w: Tensor,
        x_means: Tensor | None = None,
    ) -> DxDw:
        """Return ``pair``, dX and dW of the kept channels, plus those of all others.

        Args:
            pair: Each None if not needed; the rows of dW that are not kept are zero.
            pooled: Of the whole gradient, see :meth:`pool_output`.
            kept: (k,), the kept channels, ascending.
            x, w: As for :meth:`backward`.
            x_means: The means of ``x`` over tiles, if they are known.
        """
        dx, dw = pair
        # Of a single tap adding all rows takes less time, unless x is then pooled twice.
        single = w[0, 0].numel() == 1 and x_means is None
        ordinary = self._groups == 1 and not (self.transposed or single)
        tensors = [t for t in (w, pooled, dw) if t is not None]
        if torch.is_grad_enabled() or not (ordinary and are_for_c(*tensors)):
            return self.add_backward(pair, pooled.index_fill(1, kept, 0), x, w)
        others = _all_but(kept, w.shape[0])
        rows, shares = channel_rows(pooled.index_select(1, others)), self.seen_taps(w).flatten()
        if dw is not None:  # rows that hold nothing yet: they are written, not read
            x_means = self.pool_input(x) if x_means is None else x_means
            values = rows.t() @ channel_rows(x_means)
            if not put_taps(dw, values, shares, others):
                taps = (values.unsqueeze(2) * shares).view(-1, *dw.shape[1:])
                dw.index_copy_(0, others, taps)
        if dx is not None:
            matrix = sum_taps(w, shares, others)
            if matrix is None:
                matrix = self.sum_of_taps(w.index_select(0, others))
            dx = self.of_x.add_spread(dx, self.as_cells(rows @ matrix, pooled))
        return dx, dw


def _all_but(index: Tensor, number: int) -> Tensor:
    """Return the numbers below ``number`` that are not in ``index``, ascending."""
    return torch.ones(number, dtype=torch.bool).index_fill_(0, index, False).nonzero().squeeze(1)
