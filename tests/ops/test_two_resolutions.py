"""The fast forms of gradients of two resolutions against the plain ones."""

import pytest
import torch
import torch.nn.functional as F
from core.twins import layers

from ssprop_patch.core import two_resolutions as plain
from ssprop_patch.core.ahead import KeptSet, Scores
from ssprop_patch.core.rule import BackwardRule
from ssprop_patch.core.two_resolutions import reduce
from ssprop_patch.ops import native
from ssprop_patch.ops.lazy_grad.two_resolutions import TwoResolutionGradient
from ssprop_patch.ops.native.two_resolutions import can_take, positive_cells, two_norm, two_relu
from ssprop_patch.ops.two_resolutions import Call, ahead_backward

TOLERANCE = {
    torch.float64: dict(rtol=1e-10, atol=1e-10),
    torch.float32: dict(rtol=2e-4, atol=2e-4),
}
SIZES = [(8, 8), (5, 7), (4, 3), (1, 1), (33, 30), (2, 17), (9,)]
formats = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "float"])


def in_format(t, last):
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if last else t.contiguous()


def some_channels(channels, k):
    return KeptSet(torch.randperm(channels)[:k].sort().values, channels)


def assert_same(found, expected, dtype):
    torch.testing.assert_close(found[0], expected.kept, **TOLERANCE[dtype])
    torch.testing.assert_close(found[1], expected.sums, **TOLERANCE[dtype])


def a_gradient(size, dtype, last, channels=19, k=6):
    whole = torch.randn(3, channels, *size, dtype=dtype)
    g = reduce(whole, some_channels(channels, k), 4)
    return g._replace(kept=in_format(g.kept, last), sums=in_format(g.sums, last))


@pytest.mark.skipif(not native.may_be_available(), reason="no C compiler")
@formats
@dtypes
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("relu, affine", [(True, True), (False, True), (True, False)])
def test_c_functions(size, dtype, last, relu, affine):
    g = a_gradient(size, dtype, last)
    x = in_format(torch.randn(3, 19, *size, dtype=dtype), last)
    out = in_format(torch.randn(3, 19, *size, dtype=dtype).relu(), last)
    weight = torch.randn(19, dtype=dtype) if affine else None
    _, mean, invstd = torch.native_batch_norm(x, weight, None, None, None, True, 0.1, 1e-5)
    assert can_take(g, x) == (len(size) <= 2)
    masked = plain.pointwise(g, (out > 0).to(dtype)) if relu else g
    expected, dw, db = plain.batch_norm(masked, x, weight, mean, invstd)
    sums, counts = positive_cells(out, g.cells)
    torch.testing.assert_close(sums, g.cells.sums(out), **TOLERANCE[dtype])
    torch.testing.assert_close(counts, g.cells.sums((out > 0).to(dtype)), rtol=0, atol=0)
    for known in (None, counts) if relu else (None,):
        found = two_norm(g, x, weight, mean, invstd, out if relu else None, known)
        assert_same(found, expected, dtype)
        for one, other in ((found[2], dw), (found[3], db)):
            torch.testing.assert_close(one, other, **TOLERANCE[dtype])
        if relu:
            assert_same(two_relu(g, out, known), masked, dtype)


