"""What a sparse backward has to return: a choice by sorting, gradients by torch in float64."""

import math
from dataclasses import dataclass

import torch

TOLERANCES = {torch.float32: 3e-5, torch.float64: 1e-11}
# Sums that differ by no more than rounding may be ordered either way: such cases are left out.
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-12}


# --- the choice -------------------------------------------------------------------------------


def ranked(scores):
    """Return the places of a list of scores, the largest first: nan, then numbers.

    Of equal ones, as of -0.0 and 0.0, the first comes first.
    """
    numbers = [-math.inf if math.isnan(s) else -s for s in scores]
    return sorted(range(len(scores)), key=lambda i: (not math.isnan(scores[i]), numbers[i], i))


def choose(scores, groups, k, close=0.0):
    """Return the kept channels, ascending; None if two that decide are so close to each other."""
    channels = len(scores)
    size = channels if groups in (1, channels) else channels // groups
    index = []
    for first in range(0, channels, size):
        of_set = scores[first : first + size]
        order = ranked(of_set)
        if close and k < size:
            least, most = (of_set[order[place]] for place in (k - 1, k))
            if math.isfinite(least) and least > 0 and least - most <= close * least:
                return None
        index += sorted(first + place for place in order[:k])
    return torch.tensor(index)


def sums(dy, order):
    """Return the sum of ``|dy| ** order`` of each channel, and how close two are by rounding."""
    scores = dy.double().abs().pow(order).sum([0, *range(2, dy.dim())]).tolist()
    numbers = dy[dy.isfinite()] * 8
    exact = torch.equal(numbers, numbers.round()) and dy.numel() < 2**16
    return scores, 0.0 if exact else CLOSE[dy.dtype]


# --- the gradients ----------------------------------------------------------------------------


@dataclass
class Expected:
    """Gradients in float64, the kept channels, and where a gradient may and must not be finite."""

    index: torch.Tensor
    grads: tuple
    may: tuple
    must: tuple
    dtype: torch.dtype


def _dense(dy, x, w, p):
    return torch.ops.aten.convolution_backward(
        dy,
        x,
        w,
        [w.shape[0]],
        p.stride,
        p.padding,
        p.dilation,
        False,
        (0,) * len(p.stride),
        p.groups,
        [True] * 3,
    )


def expect(dy, x, w, p, k, order):
    """Return what the backward has to return; None if rounding decides which channels are kept.

    Args:
        dy, x, w, p, k: Of the backward.
        order: Of the sums that choose, or the scores.
    """
    scores, close = (order.tolist(), 0.0) if isinstance(order, torch.Tensor) else sums(dy, order)
    index = choose(scores, p.groups, k, close)
    if index is None:
        return None
    keep = torch.zeros(dy.shape[1], dtype=torch.bool)
    keep[index] = True
    dy, x, w = (t.double().contiguous() for t in (dy, x, w))
    dy = torch.where(keep.view(-1, *[1] * (dy.dim() - 2)), dy, 0)
    # With factors of 1: how often a number that is not finite is part of a sum.
    bad = (~dy.isfinite()).double()
    must = tuple(g > 0.5 for g in _dense(bad, torch.ones_like(x), torch.ones_like(w), p))
    return Expected(index, _dense(dy, x, w, p), _where_it_may_spread(bad, x, w, p), must, x.dtype)


def _where_it_may_spread(bad, x, w, p):
    """Kernels multiply zeros of padding, too, which makes a nan in a row of dW or a group's dX."""
    channels = bad.flatten(2).sum(2) > 0  # (N, C_out)
    groups = channels.view(channels.shape[0], p.groups, -1).any(2)
    dx = groups.repeat_interleave(x.shape[1] // p.groups, 1)
    rows = channels.any(0)
    return (
        dx.view(*dx.shape, *[1] * (x.dim() - 2)).expand(x.shape),
        rows.view(-1, *[1] * (w.dim() - 1)).expand(w.shape),
        rows,
    )


def compare(got, expected, needed, dtype, way):
    """Compare dX, dW and db with what is expected."""
    for i, name in enumerate(("dX", "dW", "db")):
        grad, what = got[i], f"{name}, {way}"
        if not needed[i]:
            assert grad is None, what
            continue
        assert grad.dtype == dtype and grad.shape == expected.grads[i].shape, what
        assert_close(grad, expected.grads[i], what, expected.may[i], expected.must[i])


def assert_close(got, expected, what, may=None, must=None):
    """Compare numbers with float64 ones; those that are not finite where they ``must`` be."""
    tolerance, got = TOLERANCES[got.dtype], got.double()
    finite = got.isfinite()
    if may is None:
        assert torch.equal(finite, expected.isfinite()), f"{what}: other numbers are not finite"
    else:
        assert finite[~may].all(), f"{what}: what is not finite has spread"
        assert not finite[must].any(), f"{what}: what is not finite was lost"
    both = finite & expected.isfinite()
    if both.any():
        most = max(1.0, expected[both].abs().max().item())
        difference = (got - expected)[both].abs().max().item()
        assert difference <= tolerance * most, f"{what}: {difference} off, of {most}"
