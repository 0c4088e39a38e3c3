"""One rule for the choice of channels: nan, then the largest, of equals the first; in C and torch.

And what a dropped channel holds goes nowhere, whatever it is.
"""

import itertools
import math

import fuzz_reference
import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch import functional
from ssprop_patch.core.geometry import ConvParams
from ssprop_patch.core.rule import BackwardRule
from ssprop_patch.core.selection import resolve_selection
from ssprop_patch.ops import algorithms, channel_ops, native
from ssprop_patch.ops.backward import linear_backward
from ssprop_patch.ops.channel_gradients import KeptChannels
from ssprop_patch.ops.channel_scores import select_channels
from ssprop_patch.ops.native import build

INF, NAN = math.inf, math.nan


@pytest.fixture(params=["C", "torch"])
def way(request, monkeypatch):
    """With the C functions and without."""
    if request.param == "C" and build.find_compiler() is None:
        pytest.skip("there is no C compiler")
    if request.param == "torch":
        monkeypatch.setattr(native, "is_available", lambda t: False)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("way")
def test_every_order_of_special_scores(dtype):
    for scores in itertools.product((NAN, -NAN, INF, 0.0, -0.0, -INF), repeat=4):
        for k in (1, 2, 3):
            index = channel_ops.topk_indices(torch.tensor(scores, dtype=dtype), k, 1)
            assert torch.equal(index, fuzz_reference.choose(scores, 1, k)), (scores, k)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN])
def test_of_equal_scores_the_first(value, groups):
    scores = torch.full((100,), value)
    k = 3
    index = channel_ops.topk_indices(scores, k, groups).view(groups, k)
    assert index.tolist() == [[g * 100 // groups + j for j in range(k)] for g in range(groups)]


@pytest.mark.usefixtures("way")
def test_the_rule_of_a_few():
    scores = torch.tensor([1.0, INF, -0.0, NAN, 0.0, INF, NAN, 1.0])
    for k, expected in (
        (1, [3]),
        (2, [3, 6]),
        (3, [1, 3, 6]),
        (5, [0, 1, 3, 5, 6]),
        (7, [0, 1, 2, 3, 5, 6, 7]),
    ):
        assert channel_ops.topk_indices(scores, k, 1).tolist() == expected


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("channels", [1, 2, 5, 16, 31, 33, 100])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("selection", ["l1", "l2"])
@pytest.mark.parametrize("value", [1.0, 0.125, -2.0, 0.0, INF, NAN])
def test_channels_of_equal_gradients(channels, last, selection, value):
    layer = ssp.convert(nn.Conv2d(2, channels, 3), 0.5, selection=selection, strict=False)
    x = torch.randn(3, 2, 7, 8).contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )
    y = layer(x)
    y.backward(torch.full_like(y, value))
    kept = (layer.bias.grad != 0).nonzero().flatten().tolist()  # nan is not 0 either
    if value:
        assert kept == list(range(max(1, int(channels / 2 + 0.5))))


@pytest.mark.skipif(build.find_compiler() is None, reason="there is no C compiler")
@pytest.mark.parametrize("channels", [3, 8, 17, 33, 70])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (40, 60)])
def test_sums_of_equal_channels_are_equal_in_c(channels, last, order, shape):
    # Numbers that round; in vectors and in what is left behind the last one.
    one = torch.rand(3, 1, *shape)
    t = one.expand(3, channels, *shape)
    t = t.movedim(1, -1).contiguous().movedim(-1, 1) if last else t.contiguous()
    assert native.channel_sums(t, order).unique().numel() == 1
    assert native.topk_channels(t, order, 2, 1).tolist() == [0, 1]


# --- dropped channels ---------------------------------------------------------------------------


def convolutions():
    for groups, last in itertools.product((1, 2, 8), (False, True)):
        for size, kernel, padding in ((6, 3, 1), (6, 1, 0), (1, 1, 0)):
            yield groups, last, size, kernel, padding


