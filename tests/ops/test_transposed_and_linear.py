"""Transposed convolutions and linear layers: gradients equal the oracle's."""

import oracle
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import ssprop_patch as ssp
import ssprop_patch.functional as SF

SPARSE_TRANSPOSE = {1: SF.conv_transpose1d, 2: SF.conv_transpose2d, 3: SF.conv_transpose3d}
LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}


def grads_of(y, tensors, dy):
    """Gradients of those of ``tensors`` that need one; None for the others."""
    needing = [t for t in tensors if t is not None and t.requires_grad]
    found = dict(zip(map(id, needing), torch.autograd.grad(y, needing, dy), strict=True))
    return [found.get(id(t)) for t in tensors]


def assert_all_close(actual, expected):
    for one, two in zip(actual, expected, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            scale = two.abs().max().item() if two.numel() else 0.0
            torch.testing.assert_close(one, two, rtol=0, atol=1e-10 * scale + 1e-300)


# --- transposed convolutions ------------------------------------------------------------------


@st.composite
def transposed_cases(draw):
    """(dims, x, w, b, geometry, rate, dy) in float64, some of them not needing a gradient."""
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inside = draw(st.integers(1, 3))  # input channels of a group
    outside = draw(st.integers(1, 6))  # 1: depthwise where there are groups
    stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    reach = [(k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple(draw(st.integers(0, n)) for n in reach)
    most = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    geometry = {
        "stride": stride,
        "padding": padding,
        "output_padding": tuple(draw(st.integers(0, n)) for n in most),
        "groups": groups,
        "dilation": dilation,
    }
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def randn(*size):
        return torch.randn(size, dtype=torch.float64, generator=generator)

    batch = draw(st.sampled_from([(), (1,), (3,)]))
    x = randn(*batch, groups * inside, *(draw(st.integers(3, 5)) for _ in range(dims)))
    if dims in LAYOUTS and batch and draw(st.booleans()):
        x = x.contiguous(memory_format=LAYOUTS[dims])
    w = randn(groups * inside, outside, *kernel)
    b = randn(groups * outside) if draw(st.booleans()) else None
    x.requires_grad_(draw(st.booleans()))
    w.requires_grad_(draw(st.booleans()) or not x.requires_grad)
    if b is not None:
        b.requires_grad_(draw(st.booleans()))
    y = oracle.CONV_TRANSPOSE[dims](x, w, b, **geometry)
    rate = draw(st.sampled_from([0.25, 0.5, 0.8, 0.99]))
    return dims, x, w, b, geometry, rate, randn(*y.shape)


@settings(max_examples=300)
@given(transposed_cases())
def test_gradients_of_a_transposed_convolution_equal_the_oracle(case):
    dims, x, w, b, geometry, rate, dy = case
    dense = oracle.CONV_TRANSPOSE[dims](x, w, b, **geometry)
    y = SPARSE_TRANSPOSE[dims](x, w, b, **geometry, drop_rate=rate)
    assert torch.equal(y, dense) and y.stride() == dense.stride()

    batched = dy if x.dim() == dims + 2 else dy[None]
    choice = oracle.choose(batched, geometry["groups"], rate)
    assume(choice.gap > 1e-6)
    masked = oracle.mask(batched, choice.keep).view(dy.shape)
    actual = grads_of(y, (x, w, b), dy)
    assert_all_close(actual, grads_of(dense, (x, w, b), masked))
    if actual[1] is not None:  # the rows of dropped channels, dim 1 of each group
        by_group = actual[1].unflatten(0, (geometry["groups"], -1)).transpose(1, 2).flatten(0, 1)
        assert (by_group[~choice.keep] == 0).all()


# --- linear -----------------------------------------------------------------------------------


@st.composite
def linear_cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def randn(*size):
        return torch.randn(size, dtype=torch.float64, generator=generator)

    leading = draw(st.lists(st.integers(1, 4), max_size=3))
    n_in, n_out = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    x, w, dy = randn(*leading, n_in), randn(n_out, n_in), randn(*leading, n_out)
    if len(leading) > 1 and draw(st.booleans()):  # as after a permute to channels last
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
        dy = dy.transpose(0, -1).contiguous().transpose(0, -1)
    b = randn(n_out) if draw(st.booleans()) else None
    x.requires_grad_(draw(st.booleans()))
    w.requires_grad_(draw(st.booleans()) or not x.requires_grad)
    if b is not None:
        b.requires_grad_(draw(st.booleans()))
    return x, w, b, draw(st.sampled_from([0.25, 0.5, 0.8, 0.99])), dy


@settings(max_examples=300)
@given(linear_cases())
def test_gradients_of_a_linear_layer_equal_the_oracle(case):
    x, w, b, rate, dy = case
    y = SF.linear(x, w, b, drop_rate=rate)
    assert torch.equal(y, F.linear(x, w, b))
    choice = oracle.choose(dy.reshape(-1, len(w)), 1, rate)
    assume(choice.gap > 1e-6)
    # By hand: y = x w' + b.
    masked = torch.where(choice.keep, dy, 0).reshape(-1, len(w))
    rows = x.detach().reshape(-1, x.shape[-1])
    by_hand = [(masked @ w.detach()).view(x.shape), masked.T @ rows, masked.sum(0)]
    needed = [
        None if t is None or not t.requires_grad else g
        for t, g in zip((x, w, b), by_hand, strict=True)
    ]
    actual = grads_of(y, (x, w, b), dy)
    assert_all_close(actual, needed)
    if actual[1] is not None:
        assert (actual[1][~choice.keep] == 0).all()


@pytest.mark.parametrize("function", [SF.linear, SF.conv_transpose2d])
def test_double_backward_is_the_derivative_of_the_sparse_backward(function):
    shape, weight = ((2, 4), (6, 4)) if function is SF.linear else ((2, 4, 3, 3), (4, 6, 2, 2))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(weight, dtype=torch.float64, requires_grad=True)
    # A gradient of its own for each channel, so that no small change changes the choice.
    scale = torch.arange(1.0, 7, dtype=torch.float64)
    scale = scale if function is SF.linear else scale.view(-1, 1, 1)

    def first_gradients(x, w):
        y = function(x, w, drop_rate=0.5)
        return torch.autograd.grad((y.tanh() * scale).sum() * 1e-2, (x, w), create_graph=True)

    assert torch.autograd.gradcheck(lambda x, w: first_gradients(x, w), (x, w))


@pytest.mark.parametrize("name", ["linear", "conv_transpose1d", "conv_transpose2d"])
def test_a_rate_of_zero_is_torchs_own_function(name):
    shapes = {"linear": ((3, 4), (6, 4)), "conv_transpose1d": ((2, 4, 5), (4, 3, 2))}
    x_shape, w_shape = shapes.get(name, ((2, 4, 5, 5), (4, 3, 2, 2)))
    x, w = torch.randn(x_shape, requires_grad=True), torch.randn(w_shape, requires_grad=True)
    y = getattr(SF, name)(x, w)
    dense = getattr(F, name)(x, w)
    assert type(y.grad_fn) is type(dense.grad_fn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_a_linear_layer_as_torch_does(dtype):
    layer, x = nn.Linear(16, 8), torch.randn(5, 16, requires_grad=True)
    dy = torch.randn(5, 8).to(dtype)
    keep = oracle.choose(dy, 1, 0.5).keep

    def run(dy):
        with torch.autocast("cpu", dtype):
            y = layer(x)
        assert y.dtype == dtype
        return y, torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)

    dense, expected = run(torch.where(keep, dy, 0))
    ssp.convert(layer, 0.5, types=nn.Linear)
    y, actual = run(dy)
    assert torch.equal(y, dense)
    for one, two in zip(actual, expected, strict=True):
        assert one.dtype == two.dtype == torch.float32
    assert torch.equal(actual[1], expected[1]) and torch.equal(actual[2], expected[2])
    # dX sums over 4 features, not over these and 4 zeros: equal but for the last bit.
    torch.testing.assert_close(actual[0], expected[0], rtol=torch.finfo(dtype).eps, atol=1e-6)
