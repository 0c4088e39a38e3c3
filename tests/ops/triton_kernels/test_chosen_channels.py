"""Kernels over a choice of channels against plain torch in float64."""

import pytest
import torch

from ssprop_patch.ops import triton_kernels

from .places import (
    by_torch,
    everywhere,
    norm_case,
    over_layouts,
    over_shapes_and_dtypes,
    some_channels,
    tensor,
)


def assert_lies_like(got, t):
    assert got.is_contiguous() if t.is_contiguous() else got.movedim(1, -1).is_contiguous()


@over_shapes_and_dtypes
@over_layouts
def test_take_channels(run, shape, memory_format, dtype):
    t = tensor(run, shape, dtype, memory_format)
    index = some_channels(run, shape[1])
    taken = run(triton_kernels.take_channels, t, index)
    assert torch.equal(taken, t[:, index])
    assert taken.dtype == dtype
    assert_lies_like(taken, t)


@everywhere
@over_layouts
def test_more_channels_than_there_are(run, memory_format):
    t = tensor(run, (3, 2, 9, 9), torch.float32, memory_format)
    index = torch.tensor([1, 1, 0] * 30, device=run.device)
    assert torch.equal(run(triton_kernels.take_channels, t, index), t[:, index])


@everywhere
def test_part_of_a_larger_tensor(run):
    whole = tensor(run, (5, 12, 7), torch.bfloat16)
    index = some_channels(run, 12)
    assert torch.equal(run(triton_kernels.take_channels, whole[1:], index), whole[1:, index])


@over_shapes_and_dtypes
@over_layouts
@pytest.mark.parametrize("relu", [False, True])
def test_norm_input_grad(run, shape, memory_format, relu, dtype):
    (dz, y, mean, invstd, relu_out), passed = norm_case(run, shape, dtype, memory_format, relu)
    weight = torch.rand(shape[1], dtype=mean.dtype, device=run.device) - 0.5 if relu else None
    expected, sum_dz_xhat, sum_dz = (
        g.to(run.device) for g in by_torch(passed, y, weight, mean, invstd)
    )
    index = some_channels(run, shape[1])
    sums = sum_dz.to(mean.dtype), sum_dz_xhat.to(mean.dtype)
    dy = run(triton_kernels.norm_input_grad, dz, y, weight, mean, invstd, *sums, index, relu_out)
    assert dy.dtype == dtype
    assert_lies_like(dy, y)
    # The result is rounded once; what it is computed of, relative to the largest of its parts.
    unit = 1e-13 if dtype == torch.float64 else 2e-6
    size = (invstd.double() * (dz.double().abs().max() + 1)).max()
    rounding = torch.finfo(dtype).eps * expected[:, index].abs()
    assert ((dy.double() - expected[:, index]).abs() <= rounding + unit * size).all()
