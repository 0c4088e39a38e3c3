"""The choice of channels of :mod:`ssprop_patch.core.selection`, in as few passes as possible.

The sums of the known selections are taken by C functions or Triton kernels where there are any, the
top-k in the same call; of a gradient that batch norm has yet to form they follow from sums that its
backward computes anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.selection import ScoreFn, check_scores, l1_scores, l2_scores
from .channel_ops import channel_sum, topk_channels, topk_indices
from .lazy_grad.gradients import NormGradient
from .native.tensors import check_memory


def order_of(score_fn: ScoreFn) -> int | None:
    """Return 1 (l1) or 2 (l2) if the scores are in the order of the sums of such powers."""
    return 1 if score_fn is l1_scores else 2 if score_fn is l2_scores else None


def lazy_order(score_fn: ScoreFn) -> int | None:
    """Return 1 (l1) or 2 (l2) if ``score_fn`` scores a gradient that batch norm has yet to form."""
    local = getattr(score_fn, "local", score_fn)  # of the scores of all ranks: of one rank
    return order_of(local)


def channel_scores(score_fn: ScoreFn, dy: Tensor) -> Tensor:
    """Return ``score_fn(dy)``, without forming a lazy ``dy`` where that is possible.

    Args:
        score_fn: Scores the channels.
        dy: (N, C_out, *spatial).
    """
    order = order_of(score_fn)
    if order is None:
        return score_fn(dy)
    if isinstance(dy, NormGradient) and dy.order == order:
        sums = dy.sum_of_powers()
    else:
        sums = channel_sum(dy, order)
    return sums if order == 1 else sums.sqrt()


def select_channels(dy: Tensor, k: int, groups: int, score_fn: ScoreFn) -> Tensor:
    """Return the indices of the kept output channels, ascending.

    Args:
        dy: Gradient of the output, shape (N, C_out, *spatial).
        k: Channels to keep of each choice, see
            :func:`ssprop_patch.core.selection.selectable_channels`.
        groups: Groups of the convolution.
        score_fn: Gives the scores.

    Returns:
        int64, on ``dy``'s device: shape (k,), or (groups * k,) where the choice is made inside
        each group: group after group, so that the kept channels still form ``groups`` equal ones.

    Raises:
        ValueError: If ``score_fn`` does not return one score per channel, on ``dy``'s device.
        TypeError: If the scores have no order, or are a tensor of another kind.
    """
    choices = 1 if groups == dy.shape[1] else groups
    order = order_of(score_fn)
    if order is not None:
        index = topk_channels(dy, order, k, choices)
        if index is not None:
            return index
    if not torch.compiler.is_compiling():
        if dy.layout is not torch.strided:
            raise RuntimeError(
                f"the sparse backward takes gradients in ordinary tensors, got {dy.layout}"
            )
        check_memory(dy)
    if not torch.is_grad_enabled():
        scores = channel_scores(score_fn, dy)
    else:  # a derivative of this backward is asked for: the choice has none
        with torch.no_grad():
            scores = channel_scores(score_fn, dy.detach())
    return topk_indices(check_scores(scores, dy), k, choices)
