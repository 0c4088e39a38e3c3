"""The paper's backward in plain torch against the dense kernel on a masked gradient (float64)."""

import itertools

import oracle
import pytest
import torch
import torch.nn.functional as F

from ssprop_patch.core import reference
from ssprop_patch.core.geometry import ConvParams
from ssprop_patch.core.rule import BackwardRule
from ssprop_patch.core.selection import kept_channels, l1_scores, selectable_channels
from ssprop_patch.ops import backward

RATE = 0.6
# groups, C_in, C_out: ordinary, grouped, depthwise, depthwise with a multiplier.
CHANNELS = [(1, 4, 10), (2, 6, 8), (5, 5, 5), (3, 6, 3), (3, 3, 12)]
GEOMETRIES = [(1, 0, 1), (2, 1, 1), (1, 2, 2)]  # stride, padding, dilation
MASKS = [(True, True, True), (True, False, False), (False, True, True)]


def example(dims, channels, geometry, transposed):
    groups, c_in, c_out = channels
    stride, padding, dilation = geometry
    shape = (c_in, c_out // groups) if transposed else (c_out, c_in // groups)
    x = torch.randn(2, c_in, *(7, 6, 5)[:dims], dtype=torch.float64)
    w = torch.randn(*shape, *(3, 2, 3)[:dims], dtype=torch.float64)
    convolutions = oracle.CONV_TRANSPOSE if transposed else oracle.CONV
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    dy = torch.randn_like(convolutions[dims](x, w, **settings))
    return dy, x, w, ConvParams(*((n,) * dims for n in geometry), groups, transposed)


def masked_dense(dy, x, w, p, output_mask):
    masked = oracle.mask(dy, oracle.choose(dy, p.groups, RATE).keep)
    output_padding = [0] * len(p.stride)
    arguments = (*p[:3], p.transposed, output_padding, p.groups, output_mask)
    return torch.ops.aten.convolution_backward(masked, x, w, [dy.shape[1]], *arguments)


@pytest.mark.parametrize("output_mask", MASKS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dims, transposed", list(itertools.product((1, 2, 3), (False, True))))
def test_it_is_the_dense_backward_of_the_kept_channels(
    dims, transposed, channels, geometry, output_mask
):
    dy, x, w, p = example(dims, channels, geometry, transposed)
    k = kept_channels(selectable_channels(dy.shape[1], p.groups), RATE)
    expected = masked_dense(dy, x, w, p, output_mask)
    found = reference.sparse_backward(dy, x, w, p, k, output_mask=output_mask)
    fast = backward.sparse_backward(dy, x, w, p, k, BackwardRule(l1_scores), output_mask)
    for needed, e, f, g in zip(output_mask, expected, found, fast, strict=True):
        assert (f is not None) == (g is not None) == needed
        if needed:
            torch.testing.assert_close(f, e, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)


def test_a_rate_that_drops_nothing_is_dense():
    dy, x, w, p = example(2, (1, 4, 10), (1, 1, 1), False)
    found = reference.sparse_backward(dy, x, w, p, 10)
    for a, b in zip(found, reference.dense_backward(dy, x, w, p, (True,) * 3), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_linear(shape):
    x = torch.randn(shape, dtype=torch.float64)
    w, b = torch.randn(10, 5, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    dy = torch.randn_like(F.linear(x, w))
    rows = dy.reshape(-1, 10)
    masked = oracle.mask(rows, oracle.choose(rows, 1, RATE).keep).view(dy.shape)
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    expected = torch.autograd.grad(F.linear(*leaves), leaves, masked)
    for f, e in zip(reference.linear_backward(dy, x, w, 4), expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-11, atol=1e-11)
    assert reference.linear_backward(dy, x, w, 4, output_mask=(False,) * 3) == (None,) * 3


def test_a_selection_of_ones_own():
    dy, x, w, p = example(2, (1, 4, 10), (1, 1, 1), False)
    _, dw, db = reference.sparse_backward(dy, x, w, p, 2, lambda dy: torch.arange(10.0))
    assert dw.flatten(1).any(1).nonzero().flatten().tolist() == [8, 9]
    assert db.nonzero().flatten().tolist() == [8, 9]
