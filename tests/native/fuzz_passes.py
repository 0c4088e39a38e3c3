"""Random calls of the passes over memory, by the front of :mod:`ssprop_patch.ops.channel_ops`."""

import math
from dataclasses import dataclass

import fuzz_reference
import torch

from ssprop_patch.core import two_resolutions as plain
from ssprop_patch.core.ahead import KeptSet
from ssprop_patch.core.cells import Cells
from ssprop_patch.ops import channel_ops, native
from ssprop_patch.ops.coarse_cells import FastCells
from ssprop_patch.ops.native import two_resolutions as two

PASSES = (
    "sums",
    "largest",
    "chosen",
    "take",
    "put rows",
    "put sums",
    "rows",
    "norm",
    "norm",
    "cells",
    "two resolutions",
)


@dataclass
class Case:
    """One call, of a tensor (N, C, *spatial) or (rows, C)."""

    name: str
    shape: tuple
    layout: str
    dtype: torch.dtype


def draw(rng):
    """Return a case."""
    dims = rng.choice((0, 1, 2, 2, 3))
    shape = rng.choice((0, 1, 2, 3, 9)), rng.choice((1, 2, 3, 4, 7, 8, 33))
    shape += tuple(rng.choice((0, 1, 1, 2, 3, 5)) for _ in range(dims))
    layout = rng.choice(("contiguous", "last", "offset", "offset last", "strided", "expanded"))
    return Case(rng.choice(PASSES), shape, layout, rng.choice((torch.float32, torch.float64)))


