"""The computation: forward, choice and gradients of one convolution, against an oracle."""

import contextlib
import functools
import math
from unittest import mock

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ssprop_patch import functional, kernels
from ssprop_patch.backward import sparse_backward
from ssprop_patch.kept import ConvParams, dense_backward
from ssprop_patch.selection import (
    kept_channels,
    l1_scores,
    l2_scores,
    random_scores,
    selectable_channels,
)
from ssprop_patch.ways import DW, DX, Ways, possible

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # by torch.func itself
]

SSP = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
CHANNELS_LAST = {1: None, 2: torch.channels_last, 3: torch.channels_last_3d}


# --- generated convolutions -------------------------------------------------------------------


class Case:
    """One convolution, the gradient of its output, and who wants a gradient."""

    def __init__(self, dims, x, w, b, dy, geometry, drop_rate, needs):
        self.dims, self.x, self.w, self.b, self.dy = dims, x, w, b, dy
        self.geometry, self.drop_rate, self.needs = geometry, drop_rate, needs

    @property
    def groups(self):
        return self.geometry["groups"]

    def choice(self):
        batched = self.dy if self.dy.dim() == self.dims + 2 else self.dy[None]
        return oracle.choose(batched, self.groups, self.drop_rate)

    def expected(self, keep):
        """(dX, dW, db), None where not needed."""
        grads = oracle.gradients(self.x, self.w, self.b, self.dy, keep, **self.geometry)
        return tuple(g if need else None for g, need in zip(grads, self.needs, strict=True))

    def leaves(self):
        return tuple(
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip((self.x, self.w, self.b), self.needs, strict=True)
        )

    def run(self, **kwargs):
        """Output and the gradients that land in ``.grad``."""
        x, w, b = self.leaves()
        kwargs = {"drop_rate": self.drop_rate, **kwargs}
        y = SSP[self.dims](x, w, b, **self.geometry, **kwargs)
        y.backward(self.dy)
        return y.detach(), tuple(None if t is None else t.grad for t in (x, w, b))

    def __repr__(self):
        shapes = {n: tuple(t.shape) for n, t in zip("xw", (self.x, self.w), strict=True)}
        strides = {n: t.stride() for n, t in (("x", self.x), ("w", self.w), ("dy", self.dy))}
        return (
            f"Case({self.dims}d, {shapes}, bias={self.b is not None}, {self.geometry}, strides="
            f"{strides}, dtype={self.x.dtype}, rate={self.drop_rate}, needs={self.needs})"
        )


KINDS = ("full", "grouped", "depthwise", "depthwise_wide", "multiplier")
PADDINGS = ("numbers", "numbers", "same", "valid")
LAYOUTS = ("contiguous", "channels_last", "transposed", "strided")
RATES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.8, 0.99]) | st.floats(0.0, 0.999)


@st.composite
def channels(draw):
    """(C_in, C_out, groups) of every kind that nn.ConvNd knows."""
    kind = draw(st.sampled_from(KINDS))
    if kind == "full":
        return draw(st.integers(1, 6)), draw(st.integers(1, 12)), 1
    g = draw(st.integers(2, 4))
    if kind == "grouped":
        return g * draw(st.integers(1, 3)), g * draw(st.integers(2, 5)), g
    if kind == "depthwise":
        return g + 2, g + 2, g + 2
    if kind == "depthwise_wide":
        return g * draw(st.integers(2, 3)), g, g
    return g, g * draw(st.integers(2, 4)), g


@st.composite
def sizes(draw, dims, least, most):
    """A number or a tuple, as convolutions take them; and the tuple."""
    if draw(st.booleans()):
        n = draw(st.integers(least, most))
        return n, (n,) * dims
    values = tuple(draw(st.integers(least, most)) for _ in range(dims))
    return values, values


def laid_out(t, layout, dims):
    """t in another memory layout; same values."""
    if layout == "channels_last" and t.dim() == dims + 2 and dims > 1:
        return t.contiguous(memory_format=CHANNELS_LAST[dims])
    if layout == "transposed":
        return t.transpose(-1, 0).contiguous().transpose(-1, 0)
    if layout == "strided":
        return torch.stack([t, t + 1], dim=-1)[..., 0]
    return t.contiguous()


