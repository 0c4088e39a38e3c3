"""The passes over memory in C against torch's own operations in float64."""

import math

import pytest
import torch
from native_checks import DTYPES, SHAPES, assert_close, each_case, lying, needs_compiler, random

from ssprop_patch.ops import channel_ops, native


@each_case(SHAPES)
@pytest.mark.parametrize("order", [1, 2])
def test_channel_sums(shape, last, dtype, order, threads):
    t = random(shape, dtype, last)
    dims = [0, *range(2, t.dim())]
    assert_close(native.channel_sums(t, order), t.double().abs().pow(order).sum(dims), dtype)


@each_case([*SHAPES, (3, 60, 5, 5)])
@pytest.mark.parametrize("order", [1, 2])
def test_the_largest_channels(shape, last, dtype, order, threads):
    t = random(shape, dtype, last)
    groups = 3 if shape[1] % 3 == 0 else 1
    k = (shape[1] // groups + 1) // 2
    expected = native.topk_indices(native.channel_sums(t, order), k, groups)
    assert torch.equal(native.topk_channels(t, order, k, groups), expected)


@each_case(SHAPES)
def test_take_channels(shape, last, dtype, threads):
    t = random(shape, dtype, last)
    index = torch.randperm(shape[1])[: max(1, shape[1] // 2)].sort().values
    taken = native.take_channels(t, index)
    assert torch.equal(taken, t[:, index]) and taken.dtype == dtype
    assert taken.stride() == lying(taken, last and t.dim() > 2).stride()


@each_case([(5, 3, 3, 3), (16, 40), (7, 1, 1, 1), (9, 2, 2, 3, 4)])
@pytest.mark.parametrize("places", [[0], [1, 2], "last", "all"], ids=str)
def test_put_rows(shape, last, dtype, places, threads):
    like = random(shape, dtype, last)
    n = shape[0]
    places = {"last": [n - 1], "all": list(range(n))}.get(str(places), places)
    index = torch.tensor(places, dtype=torch.int64)
    rows = lying(random((len(places), *shape[1:]), dtype, False, 2), last)
    out = native.put_rows(rows, index, like)
    if 1 in shape and out is None:  # of sizes of 1 the strides may differ
        assert rows.stride() != like.stride()
        return
    assert torch.equal(out, torch.zeros_like(like).index_copy_(0, index, rows))
    assert out.stride() == like.stride()


@each_case([(5, 3, 3, 3), (16, 40), (9, 600), (7, 1, 1, 1)])
@pytest.mark.parametrize("n", [1, 6])
def test_put_sums(shape, last, dtype, n, threads):
    like = random(shape, dtype, False)
    index = torch.tensor([0, 2, shape[0] - 1])
    parts = random((n, 3, *shape[1:]), dtype, False, 2)
    out = native.put_sums(parts, index, like)
    expected = torch.zeros(shape, dtype=torch.float64).index_copy_(0, index, parts.double().sum(0))
    assert_close(out, expected, dtype)
    out = channel_ops.put_sums(parts, index, lying(like, last))  # in C or not
    assert out.stride() == lying(like, last).stride()
    assert_close(out, expected, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("size", [1, 2, 5, 64, 999])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("values", ["different", "few", "one", "ascending", "descending"])
def test_the_largest_of_each_group(dtype, size, groups, values):
    scores = random((groups * size,), dtype, False)
    scores = {
        "few": scores.round(),
        "one": torch.ones_like(scores),
        "different": scores,
        "ascending": scores.sort().values,
        "descending": scores.sort(descending=True).values,
    }[values]
    for k in {1, size // 5 + 1, size - 1, size} - {0}:
        index = native.topk_indices(scores, k, groups)
        assert index.dtype == torch.int64 and index.shape == (groups * k,)
        for g in range(groups):
            of_group = range(g * size, (g + 1) * size)
            ranked = sorted(of_group, key=lambda i: (-scores[i].item(), i))  # the first of equals
            assert index[g * k : (g + 1) * k].tolist() == sorted(ranked[:k])


@needs_compiler
def test_the_largest_where_some_are_not_finite():
    inf, nan = math.inf, math.nan
    scores = torch.tensor([1.0, nan, -inf, 3.0, inf, nan, 0.0, 2.0])
    assert native.topk_indices(scores, 3, 1).tolist() == [1, 4, 5]
    assert native.topk_indices(scores, 5, 1).tolist() == [1, 3, 4, 5, 7]
    assert native.topk_indices(scores, 2, 2).tolist() == [1, 3, 4, 5]
    assert native.topk_indices(torch.full((4,), nan), 2, 1).tolist() == [0, 1]
    assert native.topk_indices(scores[::2], 2, 1).tolist() == [0, 2]


@needs_compiler
def test_rows_that_lie_otherwise_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(channel_ops, "_LARGE_WEIGHT", 0)
    like, index = torch.randn(5, 4, 3, 3), torch.tensor([0, 3])
    rows = lying(torch.randn(2, 4, 3, 3), True)
    assert native.put_rows(rows, index, like) is None
    assert native.put_rows(rows.double(), index, lying(like, True)) is None
    out = channel_ops.put_rows(rows, index, like)
    assert torch.equal(out[index], rows) and out.stride() == like.stride()


@needs_compiler
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_not_lost(value, last):
    t = random((2, 3, 5, 7), torch.float32, last)
    t[1, 2, 4, 6] = value
    sums = native.channel_sums(t, 1)
    assert sums[:2].isfinite().all() and str(sums[2].item()) == str(abs(value))