def run(case, rng, lying):
    """Run one case and compare; return its name."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))

    def normal(*shape, layout="contiguous"):
        t = torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)
        return lying(t, layout)

    t = normal(*case.shape, layout=case.layout)
    channels = case.shape[1]
    k = rng.randint(1, channels)
    index = torch.tensor(sorted(rng.sample(range(channels), k)))
    _RUN[case.name](rng, normal, t, index)
    return case.name


def _sums(rng, normal, t, index):
    order = rng.choice((1, 2))
    if rng.random() < 0.2 and t.numel() and t.stride(0):
        t.flatten(1)[0, 0] = rng.choice((math.inf, math.nan)) if t.is_contiguous() else 1.0
    expected = t.double().abs().pow(order).sum([0, *range(2, t.dim())])
    fuzz_reference.assert_close(channel_ops.channel_sum(t, order), expected, "channel_sum")


def _cells(rng, normal, t, index):
    """Cells of maps, where C reads, and writes, what lies in cells that reach over an edge."""
    if t.dim() < 3 or not t.numel():
        return
    length = tuple(t.shape[2:])
    size = tuple(rng.choice((1, 2, 3, 4, 4)) for _ in length)
    start = tuple(min(rng.choice((0, 0, -2, 1)), n - 1) for n in length)
    number = tuple(rng.randint(1, 3) for _ in length)
    start = tuple(max(a, 1 - n * s) for a, n, s in zip(start, number, size, strict=True))
    cells, slow = FastCells(length, start, size, number), Cells(length, start, size, number)
    with torch.no_grad():
        expected = slow.sums(t.double())
        fuzz_reference.assert_close(cells.sums(t), expected, "cells.sums")
        values = normal(*t.shape[:2], *number)
        if t.is_contiguous() or native.is_available(t):
            got = cells.add_spread(t.clone(), values)
            fuzz_reference.assert_close(got, t.double() + slow.spread(values.double()), "add")


def _two_resolutions(rng, normal, t, index):
    """A gradient of two resolutions through a ReLU and a batch norm, against their plain forms."""
    if not 3 <= t.dim() <= 4 or not t.numel() or not native.is_available(t):
        return
    cells = Cells.blocks(tuple(t.shape[2:]), rng.choice((2, 3, 4)))
    which, relu = KeptSet(index, t.shape[1]), rng.random() < 0.5
    gradient = normal(*t.shape)
    g = plain.TwoResolutions(gradient[:, index], cells.sums(gradient), which, cells)
    wide = g._replace(kept=g.kept.double(), sums=g.sums.double())
    out = torch.empty_like(t).copy_(normal(*t.shape))
    mean, invstd, weight = normal(t.shape[1]), normal(t.shape[1]), normal(t.shape[1])
    with torch.no_grad():
        sums, counts = two.positive_cells(out, cells)
        fuzz_reference.assert_close(sums, cells.sums(out.double()), "positive_cells")
        fuzz_reference.assert_close(counts, cells.sums((out > 0).double()), "counts")
        known = rng.choice((None, counts))
        if relu:
            wide = plain.pointwise(wide, (out > 0).double())
            for got, expected in zip(two.two_relu(g, out, known), wide[:2], strict=True):
                fuzz_reference.assert_close(got, expected, "two_relu")
        args = (mean.double(), invstd.double())
        dx, dw, db = plain.batch_norm(wide, t.double(), weight.double(), *args)
        found = two.two_norm(g, t, weight, mean, invstd, *((out, known) if relu else ()))
        for got, expected in zip(found, (*dx[:2], dw, db), strict=True):
            fuzz_reference.assert_close(got, expected, "two_norm")


def _groups(rng, channels):
    return rng.choice([g for g in range(1, channels + 1) if channels % g == 0])


_SCORES = (-0.0, 0.0, 0.0, 1.0, 1.0, -1.0, math.inf, -math.inf, math.nan, -math.nan)


def _largest(rng, normal, t, index):
    groups = _groups(rng, t.shape[1])
    if groups == t.shape[1]:
        groups = 1
    scores = normal(t.shape[1])
    for place in range(t.shape[1]):
        if rng.random() < 0.6:
            scores[place] = rng.choice(_SCORES)
    if rng.random() < 0.3:
        scores = torch.stack([scores, scores], 1)[:, 0]
    k = rng.randint(1, t.shape[1] // groups)
    expected = fuzz_reference.choose(scores.tolist(), groups, k)
    if native.is_available(scores):
        assert torch.equal(native.topk_indices(scores, k, groups), expected), "largest in C"
    assert torch.equal(channel_ops.topk_indices(scores, k, groups), expected), "largest"
    integers = scores.nan_to_num(7.0, 5.0, -5.0).mul(2).long()  # not for C
    expected = fuzz_reference.choose(integers.tolist(), groups, k)
    assert torch.equal(channel_ops.topk_indices(integers, k, groups), expected), "largest of torch"


def _chosen(rng, normal, t, index):
    t = t.round()  # whose sums are exact
    order, groups = rng.choice((1, 2)), _groups(rng, t.shape[1])
    groups = 1 if groups == t.shape[1] else groups
    k = rng.randint(1, t.shape[1] // groups)
    got = channel_ops.topk_channels(t, order, k, groups)
    assert (got is not None) == native.is_available(t)
    if got is not None:
        scores, _ = fuzz_reference.sums(t, order)
        assert torch.equal(got, fuzz_reference.choose(scores, groups, k)), "topk_channels"


def _take(rng, normal, t, index):
    got = channel_ops.take_channels(t, index)
    assert torch.equal(got, t[:, index]), "take_channels"


def _put_rows(rng, normal, t, index):
    like = t.transpose(0, 1)
    like = like.contiguous() if rng.random() < 0.7 else like
    rows = normal(len(index), *like.shape[1:])
    before, channel_ops._LARGE_WEIGHT = channel_ops._LARGE_WEIGHT, 0
    try:
        got = channel_ops.put_rows(rows, index, like)
    finally:
        channel_ops._LARGE_WEIGHT = before
    expected = torch.zeros(like.shape, dtype=like.dtype).index_copy_(0, index, rows)
    assert torch.equal(got, expected), "put_rows"


def _put_sums(rng, normal, t, index):
    like = t.transpose(0, 1).contiguous()
    parts = normal(rng.choice((1, 2, 5)), len(index), *like.shape[1:])
    got = channel_ops.put_sums(parts, index, like)
    expected = torch.zeros(like.shape, dtype=torch.float64)
    expected.index_copy_(0, index, parts.double().sum(0))
    fuzz_reference.assert_close(got, expected, "put_sums")


def _rows(rng, normal, t, index):
    n, c_out = t.shape[:2]
    ones = (1,) * rng.choice((1, 2, 3))
    c_in = rng.choice((1, 2, 5, 33))
    dy, x = normal(n, len(index), *ones), normal(n, c_in, *ones)
    w = normal(c_out, c_in, *ones)
    if not native.is_available(x):
        return
    needed = tuple(rng.random() < 0.7 for _ in range(3))
    got = native.rows_backward(dy, x, w, index, needed)
    dy, x64, w64 = (t.double().flatten(1) for t in (dy, x, w))
    dw = torch.zeros_like(w64).index_copy_(0, index, dy.t() @ x64)
    db = torch.zeros(c_out, dtype=torch.float64).index_copy_(0, index, dy.sum(0))
    expected = (dy @ w64[index]).view(x.shape), dw.view(w.shape), db
    for grad, reference, need in zip(got, expected, needed, strict=True):
        assert (grad is not None) == need
        if need:
            fuzz_reference.assert_close(grad, reference, "rows_backward")


def _norm(rng, normal, t, index):
    if t.numel() <= t.shape[1] or not native.is_available(t):
        return
    shape, order = t.shape, rng.choice((1, 2))
    dz = normal(*shape, layout=rng.choice(("contiguous", "last", "expanded", "strided")))
    relu_out = normal(*shape).relu() if rng.random() < 0.5 else None
    weight = normal(shape[1]) if rng.random() < 0.7 else None
    dims = [0, *range(2, t.dim())]
    line = (1, -1, *[1] * (t.dim() - 2))
    x, m = t.double(), t.numel() // shape[1]
    mean, invstd = x.mean(dims), (x.var(dims, unbiased=False) + 1e-2).rsqrt()
    passed = dz.double() if relu_out is None else torch.where(relu_out > 0, dz.double(), 0)
    xhat = (x - mean.view(line)) * invstd.view(line)
    sum_dz, sum_dz_xhat = passed.sum(dims), (passed * xhat).sum(dims)
    dy = passed - (sum_dz.view(line) + xhat * sum_dz_xhat.view(line)) / m
    scale = invstd if weight is None else invstd * weight.double()
    dy = dy * scale.view(line)
    vectors = weight, mean.to(t.dtype), invstd.to(t.dtype)
    got = channel_ops.norm_sums(dz, t, *vectors, order, relu_out)
    expected = sum_dz, sum_dz_xhat, dy.abs().pow(order).sum(dims)
    for sums, reference in zip((got.dz, got.dz_xhat, got.dy), expected, strict=True):
        fuzz_reference.assert_close(sums, reference, "norm_sums")
    got = channel_ops.norm_input_grad(dz, t, *vectors, got.dz, got.dz_xhat, index, relu_out)
    fuzz_reference.assert_close(got, dy[:, index], "norm_input_grad")


_RUN = {
    "sums": _sums,
    "largest": _largest,
    "chosen": _chosen,
    "take": _take,
    "put rows": _put_rows,
    "put sums": _put_sums,
    "rows": _rows,
    "norm": _norm,
    "cells": _cells,
    "two resolutions": _two_resolutions,
}