@pytest.mark.parametrize("groups, last, size, kernel, padding", list(convolutions()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [INF, NAN])
def test_what_a_dropped_channel_holds_goes_nowhere(
    groups, last, size, kernel, padding, dtype, value
):
    memory_format = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(3, 8, size, size).to(dtype).contiguous(memory_format=memory_format)
    w = torch.randn(8, 8 // groups, kernel, kernel).to(dtype)
    p = ConvParams((1, 1), (padding, padding), (1, 1), groups)
    kept = [1, 5] if groups == 2 else [1, 6]
    scores = torch.zeros(8)
    scores[kept] = 1
    dy = torch.full((3, 8, size, size), value, dtype=dtype)
    dy[:, kept] = torch.randn(3, 2, size, size).to(dtype)
    k = 1 if groups == 2 else 2
    names_x, names_w = algorithms.candidates(x, w, p)
    assert len(names_x) >= (2 if groups > 1 else 1)
    for names in (
        {(name, "gather") for name in names_x}
        | {("gather", name) for name in names_w}
        | {(name, name) for name in set(names_x) & set(names_w)}
    ):
        choice = KeptChannels(dy, x, w, p, k, lambda dy: scores)
        dx, dw, db = algorithms.Algorithms(*names).run(choice, (True, True, True))
        assert choice.index.tolist() == kept
        for grad in (dx, dw, db):
            assert grad.isfinite().all(), names
        dropped = [c for c in range(8) if c not in kept]
        assert not dw[dropped].any() and not db[dropped].any() and dw[kept].any()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("value", [INF, NAN])
def test_more_channels_that_are_not_finite_than_are_kept(value):
    for layer, x in (
        (nn.Conv2d(4, 8, 3), torch.randn(2, 4, 6, 6)),
        (nn.Conv2d(8, 8, 3, groups=8), torch.randn(2, 8, 6, 6)),
        (nn.ConvTranspose2d(4, 8, 3), torch.randn(2, 4, 6, 6)),
        (nn.Linear(4, 8), torch.randn(5, 4)),
    ):
        ssp.convert(layer, 0.75, types=type(layer))
        y = layer(x)
        dy = torch.randn_like(y)
        dy.select(1, 2).fill_(value)
        dy[:, 5:] = value
        y.backward(dy)
        assert not layer.bias.grad[[0, 1, 3, 4, 6, 7]].any()
        assert not layer.bias.grad[[2, 5]].isfinite().any()
        assert layer.weight.grad.isfinite().sum() > 0


@pytest.mark.usefixtures("way")
def test_a_linear_layer_and_the_functional_form():
    scores = torch.tensor([0.0, 1.0, 0.0, 1.0])
    dy, x, w = torch.randn(5, 4), torch.randn(5, 3), torch.randn(4, 3)
    dy[:, [0, 2]] = INF
    grads = linear_backward(dy, x, w, 2, BackwardRule(lambda dy: scores), (True, True, True))
    assert all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(grads[0], dy[:, [1, 3]] @ w[[1, 3]])
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    y = functional.conv2d(x, torch.randn(4, 3, 3, 3), drop_rate=0.5, selection=lambda dy: scores)
    dy = torch.full_like(y, NAN)
    dy[:, [1, 3]] = 1
    y.backward(dy)
    assert x.grad.isfinite().all()


def test_half_precision_follows_the_same_rule():
    dy = torch.ones(2, 8, 5, 5, dtype=torch.bfloat16)
    dy[:, 6] = NAN
    dy[:, 3] = INF
    for selection in ("l1", "l2"):
        score_fn = resolve_selection(selection)
        assert select_channels(dy, 4, 1, score_fn).tolist() == [0, 1, 3, 6]


# --- scores of a function ---------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.half,
        torch.Tensor.bfloat16,
        torch.Tensor.double,
        torch.Tensor.long,
        torch.Tensor.int,
        lambda t: t.to(torch.uint8),
        lambda t: t.as_subclass(Subclass),
        nn.Parameter,
        lambda t: t.requires_grad_(),
        lambda t: torch.stack([t, t], 1)[:, 0],
        lambda t: torch.complex(t, -t).conj().imag,
    ],
)
@pytest.mark.parametrize("groups, expected", [(1, [3, 5]), (2, [1, 2, 3, 5])])
def test_scores_in_any_ordinary_tensor(change, groups, expected):
    scores = torch.tensor([0.0, 1.0, 2.0, 7.0, 3.0, 6.0])
    index = select_channels(torch.ones(2, 6, 3), 2, groups, lambda dy: change(scores.clone()))
    assert index.tolist() == expected and type(index) is torch.Tensor


def test_scores_of_a_truth_value_and_of_one_number():
    dy = torch.ones(2, 6, 3)
    assert select_channels(dy, 2, 1, lambda dy: torch.arange(6) > 3).tolist() == [4, 5]
    assert select_channels(dy, 2, 2, lambda dy: torch.ones(1).expand(6)).tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(
    "scores, error, said",
    [
        (torch.empty(6, device="meta"), ValueError, "device of the gradient, cpu, got meta"),
        (torch.ones(6, dtype=torch.complex64), TypeError, "real numbers"),
        (torch.ones(6).to_sparse(), TypeError, "ordinary tensor"),
    ],
)
def test_scores_that_cannot_be_compared(scores, error, said):
    x, w = torch.randn(2, 3, 5, 5), torch.randn(6, 3, 3, 3, requires_grad=True)
    y = functional.conv2d(x, w, drop_rate=0.5, selection=lambda dy: scores)
    with pytest.raises(error, match=said):
        y.sum().backward()
    assert w.grad is None


def test_scores_in_a_tensor_without_memory():
    from torch._subclasses import FakeTensorMode

    with pytest.raises(TypeError, match="got a FakeTensor"):
        select_channels(
            torch.ones(2, 6, 3), 2, 1, lambda dy: FakeTensorMode().from_tensor(torch.ones(6))
        )