@st.composite
def cases(draw, dtype=torch.float64, drop_rates=RATES, pointwise=False):
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    c_in, c_out, groups = draw(channels())
    kernel = tuple(draw(st.integers(1, 4 if dims < 3 else 3)) for _ in range(dims))
    if pointwise:
        groups, kernel = 1, (1,) * dims
    dilation, dilations = draw(sizes(dims, 1, 2))
    padding = draw(st.sampled_from(["same", "valid"] if pointwise else PADDINGS))
    stride = 1 if padding == "same" else draw(sizes(dims, 1, 3))[0]
    if padding == "numbers":
        padding, pads = draw(sizes(dims, 0, 2))
    else:
        pads = (0,) * dims
    extents = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    size = [
        max(1, e - 2 * p + draw(st.integers(0, 5 if dims < 3 else 2)))
        for e, p in zip(extents, pads, strict=True)
    ]
    batch = draw(st.sampled_from([1, 2, 3, None]))
    bias = draw(st.booleans())
    needs = draw(
        st.tuples(st.booleans(), st.booleans(), st.booleans() if bias else st.just(False)).filter(
            any
        )
    )
    layouts = st.sampled_from(["contiguous", *LAYOUTS])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    randn = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
    x = randn(*(() if batch is None else (batch,)), c_in, *size)
    w = randn(c_out, c_in // groups, *kernel)
    b = randn(c_out) if bias else None
    x, w = laid_out(x, draw(layouts), dims), laid_out(w, draw(layouts), dims)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    dy = randn(oracle.CONV[dims](x, w, **geometry).shape)
    assume(_torch_is_right(dims, x, w, dy, geometry))
    x, w, b = (None if t is None else t.to(dtype) for t in (x, w, b))
    if draw(st.booleans()):  # heavy tails: what is large by its mean is not by its maximum
        dy = dy**3
    dy = laid_out(dy.to(dtype), draw(layouts), dims)
    case = Case(dims, x, w, b, dy, geometry, draw(drop_rates), needs)
    assume(case.choice().gap > 1e-6)  # a tie may be broken either way
    return case


def _torch_is_right(dims, x, w, dy, geometry):
    """Whether the dense gradient is what it is for contiguous tensors.

    It is not for groups over input such as (1, 4, 1, 2) of strides (1, 1, 1, 4) (torch 2.15, CPU).
    """
    leaves = [t.detach().requires_grad_() for t in (x, w)]
    oracle.CONV[dims](*leaves, **geometry).backward(dy)
    plain = [t.contiguous() for t in (x, w)]
    everything = torch.ones(len(w), dtype=torch.bool)
    right = oracle.gradients(*plain, None, dy.contiguous(), everything, **geometry)
    return all(
        torch.allclose(t.grad, grad) for t, grad in zip(leaves, right[:2], strict=True)
    )


def assert_close(actual, expected, rtol=1e-10, what=""):
    """Within ``rtol`` of the largest entry."""
    if expected is None or actual is None:
        assert actual is expected is None, what
        return
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    if expected.numel() == 0:
        return
    error = (actual - expected).abs().max().item()
    assert error <= rtol * expected.abs().max().item(), f"{what}: off by {error:g}"


def dropped_inputs(case, keep):
    """Input channels of a depthwise convolution whose group was dropped."""
    per_group = case.x.shape[-case.dims - 1] // case.groups
    return (~keep).repeat_interleave(per_group)


# --- the whole function, in float64 -----------------------------------------------------------


@settings(max_examples=500)
@given(cases())
def test_forward_is_bit_identical_and_gradients_equal_the_oracle(case):
    y, grads = case.run()
    dense = oracle.CONV[case.dims](case.x, case.w, case.b, **case.geometry)
    assert torch.equal(y, dense)
    assert _strides(y) == _strides(dense)

    keep = case.choice().keep
    assert keep.sum() == kept_channels(
        selectable_channels(len(keep), case.groups), case.drop_rate
    ) * (1 if case.groups in (1, len(keep)) else case.groups)
    for name, grad, expected in zip("xwb", grads, case.expected(keep), strict=True):
        assert_close(grad, expected, what=f"d{name} of {case}")
    dx, dw, db = grads
    if dw is not None:
        assert (dw[~keep] == 0).all()
    if db is not None:
        assert (db[~keep] == 0).all()
    if dx is not None and case.groups > 1 and case.groups == len(keep):
        assert (dx.movedim(-case.dims - 1, 0)[dropped_inputs(case, keep)] == 0).all()


@settings(max_examples=150)
@given(cases())
def test_gradients_have_the_strides_of_their_parameters(case):
    _, grads = case.run()
    for t, grad in zip((case.x, case.w, case.b), grads, strict=True):
        if grad is None:
            continue
        assert not grad.is_sparse
        if _is_dense_in_memory(t):
            assert _strides(grad) == _strides(t), case


def _strides(t):
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def _is_dense_in_memory(t):
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def by(kernel):
    """Have every sparse backward computed in one way."""
    return mock.patch.object(kernels, "choose", lambda *args: Ways(kernel, kernel))


def by_each():
    """Yield contexts in which the ways that a convolution has are used in turn, and those used."""

    def choose(kept, need_x, need_w, turn):
        dx, dw = possible(kept.whole_x, kept.whole_w, kept.p)
        used.append(Ways(dx[turn % len(dx)], dw[turn % len(dw)]))
        return used[-1]

    for turn in range(max(len(DX), len(DW))):
        used = []
        with mock.patch.object(kernels, "choose", functools.partial(choose, turn=turn)):
            yield used


def assert_as_oracle(case, how):
    _, grads = case.run()
    for name, grad, expected in zip("xwb", grads, case.expected(case.choice().keep), strict=True):
        assert_close(grad, expected, what=f"d{name} of {case} by {how}")
    return grads


@pytest.mark.parametrize("kernel", ["gather", "mask"])
@settings(max_examples=150)
@given(cases(drop_rates=st.floats(0.2, 0.95)))
def test_the_way_of_computing_never_changes_the_gradient(kernel, case):
    with by(kernel):
        assert_as_oracle(case, kernel)


@settings(max_examples=150)
@given(cases(drop_rates=st.floats(0.2, 0.95)))
def test_no_way_that_a_convolution_has_changes_the_gradient(case):
    for used in by_each():
        assert_as_oracle(case, used)


@settings(max_examples=150)
@given(cases(drop_rates=st.floats(0.2, 0.95), pointwise=True))
def test_1x1_convolutions_as_matrix_products_have_the_same_gradient(case):
    with by("matmul"):
        assert_as_oracle(case, "matmul")


REAL = {
    "full": (24, 40, 1),
    "wide": (20, 176, 1),
    "grouped": (32, 48, 4),
    "depthwise": (40, 40, 40),
    "depthwise_wide": (40, 20, 20),
    "multiplier": (20, 40, 20),
}


def real_case(kind, layout, kernel_size, stride, spatial, dtype=torch.float64):
    c_in, c_out, groups = REAL[kind]
    geometry = {"padding": kernel_size // 2, "stride": stride, "dilation": 1, "groups": groups}
    x = torch.randn(4, c_in, spatial, spatial, dtype=dtype)
    w = torch.randn(c_out, c_in // groups, kernel_size, kernel_size, dtype=dtype)
    b = torch.randn(c_out, dtype=dtype)
    dy = torch.randn(F.conv2d(x, w, **geometry).shape, dtype=dtype)
    x, dy = laid_out(x, layout, 2), laid_out(dy, layout, 2)
    case = Case(2, x, w, b, dy, geometry, 0.8, (True, True, True))
    assert case.choice().gap > 1e-9
    return case


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("stride, spatial", [(1, 1), (1, 7), (1, 24), (2, 7), (2, 8)])
def test_sizes_of_real_layers(kind, layout, kernel_size, stride, spatial):
    case = real_case(kind, layout, kernel_size, stride, spatial)
    _, grads = case.run()
    for name, grad, expected in zip("xwb", grads, case.expected(case.choice().keep), strict=True):
        assert_close(grad, expected, what=f"d{name}")
    for t, grad in zip((case.x, case.w), grads[:2], strict=True):
        assert _strides(grad) == _strides(t)


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel_size, stride", [(1, 1), (1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("spatial", [1, 9])
def test_every_way_of_real_layers(kind, layout, kernel_size, stride, spatial):
    case = real_case(kind, layout, kernel_size, stride, spatial)
    for used in by_each():
        grads = assert_as_oracle(case, used)
        for t, grad in zip((case.x, case.w), grads[:2], strict=True):
            assert _strides(grad) == _strides(t), used


def test_every_way_there_is_is_tried_by_these_layers():
    tried = []
    for kind, spatial in (("full", 1), ("full", 9), ("grouped", 9)):
        for used in by_each():
            real_case(kind, "contiguous", 1, 1, spatial).run()
            tried += used
    assert {ways.dx for ways in tried} == set(DX)
    assert {ways.dw for ways in tried} == set(DW)


# --- the choice -------------------------------------------------------------------------------


@given(st.integers(1, 4096), st.floats(0.0, 1.0, exclude_max=True))
@example(5, 0.8)
@example(1, 0.999)
@example(2, 0.75)
@example(10**9, 1 - 2**-53)
def test_number_of_kept_channels(channels, drop_rate):
    k = kept_channels(channels, drop_rate)
    assert isinstance(k, int)
    assert k == oracle.number_kept(channels, drop_rate)
    assert 1 <= k <= channels
    exact = (1 - drop_rate) * channels
    assert k == 1 if exact < 0.5 else abs(k - exact) <= 0.5
    assert k >= kept_channels(channels, min(math.nextafter(1, 0), drop_rate + 0.1))


@pytest.mark.parametrize(
    "channels, drop_rate, k",
    [
        (64, 0.0, 64), (64, 0.8, 13), (10, 0.8, 2), (5, 0.5, 3), (7, 0.5, 4), (3, 0.5, 2),
        (4, 0.875, 1), (4, 0.9, 1), (1, 0.9, 1), (100, 0.999, 1), (100, 0.004, 100),
        (100, 0.006, 99), (6, 0.75, 2), (2, 0.75, 1),
    ],
)  # fmt: skip
def test_number_of_kept_channels_rounds_half_up_and_never_to_none(channels, drop_rate, k):
    assert kept_channels(channels, drop_rate) == k


@pytest.mark.parametrize("groups, channels", [(1, 9), (3, 9), (9, 9)])
def test_the_channels_one_choice_is_made_from(groups, channels):
    assert selectable_channels(channels, groups) == (3 if groups == 3 else 9)


def test_importance_is_the_mean_magnitude_not_the_sum_the_maximum_or_the_energy():
    dy = torch.zeros(2, 4, 4, dtype=torch.float64)
    dy[:, 0] = torch.tensor([3.0, -3.0, 3.0, -3.0])  # sum 0, mean magnitude 3
    dy[:, 1] = 1.0  # sum 8
    dy[0, 2, 0] = 16.0  # maximum and energy, mean magnitude 2; one example only
    x, w = torch.randn(2, 2, 4, dtype=torch.float64), torch.randn(4, 2, 1, dtype=torch.float64)
    w.requires_grad_()
    functional.conv1d(x, w, drop_rate=0.75).backward(dy)
    assert [c for c in range(4) if w.grad[c].any()] == [0]


def test_grouped_convolutions_keep_as_many_channels_in_each_group():
    dy = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0]).view(1, 8, 1)  # group 0 is larger
    x, w = torch.ones(1, 4, 1), torch.ones(8, 2, 1, requires_grad=True)
    functional.conv1d(x, w, groups=2, drop_rate=0.5).backward(dy)
    assert [c for c in range(8) if w.grad[c].any()] == [0, 1, 6, 7]


def test_depthwise_convolutions_choose_among_the_groups():
    dy = torch.tensor([1.0, 5.0, 2.0, 4.0]).view(1, 4, 1)
    x, w = torch.ones(1, 4, 1, requires_grad=True), torch.ones(4, 1, 1, requires_grad=True)
    functional.conv1d(x, w, groups=4, drop_rate=0.5).backward(dy)
    assert [c for c in range(4) if w.grad[c].any()] == [1, 3]
    assert x.grad.flatten().tolist() == [0, 5, 0, 4]


@settings(max_examples=60)
@given(cases(drop_rates=st.floats(0.2, 0.95)))
def test_a_gradient_that_is_the_same_everywhere_keeps_k(case):
    # y.sum().backward(): an expanded dy, all channels tie, and any k of them are right.
    x, w, b = case.leaves()
    w.requires_grad_()
    y = SSP[case.dims](x, w, b, **case.geometry, drop_rate=case.drop_rate)
    y.sum().backward()
    keep = (w.grad != 0).flatten(1).any(1)
    for among in oracle.choices(len(keep), case.groups):
        assert sum(keep[c].item() for c in among) <= oracle.number_kept(len(among), case.drop_rate)
    dy = torch.ones_like(case.dy)
    expected = oracle.gradients(case.x, case.w, case.b, dy, keep, **case.geometry)
    assert_close(w.grad, expected[1])
    if x.requires_grad:
        assert_close(x.grad, expected[0])


def test_no_rescaling():
    # With one channel that carries everything, sparse and dense gradients are the same numbers.
    x, w = torch.randn(2, 3, 5, 5), torch.randn(8, 3, 3, 3)
    dy = torch.zeros(2, 8, 3, 3)
    dy[:, 5] = torch.randn(2, 3, 3)
    grads = []
    for rate in (0.0, 0.8):
        leaf = w.clone().requires_grad_()
        functional.conv2d(x, leaf, drop_rate=rate).backward(dy)
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


# --- dense ------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(cases(drop_rates=st.just(0.0)))
def test_rate_zero_is_the_dense_convolution_bit_for_bit(case):
    y, grads = case.run()
    x, w, b = case.leaves()
    dense = oracle.CONV[case.dims](x, w, b, **case.geometry)
    dense.backward(case.dy)
    assert torch.equal(y, dense)
    for grad, leaf in zip(grads, (x, w, b), strict=True):
        assert grad is None if leaf is None or leaf.grad is None else torch.equal(grad, leaf.grad)


@pytest.mark.parametrize(
    "why, shape, groups, rate",
    [("k is all", (8, 4, 3, 3), 1, 0.05), ("one channel", (1, 4, 3, 3), 1, 0.9),
     ("groups of two, both kept", (8, 1, 3, 3), 4, 0.2)],
)  # fmt: skip
def test_the_dense_code_path_where_every_channel_is_kept(why, shape, groups, rate):
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    y = functional.conv2d(x, torch.randn(shape), groups=groups, drop_rate=rate)
    assert type(y.grad_fn).__name__ == "ConvolutionBackward0", why


def test_the_dense_code_path_where_nobody_wants_a_gradient():
    x, w = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3)
    with mock.patch.object(functional, "sparse", side_effect=AssertionError):
        assert functional.conv2d(x, w, drop_rate=0.8).grad_fn is None
        with torch.no_grad():
            functional.conv2d(x, w.requires_grad_(), drop_rate=0.8)
        with torch.inference_mode():
            functional.conv2d(x, w, drop_rate=0.8)


