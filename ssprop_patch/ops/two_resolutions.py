"""The backward of a convolution whose kept channels were chosen ahead, and those of its input.

What is computed is :func:`ssprop_patch.core.two_resolutions.conv_backward`. Between kept channels
it is a smaller convolution; the rest are matrix products of block sums and block means.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch_compat import FakeTensor, version
from ..core import two_resolutions as plain
from ..core.ahead import KeptSet, Scores, make_team
from ..core.coarse import channel_rows
from ..core.geometry import ConvParams
from ..core.operations import Grads, OutputMask
from ..core.reference import dense_backward
from ..core.reference import whole_backward as plain_whole_backward
from ..core.rule import BackwardKind, BackwardRule, Extent, kind_of
from ..core.selection import l1_scores
from ..core.two_resolutions import TwoResolutions
from ..schedule.call_observer import CallObserver
from . import autotune
from .channel_gradients import AllChannels, KeptChannels
from .channel_ops import are_for_c, take_channels
from .coarse_cells import FastCells
from .coarse_twin import FastTwin
from .lazy_grad.gradients import NormGradient
from .lazy_grad.producers import producers
from .lazy_grad.two_resolutions import Positive, TwoResolutionGradient
from .native.tensors import check_memory, empty_of_channels
from .native.two_resolutions import positive_cells


class Call(NamedTuple):
    """What was decided of a call in its forward.

    Attributes:
        scores: Of its layer.
        kept: Its kept channels; None: it looks at the whole gradient.
        inputs: The channels of its input whose gradient is read; None: all are.
        before: The nodes of the sparse convolutions that ``inputs`` are of.
        shape: Of its output.
    """

    scores: Scores
    kept: KeptSet | None
    inputs: KeptSet | None
    before: tuple[Any, ...]
    shape: tuple[int, ...]


def begin_call(
    x: Tensor, w: Tensor, y: Tensor, p: ConvParams, k: int, rule: BackwardRule, convolution: type
) -> Call | None:
    """Return what the backward of a call goes by; None where it is dense, or not meant to run.

    Args:
        x, w, y: Input, weight and output.
        p: Geometry, of one group or depthwise, and not transposed.
        k: Kept channels.
        rule: Of a layer whose channels are chosen ahead.
        convolution: The class of the nodes of sparse convolutions.
    """
    scores = rule.ahead
    if isinstance(y, FakeTensor) or y.is_meta:
        return None
    # Of one sample: what several processes do together must not depend on the batch of one.
    sizes = (1, *x.shape[1:]), w.shape, (1, *y.shape[1:])
    extent = Extent.of(*sizes, p.groups, p.transposed, rule.block)
    if scores is None or kind_of(rule, extent, k).selected != "channels":
        return None
    kept = scores.begin(k, y.shape[1], y.device)
    # The channels of a depthwise layer are those of its input.
    same = (scores, kept) if p.groups > 1 else None
    return Call(scores, kept, *_inputs(x, convolution, same), tuple(y.shape))


def _inputs(
    x: Tensor, convolution: type, same: tuple[Scores, KeptSet | None] | None
) -> tuple[KeptSet | None, tuple[Any, ...]]:
    """Return what the layers before will read of the gradient of ``x``, and their nodes.

    Those that meet in it, and do not know it yet, are a team from now on, with ``same``, whose
    channels have to be the same ones.
    """
    nodes = producers(x.grad_fn, lambda node: type(node) is convolution) or ()
    found = [getattr(node, "ahead", None) for node in nodes]
    calls = [call for call in found if call is not None and call.shape[:2] == x.shape[:2]]
    if not calls or len(calls) < len(found):
        return None, ()
    members, sets = [call.scores for call in calls], [call.kept for call in calls]
    if same is not None:
        members.append(same[0])
        sets.append(same[1])
    make_team(members)
    first = sets[0]
    if first is None or any(other is not first for other in sets):
        return None, ()
    return first, tuple(nodes)


def ahead_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    p: ConvParams,
    rule: BackwardRule,
    call: Call,
    output_mask: OutputMask,
    observer: CallObserver | None = None,
) -> Grads:
    """Return (dX, dW, db); None where ``output_mask`` is False.

    Args:
        dy: Gradient of the output, (N, C_out, *out).
        x: Input, (N, C_in, *in).
        w: Weight, (C_out, C_in / groups, *kernel).
        p: Geometry.
        rule: Of the layer.
        call: What its forward decided, with kept channels.
        output_mask: Which of dX, dW, db are needed.
        observer: Gets a report of what ran.

    Returns:
        dX of two resolutions where the call knows what is read of it.
    """
    kept, inputs = call.kept, call.inputs
    assert kept is not None
    for saved in (x, w):
        check_memory(saved)
    if observer is not None:
        read = 0 if inputs is None else inputs.k
        kind = BackwardKind("channels", rule.block, inputs=read, scored=False)
        observer.backward(x, w, dy, kept.k, output_mask, kind)
        observer.selected(kept.index)
    if not dy.numel():
        return dense_backward(dy, x, w, p, output_mask)
    if torch.is_grad_enabled():  # a derivative of this is asked for
        return _differentiable(dy, x, w, p, rule.block, kept, inputs, output_mask)
    twin = FastTwin.of(dy, x, w, p, rule.block)
    of_kept, pooled = _parts(dy, kept, twin)
    need_x, need_w, need_b = output_mask
    db = pooled.sum([0, *range(2, pooled.dim())]) if need_b else None
    dx, dw, x_means, positive = None, None, None, None
    if need_w or inputs is None:
        whole = need_x and inputs is None
        channels = _Chosen(dy, of_kept, x, w, p, kept)
        dx, dw, _ = autotune.choose(channels, whole, need_w).run(channels, (whole, need_w, False))
        if need_w:
            x_means, positive = _pool_input(x, twin, rule.block)
        dx, dw = twin.add_others((dx, dw), pooled, kept.index, x, w, x_means)
    if need_x and inputs is not None:
        parts = _dx(of_kept, pooled, x, w, p, kept, inputs, twin, rule.block)
        dx = TwoResolutionGradient(x, parts, rule.block, positive, is_exact=False)
    return dx, dw, db


def _pool_input(x: Tensor, twin: FastTwin, block: int) -> tuple[Tensor, Positive | None]:
    """Return the input's means over tiles, and where it is above zero if a ReLU may ask for that.

    The layer before is asked next, as a rule, and what it needs to know takes no other reading.
    """
    cells = FastCells.blocks(tuple(x.shape[2:]), block)
    if cells == twin.of_x and are_for_c(x):
        done = positive_cells(x, cells)
        if done is not None:
            sums, counts = done
            return twin.over_inside(sums), Positive(x, version(x), counts)
    return twin.pool_input(x), None


def _parts(dy: Tensor, kept: KeptSet, twin: FastTwin) -> tuple[Tensor, Tensor]:
    """Return the kept channels of a gradient, and its sums over blocks."""
    if isinstance(dy, TwoResolutionGradient):
        parts = dy.exact_parts()
        if parts is not None and parts.which is kept and parts.cells == twin.of_y:
            return parts.kept, parts.sums
        dy = dy.form()
    of_kept = dy.take(kept.index) if isinstance(dy, NormGradient) else take_channels(dy, kept.index)
    return of_kept, twin.pool_output(dy)


class _Chosen(KeptChannels):
    """Channels that were chosen before, with their gradient."""

    def __init__(
        self, dy: Tensor, of_kept: Tensor, x: Tensor, w: Tensor, p: ConvParams, kept: KeptSet
    ) -> None:
        super().__init__(dy, x, w, p, kept.k, l1_scores)
        self._dy, self._index = of_kept, kept.index


def _dx(
    of_kept: Tensor,
    pooled: Tensor,
    x: Tensor,
    w: Tensor,
    p: ConvParams,
    kept: KeptSet,
    inputs: KeptSet,
    twin: FastTwin,
    block: int,
) -> TwoResolutions:
    cells = FastCells.blocks(tuple(x.shape[2:]), block)
    smaller, params = w.index_select(0, kept.index), p
    if p.groups > 1:
        params = p.with_groups(kept.k)
    else:
        smaller = smaller.index_select(1, inputs.index)
    # Of the input only shape and format are read.
    channels = AllChannels(of_kept, empty_of_channels(x, inputs.k), smaller, params)
    fine = autotune.choose(channels, True, False).run(channels, (True, False, False))[0]
    assert fine is not None
    if p.groups > 1:  # no channel sends anything to another
        coarse = twin.backward(pooled, x, w, True, False)[0]
        assert coarse is not None
        return TwoResolutions(fine, twin.of_x.sums_over(coarse, cells), inputs, cells)
    rows, matrix = channel_rows(pooled), twin.sum_of_taps(w)
    of_all = rows @ matrix
    # What kept channels send to kept ones is in `fine` already.
    between = matrix.index_select(0, kept.index).index_select(1, inputs.index)
    of_others = of_all.index_select(1, inputs.index).addmm_(
        rows.index_select(1, kept.index), between, alpha=-1
    )
    fine = twin.of_x.add_spread(fine, twin.as_cells(of_others, pooled))
    sums = twin.of_x.sums_over(twin.as_cells(of_all, pooled), cells)
    return TwoResolutions(fine, sums, inputs, cells)


def _differentiable(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    p: ConvParams,
    block: int,
    kept: KeptSet,
    inputs: KeptSet | None,
    output_mask: OutputMask,
) -> Grads:
    if inputs is None:
        return plain_whole_backward(dy, x, w, p, output_mask, kept=kept.index, block=block)
    parts = plain.reduce(dy, kept, block)
    dx, dw, db = plain.conv_backward(parts, x, w, p, inputs, block, output_mask)
    return None if dx is None else dx.whole(), dw, db
