"""Which convolutions take the dense path, and that no path waits for the device."""

import functools
from unittest import mock

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ssprop_patch import functional
from ssprop_patch.core.geometry import ConvParams
from ssprop_patch.core.reference import dense_backward
from ssprop_patch.core.rule import BackwardRule
from ssprop_patch.core.selection import l1_scores, l2_scores, random_scores
from ssprop_patch.ops.backward import sparse_backward

from .convolutions import SSP, _layer, _strides, cases

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # by torch.func itself
]


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
    [
        ("k is all", (8, 4, 3, 3), 1, 0.05),
        ("one channel", (1, 4, 3, 3), 1, 0.9),
        ("groups of two, both kept", (8, 1, 3, 3), 4, 0.2),
    ],
)
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
    y = functional.conv2d(
        torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3).requires_grad_(), drop_rate=0.8
    )
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
        grads = sparse_backward(dy, x, w, params, 2, BackwardRule(scores), (True, True, True))
    for like, grad in zip((x, w, b), grads, strict=True):
        assert grad.shape == like.shape and grad.dtype == dtype and grad.device == x.device


def test_tensors_without_memory_pass_as_through_the_dense_convolution():
    x, w = torch.randn(2, 4, 6, 6, device="meta"), torch.randn(8, 4, 3, 3, device="meta")
    w.requires_grad_()
    y = functional.conv2d(x, w, drop_rate=0.5)
    assert y.shape == F.conv2d(x, w).shape
    y.sum().backward()
    assert w.grad.shape == w.shape