def test_the_sparse_code_path_otherwise():
    y = functional.conv2d(torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3).requires_grad_(),
                          drop_rate=0.8)  # fmt: skip
    assert type(y.grad_fn).__name__ != "ConvolutionBackward0"


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel_size, stride", [(3, 1), (1, 2)])
def test_empty_batch(dims, groups, kernel_size, stride):
    x = torch.randn(0, 4, *[5] * dims, requires_grad=True)
    w = torch.randn(4, 4 // groups, *[kernel_size] * dims, requires_grad=True)
    b = torch.randn(4, requires_grad=True)
    y = SSP[dims](x, w, b, stride=stride, groups=groups, drop_rate=0.5)
    assert y.shape == oracle.CONV[dims](x, w, b, stride=stride, groups=groups).shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert w.grad.shape == w.shape and not w.grad.any()
    assert b.grad.shape == b.shape and not b.grad.any()


@pytest.mark.parametrize("selection", ["l1", "l2", "random"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_nothing_waits_for_the_device(groups, layout, selection):
    # Fake tensors have shapes and no values: reading one (.item(), nonzero(), a[mask]) raises.
    with FakeTensorMode():
        x, w, b, dy = _layer(groups, layout)
        y = functional.conv2d(x, w, b, groups=groups, drop_rate=0.5, selection=selection)
        y.backward(dy)
    for t in (x, w, b):
        assert t.grad.shape == t.shape and _strides(t.grad) == _strides(t)


@functools.cache
def _torch_fakes_cuda(dtype, groups, layout):
    """Whether torch's own backward can be run so: of some layers not without a GPU in torch 2.6."""
    params = ConvParams((1, 1), (0, 0), (1, 1), groups)
    try:
        with FakeTensorMode():
            x, w, _, dy = (t.detach().to("cuda:0", dtype) for t in _layer(groups, layout))
            dense_backward(dy, x, w, params, (True, True, True))
    except RuntimeError as error:
        return "CUDA driver" not in str(error)
    return True


@pytest.mark.parametrize("scores", [l1_scores, l2_scores, random_scores])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_runs_on_a_gpu_waits_for_nothing(dtype, groups, layout, scores):
    # As above, of the code for CUDA; autograd itself needs a device that is there.
    if not _torch_fakes_cuda(dtype, groups, layout):
        pytest.skip("this torch fakes no convolution on CUDA without a driver")
    params = ConvParams((1, 1), (0, 0), (1, 1), groups)
    with FakeTensorMode():
        x, w, b, dy = (t.detach().to("cuda:0", dtype) for t in _layer(groups, layout))
        grads = sparse_backward(dy, x, w, params, 2, scores, (True, True, True))
    for like, grad in zip((x, w, b), grads, strict=True):
        assert grad.shape == like.shape and grad.dtype == dtype and grad.device == x.device


def test_tensors_without_memory_pass_as_through_the_dense_convolution():
    x, w = torch.randn(2, 4, 6, 6, device="meta"), torch.randn(8, 4, 3, 3, device="meta")
    w.requires_grad_()
    y = functional.conv2d(x, w, drop_rate=0.5)
    assert y.shape == F.conv2d(x, w).shape
    y.sum().backward()
    assert w.grad.shape == w.shape


# --- nan and inf ------------------------------------------------------------------------------

LAYERS = [(1, "contiguous"), (1, "channels_last"), (2, "contiguous"), (2, "channels_last"),
          (8, "contiguous"), (8, "channels_last")]  # fmt: skip


def _layer(groups, layout, dtype=torch.float32):
    x = laid_out(torch.randn(2, 8, 5, 5, dtype=dtype), layout, 2).requires_grad_()
    w = torch.randn(8, 8 // groups, 3, 3, dtype=dtype, requires_grad=True)
    b = torch.randn(8, dtype=dtype, requires_grad=True)
    dy = laid_out(torch.randn(2, 8, 3, 3, dtype=dtype), layout, 2)
    return x, w, b, dy


@pytest.mark.parametrize("scores", [l1_scores, random_scores])
@pytest.mark.parametrize("groups, layout", LAYERS)
def test_a_gradient_of_another_dtype_is_torchs_error(groups, layout, scores):
    # C functions would read it as what it is not.
    x, w, _, dy = (t.detach() for t in _layer(groups, layout))
    params = ConvParams((1, 1), (0, 0), (1, 1), groups)
    with pytest.raises(RuntimeError, match="float|Double"):
        sparse_backward(dy.double(), x, w, params, 2, scores, (True, True, False))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("selection", ["l1", "l2"])
@pytest.mark.parametrize("groups, layout", LAYERS)
def test_a_channel_with_nan_or_inf_is_kept_so_that_a_grad_scaler_sees_it(
    groups, layout, selection, bad
):
    x, w, b, dy = _layer(groups, layout)
    dy = dy * 0.1
    dy[1, 6, 1, 1] = bad
    y = functional.conv2d(x, w, b, groups=groups, drop_rate=0.75, selection=selection)
    y.backward(dy)
    for t in (w, b, x):
        assert not t.grad.isfinite().all()
    others = [c for c in range(8) if c != 6]
    assert w.grad[others].isfinite().all() and b.grad[others].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("groups, layout", LAYERS)
def test_what_a_dropped_channel_holds_never_leaks(groups, layout, bad):
    # Only a selection of one's own can drop such a channel; then 0 * inf must not appear.
    x, w, b, dy = _layer(groups, layout)
    scores = torch.tensor([0.0, 9, 8, 1, 7, 0, 9, 0])  # two of each four
    dy[:, 3] = bad
    y = functional.conv2d(x, w, b, groups=groups, drop_rate=0.5, selection=lambda dy: scores)
    y.backward(dy)
    for t in (x, w, b):
        assert t.grad.isfinite().all()
    assert not w.grad[3].any() and b.grad[3] == 0


def test_overflow_in_half_precision_does_not_hide_in_the_score():
    # The sum of |dy| passes the largest float16, 65504, for both channels: still in order.
    dy = torch.full((1, 2, 10_000), 10.0, dtype=torch.float16)
    dy[:, 1] = 20
    w = torch.ones(2, 1, 1, dtype=torch.float16, requires_grad=True)
    x = torch.full((1, 1, 10_000), 1e-3, dtype=torch.float16)
    functional.conv1d(x, w, drop_rate=0.5).backward(dy)
    assert w.grad[0] == 0 and w.grad[1].isfinite().all() and w.grad[1] > 0


# --- other dtypes -----------------------------------------------------------------------------

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def assert_within_rounding(grads, case, keep, dtype):
    """Each entry as near to float64 as the size of its terms, or torch's own kernels, explain."""
    tensors = (case.x, case.w, case.b, case.dy)
    exact, bounds = (
        Case(case.dims, *(None if t is None else change(t.double()) for t in tensors),
             case.geometry, case.drop_rate, case.needs).expected(keep)
        for change in (torch.clone, torch.abs)
    )  # fmt: skip
    # Where the processor has no instructions for the dtype, torch rounds more often.
    dense = case.expected(keep)
    for name, grad, true, bound, torchs in zip("xwb", grads, exact, bounds, dense, strict=True):
        if true is None:
            assert grad is None
            continue
        assert grad.dtype == dtype
        tiny = torch.finfo(dtype).smallest_normal
        usual = ((torchs.double() - true).abs() / (bound + tiny)).max()
        # Half precision is summed in float32 and rounded at the end, float32 as it comes.
        roundings = 16 if dtype == torch.float32 else 2
        allowed = (roundings * EPS[dtype] + 2 * usual) * bound + tiny
        error = (grad.double() - true).abs()
        assert (error <= allowed).all(), f"d{name} of {case}: {(error / allowed).max():g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=100)
@given(st.data())
def test_other_dtypes(dtype, data):
    case = data.draw(cases(dtype=dtype))
    if dtype == torch.bfloat16 and case.dims == 3 and case.groups > 1:
        # torch's own dense weight gradient is garbage for channels_last_3d input (2.15, CPU).
        assume(case.x.is_contiguous() and case.w.is_contiguous())
    y, grads = case.run()
    assert torch.equal(y, oracle.CONV[case.dims](case.x, case.w, case.b, **case.geometry))
    assert_within_rounding(grads, case, case.choice().keep, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("kernel_size, stride", [(1, 1), (1, 2), (3, 1)])
def test_sizes_of_real_layers_in_other_dtypes(kind, layout, kernel_size, stride, dtype):
    case = real_case(kind, layout, kernel_size, stride, 12, dtype)
    _, grads = case.run()
    assert_within_rounding(grads, case, case.choice().keep, dtype)


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_wider_before_channels_are_compared(dtype, largest):
    # The two sums are 30 001 and 30 004, the same number in 8 or 11 bits.
    dy = torch.ones(1, 2, 30_001, dtype=dtype)
    dy[0, largest, :3] = 2
    x, w = torch.ones(1, 1, 30_001, dtype=dtype), torch.ones(2, 1, 1, dtype=dtype).requires_grad_()
    functional.conv1d(x, w, drop_rate=0.5).backward(dy)
    assert w.grad[largest] != 0 and w.grad[1 - largest] == 0


# --- autocast ---------------------------------------------------------------------------------


def _masked_reference(x, w, b, dy, keep, **geometry):
    """Output and gradients of the dense convolution, its dy masked; under the caller's autocast."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, w, b)]
    y = F.conv2d(*leaves, **geometry)
    y.backward(oracle.mask(dy, keep).to(y.dtype))
    return y.detach(), [None if t is None else t.grad for t in leaves]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups, layout", LAYERS)
@pytest.mark.parametrize("weight_dtype", [torch.float32, "half"], ids=str)
def test_autocast(half, groups, layout, weight_dtype):
    x, w, b, dy = _layer(groups, layout)
    if weight_dtype == "half":
        w, b = (t.detach().to(half).requires_grad_() for t in (w, b))
    dy = dy.to(half)
    choice = oracle.choose(dy, groups, 0.5)
    assert choice.gap > 1e-3
    with torch.autocast("cpu", dtype=half):
        y = functional.conv2d(x, w, b, groups=groups, drop_rate=0.5)
    y.backward(dy)
    with torch.autocast("cpu", dtype=half):
        dense, expected = _masked_reference(x, w, b, dy, choice.keep, groups=groups)
    assert y.dtype == half
    assert torch.equal(y, dense)
    for t, grad in zip((x, w, b), expected, strict=True):
        assert t.grad.dtype == t.dtype == grad.dtype
        torch.testing.assert_close(t.grad, grad, rtol=4 * EPS[half], atol=8 * EPS[half])
    assert not w.grad[~choice.keep].any() and not b.grad[~choice.keep].any()


def test_autocast_leaves_float64_alone():
    x, w, b, dy = _layer(1, "contiguous", torch.float64)
    choice = oracle.choose(dy, 1, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = functional.conv2d(x, w, b, drop_rate=0.5)
        assert y.dtype == torch.float64 == F.conv2d(x, w, b).dtype
        y.backward(dy)
    expected = oracle.gradients(x.detach(), w.detach(), b, dy, choice.keep)
    for t, grad in zip((x, w, b), expected, strict=True):
        assert_close(t.grad, grad)


def test_backward_inside_of_autocast_computes_as_outside():
    grads = []
    for inside in (False, True):
        torch.manual_seed(3)
        x, w, b, dy = _layer(1, "contiguous")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = functional.conv2d(x, w, b, drop_rate=0.5)
            if inside:
                y.backward(dy.bfloat16())
        if not inside:
            y.backward(dy.bfloat16())
        grads.append((x.grad, w.grad, b.grad))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_the_backward_is_out_of_reach_of_autocast_as_the_dense_one_is():
    seen = []

    def scores(dy):
        seen.append((torch.is_autocast_enabled("cpu"), torch.mm(dy[0, 0], dy[0, 0]).dtype))
        return dy.abs().sum((0, 2, 3))

    x, w, b, dy = _layer(1, "contiguous")
    y = functional.conv2d(x, w, b, drop_rate=0.5, selection=scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.backward(dy)
    assert seen == [(False, torch.float32)]


def test_a_float32_convolution_whose_backward_runs_inside_of_autocast_stays_float32():
    x, w, b, dy = _layer(1, "contiguous")
    y = functional.conv2d(x, w, b, drop_rate=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.backward(dy)
    keep = oracle.choose(dy, 1, 0.5).keep
    case = Case(2, x.detach(), w.detach(), b.detach(), dy, {"groups": 1}, 0.5, (True,) * 3)
    assert_within_rounding((x.grad, w.grad, b.grad), case, keep, torch.float32)


# --- higher derivatives -----------------------------------------------------------------------

SMALL = [
    (1, dict(groups=1), (2, 3, 6), (4, 3, 3)),
    (2, dict(groups=1, stride=2, padding=1), (2, 2, 5, 5), (4, 2, 3, 3)),
    (2, dict(groups=1, stride=2), (2, 3, 5, 4), (4, 3, 1, 1)),
    (2, dict(groups=2, padding="same"), (2, 4, 4, 4), (4, 2, 2, 3)),
    (2, dict(groups=4, dilation=2), (1, 4, 5, 5), (4, 1, 2, 2)),
    (2, dict(groups=4), (1, 8, 4, 4), (4, 2, 3, 3)),
    (3, dict(groups=1), (1, 2, 3, 3, 3), (4, 2, 2, 2, 2)),
]  # fmt: skip
KEPT = torch.tensor([False, True, True, False])


def _fixed(dy):
    return KEPT.to(dy.dtype)


def _small(x_shape, w_shape):
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True)
               for s in (x_shape, w_shape, w_shape[:1]))  # fmt: skip
    return x, w, b


@pytest.mark.parametrize("selection", ["l1", "l2", _fixed], ids=["l1", "l2", "fixed"])
@pytest.mark.parametrize("dims, geometry, x_shape, w_shape", SMALL)
def test_gradcheck_where_only_kept_channels_reach_the_loss(
    dims, geometry, x_shape, w_shape, selection
):
    # There the sparse gradient is the gradient; elsewhere it is not meant to be.
    def kept(x, w, b):
        return conv(x, w, b)[:, KEPT]

    def conv(x, w, b):
        return SSP[dims](x, w, b, **geometry, drop_rate=0.5, selection=selection)

    inputs = _small(x_shape, w_shape)
    assert torch.autograd.gradcheck(kept, inputs)
    if selection is _fixed:  # the check is not blind (by l1 and l2 the one entry it asks for wins)
        assert not torch.autograd.gradcheck(conv, inputs, raise_exception=False)


@pytest.mark.parametrize("dims, geometry, x_shape, w_shape", SMALL)
def test_double_backward_is_the_derivative_of_the_sparse_backward(
    dims, geometry, x_shape, w_shape
):
    # gradgradcheck differentiates (x, w, b, dy) -> (dX, dW, db) numerically.
    def conv(x, w, b):
        return SSP[dims](x, w, b, **geometry, drop_rate=0.5, selection=_fixed)

    assert torch.autograd.gradgradcheck(conv, _small(x_shape, w_shape))


@pytest.mark.parametrize("selection", ["l1", _fixed], ids=["l1", "fixed"])
@pytest.mark.parametrize("kernel", [None, "gather", "mask", "each"])
@pytest.mark.parametrize("dims, geometry, x_shape, w_shape", SMALL)
def test_gradient_penalty(dims, geometry, x_shape, w_shape, kernel, selection):
    inputs = _small(x_shape, w_shape)

    def penalty(conv):
        y = conv(*inputs)
        grads = torch.autograd.grad((y.tanh() * y.cos()).sum(), inputs, create_graph=True)
        loss = sum(g.pow(3).sum() for g in grads)
        return loss, torch.autograd.grad(loss, inputs)

    def sparse(x, w, b):
        return SSP[dims](x, w, b, **geometry, drop_rate=0.5, selection=selection)

    def choose_from(dy):
        if selection is _fixed:
            return KEPT
        choice = oracle.choose(dy, geometry["groups"], 0.5)
        assert choice.gap > 1e-6
        return choice.keep

    def masked(x, w, b):
        return oracle.conv(dims, x, w, b, **geometry, choose_from=choose_from)

    expected_loss, expected = penalty(masked)

    def check():
        loss, grads = penalty(sparse)
        assert_close(loss.detach(), expected_loss.detach())
        for grad, want in zip(grads, expected, strict=True):
            assert_close(grad, want)

    if kernel == "each":
        for _ in by_each():
            check()
    else:
        with contextlib.nullcontext() if kernel is None else by(kernel):
            check()


def test_autograd_grad_of_some_inputs_only():
    x, w, b = _small(*SMALL[1][2:])
    dy = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    choice = oracle.choose(dy, 1, 0.5)
    expected = oracle.gradients(x.detach(), w.detach(), b, dy, choice.keep, stride=2, padding=1)
    for i, t in enumerate((x, w, b)):
        y = functional.conv2d(x, w, b, stride=2, padding=1, drop_rate=0.5)
        (grad,) = torch.autograd.grad(y, t, dy)
        assert_close(grad, expected[i])


def test_backward_twice_through_a_retained_graph_accumulates():
    x, w, b = _small(*SMALL[1][2:])
    y = functional.conv2d(x, w, b, stride=2, padding=1, drop_rate=0.5)
    dy = torch.randn_like(y)
    y.backward(dy, retain_graph=True)
    once = w.grad.clone()
    y.backward(dy)
    assert torch.equal(w.grad, once + once)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)


def test_a_weight_changed_in_place_before_the_backward_is_an_error():
    x, w, b = _small(*SMALL[1][2:])
    y = functional.conv2d(x, w, b, drop_rate=0.5).sum()
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.backward()


# --- bad input --------------------------------------------------------------------------------


def _call(**kwargs):
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    return functional.conv2d(x, torch.randn(4, 2, 3, 3), **kwargs)


@pytest.mark.parametrize(
    "rate, error",
    [("0.5", TypeError), (None, TypeError), (True, TypeError), (False, TypeError),
     ([0.5], TypeError), (1j, TypeError), (math.nan, ValueError), (math.inf, ValueError),
     (-0.1, ValueError), (1.0, ValueError), (1, ValueError), (80, ValueError),
     (torch.tensor(math.nan), ValueError), (np.float64(1.5), ValueError)],
    ids=repr,
)  # fmt: skip
def test_bad_drop_rate(rate, error):
    with pytest.raises(error, match=r"drop_rate must be .*\[0, 1\)"):
        _call(drop_rate=rate)


def test_a_percentage_is_recognised():
    with pytest.raises(ValueError, match=r"not a percentage.* 0\.8"):
        _call(drop_rate=80)


@pytest.mark.parametrize("rate", [0, 0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
def test_numbers_of_other_libraries_are_rates(rate):
    assert _call(drop_rate=rate).shape == (1, 4, 3, 3)


@pytest.mark.parametrize("selection", ["L1", "l3", ""])
def test_unknown_selection_names_the_known_ones(selection):
    with pytest.raises(ValueError, match=r"l1.*l2.*random"):
        _call(drop_rate=0.5, selection=selection)


@pytest.mark.parametrize("selection", [None, 1])
def test_a_selection_that_is_neither_name_nor_callable(selection):
    with pytest.raises(TypeError, match=r"selection must be .*callable"):
        _call(drop_rate=0.5, selection=selection)


@pytest.mark.parametrize(
    "scores",
    [lambda dy: dy, lambda dy: dy.mean(), lambda dy: dy.mean((0, 2, 3))[:3], lambda dy: [1.0] * 4,
     lambda dy: None, lambda dy: dy.mean((0, 2, 3))[None]],
)  # fmt: skip
def test_a_selection_that_returns_the_wrong_shape(scores):
    y = _call(drop_rate=0.5, selection=scores)
    with pytest.raises(ValueError, match=r"one score per output channel.*\(4,\)"):
        y.sum().backward()


def test_complex_tensors():
    x = torch.randn(1, 2, 5, 5, dtype=torch.complex64, requires_grad=True)
    w = torch.randn(4, 2, 3, 3, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"real tensors.*drop_rate=0"):
        functional.conv2d(x, w, drop_rate=0.5)
    assert functional.conv2d(x, w, drop_rate=0).dtype == torch.complex64


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacrev", "vmap"])
def test_transforms_of_torch_func_are_refused_with_a_way_out(transform):
    x, w = torch.randn(1, 2, 5, 5), torch.randn(4, 2, 3, 3, requires_grad=True)

    def loss(x):
        return functional.conv2d(x, w, drop_rate=0.5).sum()

    call = {
        "grad": lambda: torch.func.grad(loss)(x),
        "vjp": lambda: torch.func.vjp(loss, x),
        "jvp": lambda: torch.func.jvp(loss, (x,), (x,)),
        "jacrev": lambda: torch.func.jacrev(loss)(x),
        "vmap": lambda: torch.func.vmap(loss)(x[None]),
    }[transform]
    with pytest.raises(RuntimeError, match=r"torch\.func.*dense\(model\).*drop_rate=0"):
        call()


def test_transforms_of_torch_func_work_at_rate_zero():
    x, w = torch.randn(1, 2, 5, 5), torch.randn(4, 2, 3, 3)
    grad = torch.func.grad(lambda w: functional.conv2d(x, w, drop_rate=0).sum())(w)
    torch.testing.assert_close(grad, torch.func.grad(lambda w: F.conv2d(x, w).sum())(w))


BAD_GEOMETRY = [
    ("length of stride", 2, (1, 2, 5, 5), (4, 2, 3, 3), {"stride": (1, 2, 3)}),
    ("zero stride", 2, (1, 2, 5, 5), (4, 2, 3, 3), {"stride": 0}),
    ("negative padding", 2, (1, 2, 5, 5), (4, 2, 3, 3), {"padding": -1}),
    ("padding word", 2, (1, 2, 5, 5), (4, 2, 3, 3), {"padding": "full"}),
    ("same with stride", 2, (1, 2, 5, 5), (4, 2, 3, 3), {"padding": "same", "stride": 2}),
    ("fractional stride", 2, (1, 2, 5, 5), (4, 2, 3, 3), {"stride": 1.5}),
    ("channels", 2, (1, 3, 5, 5), (4, 2, 3, 3), {}),
    ("groups", 2, (1, 2, 5, 5), (4, 1, 3, 3), {"groups": 3}),
    ("no groups", 2, (1, 2, 5, 5), (4, 1, 3, 3), {"groups": 0}),
    ("kernel", 2, (1, 2, 2, 2), (4, 2, 3, 3), {}),
    ("too few dimensions", 2, (5, 5), (4, 2, 3, 3), {}),
    ("too many dimensions", 2, (1, 1, 2, 5, 5), (4, 2, 3, 3), {}),
    ("images in conv1d", 1, (1, 2, 5, 5), (4, 2, 3, 3), {}),
    ("volumes in conv2d", 2, (1, 2, 5, 5, 5), (4, 2, 3, 3, 3), {}),
]


@pytest.mark.parametrize(
    "dims, x, w, geometry", [g[1:] for g in BAD_GEOMETRY], ids=[g[0] for g in BAD_GEOMETRY]
)
def test_what_the_dense_convolution_refuses_is_refused(dims, x, w, geometry):
    x, w = torch.randn(x, requires_grad=True), torch.randn(w)
    errors = (RuntimeError, TypeError, ValueError)
    with pytest.raises(errors):
        oracle.CONV[dims](x, w, **geometry)
    with pytest.raises(errors):
        SSP[dims](x, w, **geometry, drop_rate=0.5)


@pytest.mark.parametrize(
    "geometry",
    [{"stride": np.int64(2)}, {"padding": np.int64(1)}, {"stride": [2]}, {"stride": [2, 1]},
     {"stride": torch.Size([2, 2])}, {"padding": (np.int64(1), 2)}],
    ids=repr,
)  # fmt: skip
def test_sizes_in_every_form_that_the_dense_convolution_takes(geometry):
    x, w = torch.randn(2, 2, 5, 5), torch.randn(4, 2, 3, 3, requires_grad=True)
    expected = F.conv2d(x, w, **geometry)
    y = functional.conv2d(x, w, **geometry, drop_rate=0.5)
    assert torch.equal(y, expected)
    y.backward(torch.randn_like(y))


def test_positional_arguments_are_those_of_the_dense_convolution():
    x, w, b = torch.randn(2, 4, 9, 9), torch.randn(4, 2, 3, 3, requires_grad=True), torch.randn(4)
    arguments = (x, w, b, 2, 1, 2, 2)
    assert torch.equal(functional.conv2d(*arguments, drop_rate=0.5), F.conv2d(*arguments))
