"""The backward of a layer of which more goes back than some channels: directions, and the rest.

What is computed is :func:`ssprop_patch.core.reference.whole_backward`. Here nothing of the size of
``dy`` is formed on the way: what a selection leaves is only needed pooled, and pooling is linear.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from ..core.ahead import Scores
from ..core.geometry import ConvParams, convolution_shape
from ..core.operations import DxDw, Grads, OutputMask
from ..core.reference import dense_backward
from ..core.rule import BackwardKind, BackwardRule, Extent, kind_of
from ..core.selection import check_scores
from ..schedule.call_observer import CallObserver
from . import autotune
from .channel_gradients import KeptChannels
from .channel_ops import topk_indices
from .channel_scores import channel_scores
from .coarse_twin import FastTwin
from .native.tensors import check_memory
from .projection import (
    Needs,
    along_input,
    along_output,
    input_bases,
    mix,
    output_basis,
    refresh_input_bases,
)


def whole_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    p: ConvParams,
    k: int,
    rule: BackwardRule,
    output_mask: OutputMask,
    observer: CallObserver | None = None,
) -> Grads:
    """Return (dX, dW, db); None where ``output_mask`` is False. db is that of the whole dy.

    (But that of the kept channels where all that goes back is the paper's choice.)

    Args:
        dy: Gradient of the output, (N, C_out, *out).
        x: Input, (N, C_in, *in).
        w: Weight, (C_out, C_in / groups, *kernel); (C_in, C_out / groups, *kernel) if transposed.
        p: Geometry.
        k: Channels, or directions, of each choice.
        rule: What of the gradient goes back.
        output_mask: Which of dX, dW, db are needed.
        observer: Gets a report of what ran.
    """
    for saved in (x, w):  # which not all of the operations below notice
        check_memory(saved)
    needs = output_mask[:2]
    if not dy.numel():
        grads = dense_backward(dy, x, w, p, output_mask)
        if rule.is_shared and any(needs):
            _take_part(dy, x, w, p, k, rule, grads)
        if observer is not None:
            observer.backward(x, w, dy, k, output_mask, BackwardKind("all"))
        return grads
    kind = kind_of(rule, _extent(dy, x, w, p, rule), k)
    if kind.selected == "all" or not any(needs):
        if observer is not None:
            observer.backward(x, w, dy, k, output_mask, BackwardKind("all"))
        return dense_backward(dy, x, w, p, output_mask)
    if kind.selected == "channels":
        if observer is not None:
            observer.backward(x, w, dy, k, output_mask, kind)
        return _along_channels(dy, x, w, p, k, rule, kind, output_mask, observer)
    along = _along_output if kind.selected == "output" else _along_input
    pair, used, kind = along(dy, x, w, p, k, rule, kind, needs)
    if observer is not None:
        observer.backward(x, w, dy, used, output_mask, kind)
    return *pair, _sum_of_channels(dy) if output_mask[2] else None


def _extent(dy: Tensor, x: Tensor, w: Tensor, p: ConvParams, rule: BackwardRule) -> Extent:
    return Extent.of(x.shape, w.shape, dy.shape, p.groups, p.transposed, rule.block)


def _take_part(
    dy: Tensor, x: Tensor, w: Tensor, p: ConvParams, k: int, rule: BackwardRule, grads: Grads
) -> None:
    """Do with an empty batch what the other processes wait for."""
    one = Extent.of(
        (1, *x.shape[1:]), w.shape, (1, *dy.shape[1:]), p.groups, p.transposed, rule.block
    )
    kind = kind_of(rule, one, k)
    if kind.selected == "channels":
        kept = KeptChannels(dy, x, w, p, k, rule.score_fn)
        _ = kept.index if rule.ahead is None else _look(dy, kept, rule.ahead)
    elif kind.selected == "output":
        output_basis(dy, p.groups, k, rule)
    elif kind.selected == "input":
        dx, dw, _ = grads
        needs = dx is not None, dw is not None
        if input_bases(w, p.groups, k, rule, needs, dy.device) is None:
            refresh_input_bases(dx, dw, w, p.groups, k, rule)


def whole_linear_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    k: int,
    rule: BackwardRule,
    output_mask: OutputMask,
    observer: CallObserver | None = None,
) -> Grads:
    """Return (dX, dW, db) of ``F.linear``: a 1x1 convolution in channels_last.

    Args:
        dy: Gradient of the output, (*, out_features).
        x: Input, (*, in_features).
        w: Weight, (out_features, in_features).
        k, rule, output_mask, observer: As for :func:`whole_backward`.
    """
    dims = len(convolution_shape(x.shape)) - 2
    ones, zeros = (1,) * dims, (0,) * dims
    dx, dw, db = whole_backward(
        _as_map(dy),
        _as_map(x),
        w.view(*w.shape, *ones),
        ConvParams(ones, zeros, ones, 1),
        k,
        rule,
        output_mask,
        observer,
    )
    dx = None if dx is None else dx.movedim(1, -1).reshape(x.shape)
    return dx, None if dw is None else dw.reshape(w.shape), db


def _as_map(t: Tensor) -> Tensor:
    samples, channels, *positions = convolution_shape(t.shape)
    return t.reshape(samples, *positions, channels).movedim(-1, 1)


def _along_channels(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    p: ConvParams,
    k: int,
    rule: BackwardRule,
    kind: BackwardKind,
    output_mask: OutputMask,
    observer: CallObserver | None,
) -> Grads:
    needs = output_mask[:2]
    kept = KeptChannels(dy, x, w, p, k, rule.score_fn)
    if rule.ahead is not None:
        kept.index = _look(dy, kept, rule.ahead)
    algorithms = autotune.choose(kept, *needs)
    dx, dw, db = algorithms.run(kept, (*needs, output_mask[2] and not kind.block))
    if observer is not None:
        observer.selected(kept.index)
        observer.computed(str(algorithms))
    if not kind.block:
        return dx, dw, db
    twin = FastTwin.of(dy, x, w, p, rule.block)
    pooled = twin.pool_output(dy)
    if output_mask[2]:
        db = _sum_of_channels(dy if p.transposed else pooled)  # of a transposed one: means
    return *twin.add_others((dx, dw), pooled, kept.index, x, w), db


def _look(dy: Tensor, kept: KeptChannels, scores: Scores) -> Tensor:
    """Return the kept channels of a layer that remembers how large each of them is."""
    with torch.no_grad():
        sizes = channel_scores(kept.score_fn, dy.detach() if dy.requires_grad else dy)
        scores.observe(check_scores(sizes, dy))
        return topk_indices(sizes, kept.k, 1)


def _sum_of_channels(t: Tensor) -> Tensor:
    return t.sum([0, *range(2, t.dim())])


def _along_output(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    p: ConvParams,
    k: int,
    rule: BackwardRule,
    kind: BackwardKind,
    needs: Needs,
) -> tuple[DxDw, int, BackwardKind]:
    assert rule.subspace is not None
    u, refreshed = output_basis(dy, p.groups, k, rule)
    z = mix(dy, u)
    pair: DxDw = along_output(z, x, w, p, u, needs)
    if kind.block:
        twin = FastTwin.of(dy, x, w, p, rule.block)
        rest = twin.pool_output(dy) - mix(twin.pool_output(z), u.mT)
        pair = twin.add_backward(pair, rest, x, w)
    return pair, u.shape[2], kind._replace(refreshed=refreshed)


def _along_input(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    p: ConvParams,
    k: int,
    rule: BackwardRule,
    kind: BackwardKind,
    needs: Needs,
) -> tuple[DxDw, int, BackwardKind]:
    bases = input_bases(w, p.groups, k, rule, needs, dy.device)
    if bases is None:  # a refresh takes the dense gradient, which is then there to be used
        dx, dw, _ = dense_backward(dy, x, w, p, (*needs, False))
        refresh_input_bases(dx, dw, w, p.groups, k, rule)
        return (dx, dw), k, kind._replace(refreshed=True)
    pair: DxDw = along_input(dy, x, w, p, bases)
    if kind.block:
        twin = FastTwin.of(dy, x, w, p, rule.block)
        dx, dw = twin.backward(twin.pool_output(dy), x, w, *needs)
        if dx is not None and bases.v is not None:
            dx = dx - mix(mix(dx, bases.v), bases.v.mT)
        if dw is not None and bases.t is not None:
            rows = twin.spread_taps(dw, w).reshape(p.groups, w.shape[0] // p.groups, -1)
            t = bases.t.to(w.dtype)
            dw = (rows - rows @ t @ t.mT).reshape(w.shape)
            pair = pair[0], None if pair[1] is None else pair[1] + dw
            dw = None
        pair = twin.add(pair, (dx, dw))
    return pair, ceil(bases.share() * (w.shape[0] // p.groups)), kind
