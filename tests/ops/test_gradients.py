"""The gradients of a sparse convolution equal the oracle's, by every way of computing them."""

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssprop_patch.core.selection import kept_channels, selectable_channels
from ssprop_patch.ops.algorithms import DW, DX

from .convolutions import REAL, _strides, assert_close, by, by_each, cases, real_case

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # by torch.func itself
]


def dropped_inputs(case, keep):
    """Input channels of a depthwise convolution whose group was dropped."""
    per_group = case.x.shape[-case.dims - 1] // case.groups
    return (~keep).repeat_interleave(per_group)


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


def _is_dense_in_memory(t):
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


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
