"""The sparse backward of a layer: dX, dW and db of the kept channels, zero rows elsewhere.

What is computed depends on the arguments alone: see :mod:`ssprop_patch.core.reference`. How it is
computed (:mod:`.algorithms`) is a matter of speed and chosen per call (:mod:`.autotune`).
"""

from __future__ import annotations

import math

from torch import Tensor

from ..core.geometry import ConvParams
from ..core.operations import Grads, OutputMask
from ..core.reference import dense_backward
from ..core.rule import BackwardRule
from ..core.selection import selectable_channels
from ..schedule.call_observer import CallObserver
from . import autotune
from .channel_gradients import KeptChannels
from .channel_ops import put_rows, take_channels
from .channel_scores import select_channels
from .native.tensors import check_memory
from .whole_gradient import whole_backward, whole_linear_backward


def sparse_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    p: ConvParams,
    k: int,
    rule: BackwardRule,
    output_mask: OutputMask,
    observer: CallObserver | None = None,
) -> Grads:
    """Return (dX, dW, db) of the kept channels; None where ``output_mask`` is False.

    Args:
        dy: Gradient of the output, (N, C_out, *out).
        x: Input, (N, C_in, *in).
        w: Weight, (C_out, C_in / groups, *kernel); (C_in, C_out / groups, *kernel) if transposed.
        p: Geometry.
        k: Channels to keep of each choice; the dense gradient when that is all of them.
        rule: What of the gradient goes back.
        output_mask: Which of dX, dW, db are needed.
        observer: Gets a report of what ran.

    Returns:
        dX of ``x``'s shape; dW and db exactly zero for channels not kept. The operations are
        differentiable, so that a double backward differentiates through the kept channels.
    """
    channels = p.out_channels(w)
    # What was changed after the forward is an error, which torch's own kernels raise.
    changed = dy.shape[1] != channels or not w.dim() == x.dim() == dy.dim()
    if changed or k >= selectable_channels(channels, p.groups):
        if observer is not None:
            observer.backward(x, w, dy, k, output_mask)
        return dense_backward(dy, x, w, p, output_mask)
    if not rule.is_top_k:
        return whole_backward(dy, x, w, p, k, rule, output_mask, observer)
    if observer is not None:
        observer.backward(x, w, dy, k, output_mask)
    if p.transposed:  # of others it is seen when C functions are asked for
        check_memory(x)
        check_memory(w)
    kept = KeptChannels(dy, x, w, p, k, rule.score_fn)
    algorithms = autotune.choose(kept, *output_mask[:2])
    grads = algorithms.run(kept, output_mask)
    if observer is not None:
        observer.selected(kept.index)
        observer.computed(str(algorithms))
    return grads


def _scatter_rows(rows: Tensor, size: int, index: Tensor) -> Tensor:
    return rows.new_zeros(size).index_copy_(0, index, rows)


# --- linear layers ----------------------------------------------------------------------------


def linear_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    k: int,
    rule: BackwardRule,
    output_mask: OutputMask,
    observer: CallObserver | None = None,
) -> Grads:
    """Return (dX, dW, db) of ``F.linear`` for the kept output features; None where not needed.

    Args:
        dy: Gradient of the output, (*, out_features).
        x: Input, (*, in_features).
        w: Weight, (out_features, in_features).
        k: Features to keep.
        rule: What of the gradient goes back; scores are of dy as (rows, out_features).
        output_mask: Which of dX, dW, db are needed.
        observer: Gets a report of what ran.
    """
    if not rule.is_top_k and k < w.shape[0]:
        return whole_linear_backward(dy, x, w, k, rule, output_mask, observer)
    if observer is not None:
        observer.backward(x, w, dy, k, output_mask)
    need_x, need_w, need_b = output_mask
    number = math.prod(dy.shape[:-1])  # for -1 there would have to be elements
    rows = dy.reshape(number, w.shape[0])
    if k < w.shape[0]:
        index = select_channels(rows, k, 1, rule.score_fn)
        if observer is not None:
            observer.selected(index)
        rows = take_channels(rows, index)
        w_kept = w.index_select(0, index)
    else:
        index, w_kept = None, w
    dx = (rows @ w_kept).view(x.shape) if need_x else None
    dw = rows.t() @ x.reshape(number, x.shape[-1]) if need_w else None
    db = rows.sum(0) if need_b else None
    if index is not None:
        dw = None if dw is None else put_rows(dw, index, w)
        db = None if db is None else _scatter_rows(db, w.shape[0], index)
    return dx, dw, db
