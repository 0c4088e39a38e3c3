"""Sums over each channel against plain torch in float64."""

import pytest
import torch

from ssprop_patch.ops import triton_kernels

from .places import (
    accumulator,
    by_torch,
    everywhere,
    norm_case,
    over_layouts,
    over_shapes_and_dtypes,
    tensor,
)


def per_channel(t):
    return t.sum([0, *range(2, t.dim())])


def assert_sums(got, expected, terms):
    """Compare sums, exactly to the rounding of sums of the sizes of ``terms``."""
    assert got.dtype == accumulator(terms.dtype)
    unit = 1e-14 if got.dtype == torch.float64 else 4e-6
    error = (got.double() - expected.to(got.device)).abs()
    assert (error <= unit * per_channel(terms.double().abs())).all(), error


@over_shapes_and_dtypes
@over_layouts
@pytest.mark.parametrize("order", [1, 2])
def test_channel_sums(run, shape, memory_format, dtype, order):
    dy = tensor(run, shape, dtype, memory_format)
    terms = dy.double().abs() ** order
    sums = run(triton_kernels.channel_sums, dy, order)
    assert sums.shape == shape[1:2]
    assert_sums(sums, per_channel(terms), terms.to(dy.dtype))


@everywhere
def test_channel_sums_do_not_overflow_or_stick_in_half_precision(run):
    dy = torch.full((3, 2, 5000), 100.0, dtype=torch.float16, device=run.device)
    assert run(triton_kernels.channel_sums, dy, 2).tolist() == [1.5e8] * 2


@everywhere
def test_channel_sums_keep_a_nan_and_an_infinity_in_their_channels(run):
    dy = tensor(run, (2, 4, 9), torch.float32)
    dy[1, 1, 3], dy[0, 2, 8] = float("nan"), float("-inf")
    sums = run(triton_kernels.channel_sums, dy, 1)
    assert sums.isnan().tolist() == [False, True, False, False]
    assert sums.isinf().tolist() == [False, False, True, False]


@over_shapes_and_dtypes
@over_layouts
@pytest.mark.parametrize("relu", [False, True])
def test_norm_sums(run, shape, memory_format, relu, dtype):
    arguments, passed = norm_case(run, shape, dtype, memory_format, relu)
    _, y, mean, invstd, _ = arguments
    sum_dz, sum_dz_xhat, sum_dz2 = run(triton_kernels.norm_sums, *arguments)
    _, weight_grad, bias_grad = by_torch(passed, y, None, mean, invstd)
    assert_sums(sum_dz, bias_grad, passed)
    assert_sums(sum_dz2, per_channel(passed.double() ** 2), passed**2)
    one = [1, -1, *[1] * (y.dim() - 2)]
    xhat = (y.double() - mean.double().view(one)) * invstd.double().view(one)
    assert_sums(sum_dz_xhat, weight_grad, (passed.double() * xhat).to(dtype))


@over_shapes_and_dtypes
@over_layouts
@pytest.mark.parametrize("relu", [False, True])
def test_norm_grad_sums(run, shape, memory_format, relu, dtype):
    (dz, y, mean, invstd, relu_out), passed = norm_case(run, shape, dtype, memory_format, relu)
    dy, sum_dz_xhat, sum_dz = (g.to(run.device) for g in by_torch(passed, y, None, mean, invstd))
    sums = sum_dz.to(mean.dtype), sum_dz_xhat.to(mean.dtype)
    got = run(triton_kernels.norm_grad_sums, dz, y, mean, invstd, *sums, relu_out)
    assert got.dtype == accumulator(dtype) and got.shape == shape[1:2]
    # Of what each element is computed of, however much of it cancels.
    unit = 1e-13 if dtype == torch.float64 else 4e-6
    size = invstd.double() * per_channel(dz.double().abs() + 1)
    assert ((got.double() - per_channel(dy.abs())).abs() <= unit * size).all()


@everywhere
def test_a_gradient_that_lies_otherwise_than_the_input(run):
    (dz, y, mean, invstd, _), passed = norm_case(
        run, (2, 9, 5, 4), torch.float32, "channels_last", False
    )
    _, weight_grad, _ = by_torch(passed, y, None, mean, invstd)
    dz = dz.contiguous()
    sums = run(triton_kernels.norm_sums, dz, y, mean, invstd)
    torch.testing.assert_close(sums[1].cpu().double(), weight_grad, rtol=1e-5, atol=1e-5)
    relu_out = torch.ones(1, device=run.device).expand_as(y)  # no memory format at all
    again = run(triton_kernels.norm_sums, dz, y, mean, invstd, relu_out)
    assert torch.equal(again[1], sums[1])


@everywhere
def test_a_gradient_passes_where_the_output_of_the_relu_is_nan(run):
    (dz, y, mean, invstd, _), _ = norm_case(run, (2, 3, 5), torch.float32, "contiguous", False)
    relu_out = torch.tensor([0.0, 1.0, float("nan")], device=run.device).view(1, 3, 1).expand_as(y)
    expected = torch.ops.aten.threshold_backward(dz, relu_out, 0)
    sum_dz, _, _ = run(triton_kernels.norm_sums, dz, y, mean, invstd, relu_out)
    torch.testing.assert_close(sum_dz, per_channel(expected))
