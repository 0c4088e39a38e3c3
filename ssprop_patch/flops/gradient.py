"""FLOPs of one call of a layer, from its sizes and from what of the gradient it computes.

A multiply-add is two FLOPs. All that a rule costs is counted: scores, projections, rotations,
pooling and refreshes. With M positions of the output, n multiply-adds for each of its C channels
and k of them kept, the dense gradient is 4 M n C (dX and dW) and the paper's 4 M n k + 2 M C.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.operations import OutputMask
from ..core.rule import BackwardKind, Extent, ranks


@dataclass(frozen=True)
class ConvFlops:
    """FLOPs of one call of a layer; ``backward`` is with ``kept`` of its channels."""

    forward: int
    dense_backward: int
    backward: int
    kept: int


def layer_flops(
    extent: Extent, kind: BackwardKind, k: int | None, output_mask: OutputMask
) -> ConvFlops:
    """Return the FLOPs of one call.

    Args:
        extent: Its sizes.
        kind: What of the gradient it computes.
        k: Channels, or directions, of each choice; None: all of the gradient.
        output_mask: Which of dX, dW and db are needed.
    """
    macs, outputs = extent.macs, extent.y_positions * extent.channels
    dense = 2 * macs * (output_mask[0] + output_mask[1]) + outputs * output_mask[2]
    kept = extent.channels if k is None else k * extent.choices
    if kept >= extent.channels or kind.selected == "all" or not any(output_mask):
        return ConvFlops(2 * macs, dense, dense, extent.channels)
    if kind.inputs:
        cost = _two_resolutions(extent, kind.inputs, kept, output_mask)
        return ConvFlops(2 * macs, dense, cost, kept)
    if kind.selected == "channels":
        products = 2 * macs * (output_mask[0] + output_mask[1]) // extent.channels * kept
        of_bias = outputs if kind.block else outputs // extent.channels * kept
        cost = products + of_bias * output_mask[2] + 2 * outputs * kind.scored
        rest = extent.channels - kept
    else:
        cost = outputs * output_mask[2]
        of_side = _output_side if kind.selected == "output" else _input_side
        cost += of_side(extent, kind, kept // extent.groups, output_mask)
        rest = extent.channels
    if kind.block:
        inputs = extent.x_positions * extent.inputs * extent.groups
        cost += outputs + inputs * (output_mask[0] + output_mask[1])  # pooled, and spread
        products = 2 * extent.blocks * rest * extent.inputs
        cost += products * (output_mask[0] + output_mask[1])
    return ConvFlops(2 * macs, dense, cost, kept)


def _two_resolutions(e: Extent, inputs: int, kept: int, output_mask: OutputMask) -> int:
    """dX from kept channels to kept ones, dW of the kept ones; the twin's, and sums over cells."""
    need_x, need_w, need_b = output_mask
    cost = e.blocks * e.channels * need_b
    if need_x:  # what is counted twice, what is spread, and sums of that
        between = kept if e.is_depthwise else kept * inputs
        cost += 2 * e.y_positions * e.taps * between + 2 * e.blocks * e.channels * e.inputs
        cost += 2 * e.blocks * between * (not e.is_depthwise)
        cost += e.x_positions * inputs * (1 if e.is_depthwise else 2)
    if need_w:
        cost += 2 * e.y_positions * e.taps * kept * e.inputs
        cost += 2 * e.blocks * (e.channels - kept) * e.inputs
        cost += e.x_positions * e.inputs * e.groups
    return cost


def _output_side(e: Extent, kind: BackwardKind, k: int, output_mask: OutputMask) -> int:
    """U'dy, the products of z, U'W and U dW; a covariance of dy and its leading directions."""
    needed = output_mask[0] + output_mask[1]
    group, weights = e.channels // e.groups, e.channels * e.inputs * e.taps
    cost = 2 * e.y_positions * e.channels * k
    cost += 2 * e.macs * k // group * needed + 2 * weights * k * needed
    if kind.block:
        cost += e.y_positions * e.groups * k + 2 * e.blocks * e.channels * k
    if kind.refreshed:
        cost += 2 * e.y_positions * e.channels * group + 2 * e.channels * group * k
    return cost


def _input_side(e: Extent, kind: BackwardKind, k: int, output_mask: OutputMask) -> int:
    """The products along V and T; a refresh is the dense gradient and two covariances."""
    group, row = e.channels // e.groups, e.inputs * e.taps
    r, s = ranks(k, group, e.inputs, row)
    cost = 0
    if output_mask[0]:
        if kind.refreshed:
            cost += 2 * e.macs + 2 * e.x_positions * e.groups * e.inputs * (e.inputs + r)
        else:
            cost += 2 * e.channels * row * r + 2 * e.y_positions * e.channels * e.taps * r
            cost += 2 * e.x_positions * e.groups * e.inputs * r
            cost += 4 * e.blocks * e.groups * e.inputs * r * bool(kind.block)
    if output_mask[1]:
        if kind.refreshed:
            cost += 2 * e.macs + 2 * e.channels * row * (row + s)
        else:
            cost += 2 * e.y_positions * e.groups * row * s + 2 * e.y_positions * e.channels * s
            cost += 2 * e.channels * row * s + 4 * e.channels * row * s * bool(kind.block)
    return cost


def mean_flops(
    extent: Extent,
    usually: BackwardKind,
    sometimes: BackwardKind,
    k: int,
    output_mask: OutputMask,
    interval: int,
) -> ConvFlops:
    """Return the FLOPs of one call in the mean, of which one in ``interval`` is of another kind."""
    usual = layer_flops(extent, usually, k, output_mask)
    other = layer_flops(extent, sometimes, k, output_mask)
    more = (other.backward - usual.backward) // interval
    return ConvFlops(usual.forward, usual.dense_backward, usual.backward + more, usual.kept)
