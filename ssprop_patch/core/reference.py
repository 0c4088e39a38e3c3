"""The sparse backward of ssProp (Zhong, Huang, Shi, 2024, arXiv 2408.12561) in plain torch.

In the backward pass of a convolution only the ``k`` output channels with the largest gradient are
propagated. With ``dy`` the gradient of the output, shape (N, C_out, *out):

1. each channel gets a score: the sum (or mean, it is the same order) of ``|dy|``,
2. the ``k`` channels with the largest scores are kept,
3. dX, dW and db are those of a smaller convolution that has only these output channels; rows of dW
   and db that belong to dropped channels are zero.

Everything in :mod:`ssprop_patch.ops` computes this faster, and is tested against it; this is tested
against the dense backward of a ``dy`` whose dropped channels are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .coarse import CoarseTwin
from .geometry import ConvParams
from .operations import Grads, OutputMask
from .selection import ScoreFn, l1_scores, selectable_channels, topk_indices

_convolution_backward = torch.ops.aten.convolution_backward.default


def dense_backward(
    dy: Tensor, x: Tensor, w: Tensor, params: ConvParams, output_mask: OutputMask
) -> Grads:
    """Return (dX, dW, db) of the ordinary convolution; None where ``output_mask`` is False."""
    output_padding = params.output_padding or (0,) * len(params.stride)
    grads = _convolution_backward(
        dy,
        x,
        w,
        [params.out_channels(w)],
        params.stride,
        params.padding,
        params.dilation,
        params.transposed,
        output_padding,
        params.groups,
        output_mask,
    )
    # For an empty batch some versions of torch return what was not asked for.
    dx, dw, db = (g if needed else None for g, needed in zip(grads, output_mask, strict=True))
    return dx, dw, db


def sparse_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    params: ConvParams,
    k: int,
    score_fn: ScoreFn = l1_scores,
    output_mask: OutputMask = (True, True, True),
) -> Grads:
    """Return (dX, dW, db) of the kept channels; None where ``output_mask`` is False.

    A grouped convolution keeps ``k`` channels of each group, so that it stays a grouped one; a
    depthwise one (as many groups as output channels) keeps ``k`` whole groups.

    Args:
        dy: Gradient of the output, (N, C_out, *out).
        x: Input, (N, C_in, *in).
        w: Weight, (C_out, C_in / groups, *kernel); (C_in, C_out / groups, *kernel) if transposed.
        params: Geometry.
        k: Channels to keep of each choice.
        score_fn: Scores the channels of ``dy``; default: the paper's.
        output_mask: Which of dX, dW and db are needed.

    Returns:
        dX, dW and db of the shapes of ``x``, ``w`` and the bias, or None.
    """
    channels, groups = dy.shape[1], params.groups
    if k >= selectable_channels(channels, groups):
        return dense_backward(dy, x, w, params, output_mask)
    depthwise = groups == channels > 1
    kept = topk_indices(score_fn(dy), k, 1 if depthwise else groups)

    # The smaller convolution: its input channels and its weight. Output channels of a transposed
    # convolution lie in dimension 1 of the weight, within their group.
    inputs = torch.arange(x.shape[1], device=x.device)
    if depthwise:
        inputs = inputs.view(groups, -1)[kept].flatten()
    where: tuple[Tensor, ...]
    if params.transposed and depthwise:
        where = (inputs,)
    elif params.transposed:
        group = torch.arange(x.shape[1], device=x.device) // (x.shape[1] // groups)
        where = (inputs.unsqueeze(1), (kept.view(groups, k) % w.shape[1])[group])
    else:
        where = (kept,)
    smaller = params.with_groups(len(kept)) if depthwise else params
    dx, dw, db = dense_backward(dy[:, kept], x[:, inputs], w[where], smaller, output_mask)

    if dx is not None and depthwise:
        dx = torch.zeros_like(x).index_copy(1, inputs, dx)
    if dw is not None:
        dw = torch.zeros_like(w).index_put(where, dw)
    if db is not None:
        db = db.new_zeros(channels).index_copy(0, kept, db)
    return dx, dw, db


def whole_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    params: ConvParams,
    output_mask: OutputMask = (True, True, True),
    *,
    kept: Tensor | None = None,
    u: Tensor | None = None,
    v: Tensor | None = None,
    t: Tensor | None = None,
    block: int = 0,
) -> Grads:
    """Return (dX, dW, db) where more goes back than some channels; db is that of the whole dy.

    Channels are kept, or dy is projected on directions of its own, or dX and dW are on theirs. Then
    what is left of the gradient goes back through the layer's coarse twin, with ``block``.

    Args:
        dy, x, w, params, output_mask: As for :func:`sparse_backward`.
        kept: Indices of the kept channels.
        u: Directions of dy, (groups, C_out / groups, k).
        v: Directions of dX, (groups, C_in / groups, r).
        t: Directions of the weight gradient, (groups, C_in / groups * taps, r).
        block: See :mod:`ssprop_patch.core.coarse`; 0: nothing of the rest goes back.
    """
    needs = (*output_mask[:2], False)
    selected = dy
    if kept is not None:
        selected = torch.zeros_like(dy).index_copy(1, kept, dy[:, kept])
    elif u is not None:
        selected = _project(dy, u)
    dx, dw, _ = dense_backward(selected, x, w, params, needs)
    if v is not None or t is not None:
        dx, dw = _project_input(dx, dw, v, t)
    if block:
        rest = dy - selected if v is None and t is None else dy
        twin = CoarseTwin.of(dy, x, w, params, block)
        dx_rest, dw_rest = twin.backward(twin.pool_output(rest), x, w, *needs[:2])
        dx_rest = None if dx_rest is None else twin.of_x.spread(dx_rest)
        dw_rest = None if dw_rest is None else twin.spread_taps(dw_rest, w)
        if v is not None or t is not None:
            along = _project_input(dx_rest, dw_rest, v, t)
            dx_rest, dw_rest = (
                a if b is None else a - b for a, b in zip((dx_rest, dw_rest), along, strict=True)
            )
        dx = None if dx is None else dx + dx_rest
        dw = None if dw is None else dw + dw_rest
    return dx, dw, dy.sum([0, *range(2, dy.dim())]) if output_mask[2] else None


def _project(a: Tensor, basis: Tensor) -> Tensor:
    """Return ``a``, (N, groups * c, *positions), projected on directions of each group."""
    parts = a.reshape(a.shape[0], *basis.shape[:2], -1)
    return torch.einsum("gck,gdk,ngdp->ngcp", basis, basis, parts).reshape(a.shape)


def _project_input(
    dx: Tensor | None, dw: Tensor | None, v: Tensor | None, t: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return dX projected on ``v`` and dW on ``t``, or None where these are not given."""
    dx = None if dx is None or v is None else _project(dx, v)
    if dw is None or t is None:
        return dx, None
    rows = dw.reshape(t.shape[0], -1, t.shape[1])
    return dx, (rows @ t @ t.mT).reshape(dw.shape)


def linear_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    k: int,
    score_fn: ScoreFn = l1_scores,
    output_mask: OutputMask = (True, True, True),
) -> Grads:
    """Return (dX, dW, db) of ``F.linear``: its channels are the output features.

    Args:
        dy: Gradient of the output, (*, out_features).
        x: Input, (*, in_features).
        w: Weight, (out_features, in_features).
        k, score_fn, output_mask: As for :func:`sparse_backward`.
    """
    need_x, need_w, need_b = output_mask
    rows = dy.flatten(0, -2) if dy.dim() > 1 else dy.unsqueeze(0)
    kept = topk_indices(score_fn(rows), k)
    rows = rows[:, kept]
    dx = (rows @ w[kept]).view(x.shape) if need_x else None
    dw = w.new_zeros(w.shape).index_copy(0, kept, rows.t() @ x.reshape(-1, w.shape[1]))
    db = w.new_zeros(w.shape[0]).index_copy(0, kept, rows.sum(0))
    return dx, dw if need_w else None, db if need_b else None