@formats
@dtypes
@pytest.mark.parametrize("seed", range(4))
def test_a_convolution(seed, dtype, last):
    tried = 0
    for layer in layers(60, seed, channels=((1, 2, 3, 5), (1, 2, 4, 7))):
        p, block = layer.params, layer.block
        channels, inputs = layer.w.shape[:2]
        depthwise = p.groups == channels == layer.x.shape[1] > 1
        if layer.transposed or (p.groups > 1 and not depthwise) or channels == 1:
            continue
        tried += 1
        x, w = in_format(layer.x.detach().to(dtype), last), layer.w.detach().to(dtype)
        dy = in_format(layer.dy.to(dtype), last)
        kept = some_channels(channels, (channels + 1) // 2)
        read = kept if depthwise else some_channels(inputs, (inputs + 1) // 2)
        rule = BackwardRule(block=block, ahead=Scores())
        g = reduce(dy, kept, block)
        expected, dw, db = plain.conv_backward(g, x, w, p, read, block)
        call = Call(rule.ahead, kept, read, (), tuple(dy.shape))
        for given in (dy, TwoResolutionGradient(dy, g, block)):
            with torch.no_grad():
                found = ahead_backward(given, x, w, p, rule, call, (True, True, True))
            assert isinstance(found[0], TwoResolutionGradient)
            assert_same(found[0].exact_parts(), expected, dtype)
            torch.testing.assert_close(found[1], dw, **TOLERANCE[dtype])
            torch.testing.assert_close(found[2], db, **TOLERANCE[dtype])
            assert found[1].stride() == w.stride()
        with torch.no_grad():
            alone = [
                ahead_backward(dy, x, w, p, rule, call, tuple(i == j for j in range(3)))
                for i in range(3)
            ]
        assert_same(alone[0][0].exact_parts(), expected, dtype)
        torch.testing.assert_close(alone[1][1], dw, **TOLERANCE[dtype])
        torch.testing.assert_close(alone[2][2], db, **TOLERANCE[dtype])
        assert [sum(g is not None for g in grads) for grads in alone] == [1, 1, 1]
    assert tried > 5


POINTWISE = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_functions(name):
    x = torch.randn(3, 19, 5, 7, dtype=torch.float64, requires_grad=True)
    y = POINTWISE[name](3 * x)
    g = a_gradient((5, 7), torch.float64, False)
    found = []
    x.register_hook(lambda grad: found.append(grad.clone()))
    (whole,) = torch.autograd.grad(y, x, g.whole(), retain_graph=True)
    expected = reduce(whole, g.which, 4).whole()
    found.clear()
    y.backward(TwoResolutionGradient(y, g, 4))
    torch.testing.assert_close(found[0], expected, **TOLERANCE[torch.float64])


def test_whoever_is_not_ready_for_it_gets_the_ordinary_tensor():
    g = a_gradient((5, 7), torch.float64, False)
    lazy = TwoResolutionGradient(torch.empty(3, 19, 5, 7, dtype=torch.float64), g, 4)
    whole = g.whole()
    for function in (torch.exp, torch.sum, lambda t: t[1, 2], lambda t: t.clone(), lambda t: t * 2):
        lazy = TwoResolutionGradient(whole, g, 4)
        torch.testing.assert_close(function(lazy), function(whole), rtol=0, atol=0)
    assert type(lazy * 1) is torch.Tensor


def test_the_sum_with_an_ordinary_gradient_has_two_resolutions():
    g = a_gradient((5, 7), torch.float64, False)
    ordinary = torch.randn(3, 19, 5, 7, dtype=torch.float64)
    expected = plain.add(g, reduce(ordinary, g.which, 4))
    for swap in (False, True):
        pair = [TwoResolutionGradient(ordinary, g, 4), ordinary]
        total = torch.add(*pair[::-1] if swap else pair)
        assert isinstance(total, TwoResolutionGradient)
        assert_same(total.parts(), expected, torch.float64)
        # But who looks at it sees all of both.
        torch.testing.assert_close(total * 1, g.whole() + ordinary)


@pytest.mark.parametrize("alpha", [1, 2, -0.5])
def test_a_sum_with_a_factor(alpha):
    g = a_gradient((5, 7), torch.float64, False)
    ordinary = torch.randn(3, 19, 5, 7, dtype=torch.float64)
    for other in (ordinary, TwoResolutionGradient(ordinary, g, 4)):
        found = torch.add(TwoResolutionGradient(ordinary, g, 4), other, alpha=alpha)
        expected = g.whole() + alpha * (ordinary if other is ordinary else g.whole())
        torch.testing.assert_close(found * 1, expected)


def test_what_was_changed_in_place_stays_changed():
    g = a_gradient((5, 7), torch.float64, False)
    lazy = TwoResolutionGradient(g.whole(), g, 4)
    lazy.mul_(2)
    assert lazy.parts() is None
    torch.testing.assert_close(lazy + 0, 2 * g.whole())
