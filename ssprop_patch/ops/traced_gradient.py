"""The backward along directions in plain torch operations, for torch.compile to see and fuse.

What is computed is :func:`ssprop_patch.core.reference.whole_backward` with directions of dy. The
directions come from an opaque operator, as they are state that is refreshed now and then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.coarse import CoarseTwin
from ..core.geometry import ConvParams
from ..core.operations import Grads, OutputMask
from ..core.principal import Subspace
from ..core.reference import dense_backward
from ..core.rule import BackwardKind, BackwardRule, Extent, kind_of
from .projection import lift_weight, project_weight


def kind_with_directions(
    dy: Tensor, x: Tensor, w: Tensor, geometry: tuple[Any, ...], k: int, block: int
) -> BackwardKind | None:
    """Return what goes back of a call that has ``k`` directions of dy; None if it has none.

    Args:
        dy, x, w: As for :func:`along_directions`.
        geometry: The fields of :class:`ConvParams`.
        k: Directions.
        block: As of :class:`BackwardRule`.
    """
    p = ConvParams(*geometry)
    if p.transposed or 0 in dy.shape:
        return None
    extent = Extent.of(x.shape, w.shape, dy.shape, p.groups, False, block)
    kind = kind_of(BackwardRule(block=block, subspace=_ANY), extent, k)
    return kind if kind.selected == "output" else None


# Directions of which nothing is asked.
_ANY = Subspace()


def along_directions(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    p: ConvParams,
    u: Tensor,
    kind: BackwardKind,
    output_mask: OutputMask,
) -> Grads:
    """Return (dX, dW, db); None where ``output_mask`` is False. db is that of the whole dy.

    Args:
        dy: Gradient of the output, (N, C_out, *out).
        x: Input, (N, C_in, *in).
        w: Weight, (C_out, C_in / groups, *kernel).
        p: Geometry, not transposed.
        u: Directions of dy, (groups, C_out / groups, k).
        kind: Says in which blocks the rest goes back.
        output_mask: Which of dX, dW, db are needed.
    """
    needs = output_mask[:2]
    z = _combine(dy, u.mT)
    dx, dw, _ = dense_backward(z, x, project_weight(w, u, p), p, (*needs, False))
    dw = None if dw is None else lift_weight(dw, u, p)
    if kind.block:
        twin = CoarseTwin.of(dy, x, w, p, kind.block)
        rest = twin.pool_output(dy) - _combine(twin.pool_output(z), u)
        coarse_dx, coarse_dw = twin.backward(rest, x, w, *needs)
        if dx is not None and coarse_dx is not None:
            dx = twin.of_x.add_spread(dx, coarse_dx)
        if dw is not None and coarse_dw is not None:
            dw = twin.add_taps(dw, coarse_dw)
    db = dy.sum([0, *range(2, dy.dim())]) if output_mask[2] else None
    return dx, dw, db


def _combine(t: Tensor, matrices: Tensor) -> Tensor:
    """Return ``matrices t`` over the channels of each group.

    A 1x1 convolution, which Inductor lays out as those around it.

    Args:
        t: (N, groups * a, *positions).
        matrices: (groups, b, a).
    """
    groups, b, a = matrices.shape
    ones, zeros = (1,) * (t.dim() - 2), (0,) * (t.dim() - 2)
    kernels = matrices.to(t.dtype).reshape(groups * b, a, *ones)
    return torch.convolution(t, kernels, None, ones, zeros, ones, False, zeros, groups)
