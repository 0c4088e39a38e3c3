"""Gradients of two resolutions against torch's own backward of the whole of them (float64)."""

import pytest
import torch

from core.twins import layers, twin_gradients
from ssprop_patch.core import two_resolutions
from ssprop_patch.core.ahead import KeptSet
from ssprop_patch.core.reference import dense_backward
from ssprop_patch.core.two_resolutions import TwoResolutions, reduce

close = dict(rtol=1e-10, atol=1e-10)
SIZES = [(8, 8), (5, 7), (4, 3), (1, 1), (9,), (6, 5, 4)]


def some_channels(channels, k):
    return KeptSet(torch.randperm(channels)[:k].sort().values, channels)


def gradient(size, channels=6, k=2, block=4):
    which = some_channels(channels, k)
    return reduce(torch.randn(3, channels, *size, dtype=torch.float64), which, block)


def assert_same(found, expected):
    assert found.cells == expected.cells
    for name in ("kept", "sums"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **close)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_left_of_a_gradient_is_the_same_again(size):
    g = gradient(size)
    assert_same(reduce(g.whole(), g.which, 4), g)
    dropped = torch.ones(6, dtype=torch.bool).index_fill(0, g.which.index, False)
    whole = g.whole()
    assert torch.equal(whole[:, ~dropped], g.kept)
    dims = tuple(range(2, whole.dim()))
    torch.testing.assert_close(whole.sum(dims), g.sums.sum(dims), **close)
    assert whole[:, dropped].flatten(2)[0, 0].unique().numel() <= g.sums[0, 0].numel()


@pytest.mark.parametrize("size", SIZES)
def test_a_pointwise_function(size):
    g = gradient(size)
    derivative = (torch.randn(3, 6, *size) > 0).double()
    expected = reduce(g.whole() * derivative, g.which, 4)
    assert_same(two_resolutions.pointwise(g, derivative), expected)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_batch_norm(size, affine):
    g = gradient(size)
    x = torch.randn(3, 6, *size, dtype=torch.float64)
    weight = torch.randn(6, dtype=torch.float64) if affine else None
    _, mean, invstd = torch.native_batch_norm(x, weight, None, None, None, True, 0.1, 1e-5)
    dx, dw, db = torch.ops.aten.native_batch_norm_backward(
        g.whole(), x, weight, None, None, mean, invstd, True, 1e-5, [True, True, True]
    )
    found = two_resolutions.batch_norm(g, x, weight, mean, invstd)
    assert_same(found[0], reduce(dx, g.which, 4))
    torch.testing.assert_close(found[1], dw, **close)
    torch.testing.assert_close(found[2], db, **close)


@pytest.mark.parametrize("seed", range(6))
def test_a_convolution(seed):
    tried = []
    for layer in layers(60, seed, channels=((1, 2, 3, 5), (1, 2, 4, 7))):
        x, w, p, block = layer.x.detach(), layer.w.detach(), layer.params, layer.block
        channels, inputs = w.shape[:2]
        depthwise = p.groups == channels == x.shape[1] > 1
        if layer.transposed or (p.groups > 1 and not depthwise):
            continue
        tried.append(depthwise)
        g = reduce(layer.dy, some_channels(channels, (channels + 1) // 2), block)
        read = g.which if depthwise else some_channels(inputs, (inputs + 1) // 2)
        dx, dw, db = two_resolutions.conv_backward(g, x, w, p, read, block)

        kept, whole = torch.zeros_like(layer.dy), g.whole()
        kept[:, g.which.index] = g.kept
        exact = dense_backward(kept, x, w, p, (True, True, False))
        of_rest = twin_gradients(whole - kept, x, w, p, block)
        of_all = twin_gradients(whole, x, w, p, block)
        fine = (exact[0] + of_rest[0])[:, read.index]
        expected = reduce(of_all[0], read, block)
        sums = expected.sums.index_copy(1, read.index, expected.cells.sums(fine))
        assert_same(dx, TwoResolutions(fine, sums, read, expected.cells))
        expected_dw = of_all[1].clone()
        expected_dw[g.which.index] = exact[1][g.which.index]
        torch.testing.assert_close(dw, expected_dw, **close)
        torch.testing.assert_close(db, whole.sum((0, *range(2, whole.dim()))), **close)
    assert len(tried) > 5


@pytest.mark.parametrize(
    "size, kernel, stride, padding", [(16, 3, 2, 1), (8, 2, 2, 0), (9, 3, 1, 1)]
)
def test_max_pooling_keeps_sums_and_what_is_kept(size, kernel, stride, padding):
    x = torch.randn(2, 6, size, size, dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.max_pool2d(x, kernel, stride, padding)
    g = gradient(tuple(y.shape[2:]))
    g = g._replace(kept=g.kept[:2], sums=g.sums[:2])
    (dx,) = torch.autograd.grad(y, x, g.whole())
    kept = dx[:, g.which.index]
    found = two_resolutions.max_pool(g, kept, (size, size), (stride, stride), 4)
    torch.testing.assert_close(found.kept, kept, **close)
    torch.testing.assert_close(found.sums.sum((2, 3)), dx.sum((2, 3)), **close)
    expected = reduce(dx, g.which, 4)
    torch.testing.assert_close(
        found.sums[:, g.which.index], expected.sums[:, g.which.index], **close
    )


def test_a_sum():
    a = gradient((5, 7))
    b = reduce(torch.randn(3, 6, 5, 7, dtype=torch.float64), a.which, 4)
    assert_same(two_resolutions.add(a, b), reduce(a.whole() + b.whole(), a.which, 4))
