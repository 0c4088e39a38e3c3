"""The backward of batch norm in C against autograd in float64."""

import math

import pytest
import torch
from native_checks import SHAPES, assert_close, each_case, lying, needs_compiler, random

from ssprop_patch.core.cells import Cells
from ssprop_patch.ops import native


class Norm:
    """One batch norm in training mode, a ReLU behind it or not: its backward by autograd."""

    def __init__(self, shape, dtype, last, affine=True, relu=False):
        self.x, self.dz = (random(shape, dtype, last, seed) for seed in (1, 2))
        self.relu_out = random(shape, dtype, last, 4).relu() if relu else None
        dz = self.dz.double()
        if relu:
            dz = torch.where(self.relu_out > 0, dz, 0)
        self.weight = random((1, shape[1]), dtype, False, 3)[0] if affine else None
        x = self.x.double().requires_grad_()
        dims = [0, *range(2, x.dim())]
        self.mean = x.mean(dims).detach()
        self.invstd = (x.var(dims, unbiased=False) + 1e-3).rsqrt().detach()
        weight = None if self.weight is None else self.weight.double()
        z = torch.nn.functional.batch_norm(x, None, None, weight, training=True, eps=1e-3)
        (self.dy,) = torch.autograd.grad(z, x, dz)
        line = (1, -1, *[1] * (x.dim() - 2))
        xhat = (x.detach() - self.mean.view(line)) * self.invstd.view(line)
        self.sum_dz, self.sum_dz_xhat = dz.sum(dims), (dz * xhat).sum(dims)
        self.sum_dy = {n: self.dy.abs().pow(n).sum(dims) for n in (1, 2)}
        self.mean, self.invstd = self.mean.to(dtype), self.invstd.to(dtype)


NORM_SHAPES = [s for s in SHAPES if math.prod(s) > s[1]]  # torch's norm wants two positions


@each_case(NORM_SHAPES)
@pytest.mark.parametrize("affine, relu", [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("order", [1, 2])
def test_norm_sums(shape, last, dtype, affine, relu, order, threads):
    norm = Norm(shape, dtype, last, affine, relu)
    got = native.norm_sums(
        norm.dz, norm.x, norm.weight, norm.mean, norm.invstd, order, norm.relu_out
    )
    for sums, expected in zip(
        got, (norm.sum_dz, norm.sum_dz_xhat, norm.sum_dy[order]), strict=True
    ):
        assert_close(sums, expected, dtype)


@each_case(NORM_SHAPES)
@pytest.mark.parametrize("affine, relu", [(True, True), (False, False), (True, False)])
def test_norm_input_grad(shape, last, dtype, affine, relu, threads):
    norm = Norm(shape, dtype, last, affine, relu)
    index = torch.randperm(shape[1])[: max(1, shape[1] // 2)].sort().values
    got = native.norm_input_grad(
        norm.dz,
        norm.x,
        norm.weight,
        norm.mean,
        norm.invstd,
        norm.sum_dz.to(dtype),
        norm.sum_dz_xhat.to(dtype),
        index,
        norm.relu_out,
    )
    assert_close(got, norm.dy[:, index], dtype)
    assert got.stride() == lying(got, last and got.dim() > 2).stride()


@needs_compiler
@pytest.mark.parametrize("last", [False, True])
def test_a_gradient_that_lies_otherwise_than_the_input(last):
    norm = Norm((2, 6, 4, 3), torch.float64, last)
    vectors = norm.weight, norm.mean, norm.invstd
    index = torch.tensor([1, 4])
    for dz in (lying(norm.dz, not last), norm.dz.float(), norm.dz[:, :, :, :1].expand_as(norm.dz)):
        like = lying(dz.double(), last)
        got = native.norm_sums(dz, norm.x, *vectors, 1)
        for one, two in zip(got, native.norm_sums(like, norm.x, *vectors, 1), strict=True):
            assert torch.equal(one, two)
        sums = got[:2]
        assert torch.equal(
            native.norm_input_grad(dz, norm.x, *vectors, *sums, index),
            native.norm_input_grad(like, norm.x, *vectors, *sums, index),
        )


@needs_compiler
@pytest.mark.parametrize("last", [False, True])
def test_a_relu_output_that_lies_otherwise_than_the_input(last):
    norm = Norm((2, 6, 4, 3), torch.float64, last, relu=True)
    vectors = norm.weight, norm.mean, norm.invstd
    sums = [
        native.norm_sums(norm.dz, norm.x, *vectors, 1, out)
        for out in (norm.relu_out, lying(norm.relu_out, not last))
    ]
    assert all(map(torch.equal, *sums))
    got = [
        native.norm_input_grad(norm.dz, norm.x, *vectors, *sums[0][:2], torch.tensor([1, 4]), out)
        for out in (norm.relu_out, lying(norm.relu_out, not last))
    ]
    assert torch.equal(*got)


@needs_compiler
@pytest.mark.parametrize("last", [False, True])
def test_a_nan_passes_the_gradient_of_a_relu(last):
    norm = Norm((2, 6, 4, 5), torch.float64, last)
    out = lying(torch.full_like(norm.x, math.nan), last)
    expected = torch.ops.aten.threshold_backward(norm.dz, out, 0)
    assert torch.equal(expected, norm.dz)
    vectors = norm.weight, norm.mean, norm.invstd
    assert all(
        map(
            torch.equal,
            native.norm_sums(norm.dz, norm.x, *vectors, 1, out),
            native.norm_sums(norm.dz, norm.x, *vectors, 1),
        )
    )


@needs_compiler
def test_the_same_bits_every_time():
    norm = Norm((4, 32, 40, 40), torch.float32, True)
    arguments = norm.dz, norm.x, norm.weight, norm.mean, norm.invstd, 1
    first = native.norm_sums(*arguments)
    for _ in range(5):
        assert all(map(torch.equal, first, native.norm_sums(*arguments)))


CELL_SHAPES = [
    (3, 5, 7, 3),
    (2, 16, 4, 4),
    (2, 6, 2500),
    (3, 8, 1, 1),
    (1, 40, 1, 2),
    (2, 3, 9, 13),
    (2, 3, 9, 700),  # a row of cells is more than a block
]


@each_case(CELL_SHAPES)
@pytest.mark.parametrize("block", [4, 3])
@pytest.mark.parametrize("relu, order", [(True, 1), (False, 2)])
def test_norm_sums_and_cells(shape, last, dtype, block, relu, order, threads):
    norm = Norm(shape, dtype, last, relu=relu)
    cells = Cells.blocks(shape[2:], block)
    vectors = norm.weight, norm.mean, norm.invstd, order, norm.relu_out
    sums, of_cells = native.norm_sums_and_cells(norm.dz, norm.x, *vectors, cells)
    for got, plain in zip(sums, native.norm_sums(norm.dz, norm.x, *vectors), strict=True):
        assert_close(got, plain.double(), dtype)
    assert_close(of_cells, cells.sums(norm.dy), dtype)


@needs_compiler
def test_cells_of_other_maps_are_an_error():
    norm = Norm((2, 6, 4, 3), torch.float32, False)
    arguments = norm.dz, norm.x, norm.weight, norm.mean, norm.invstd, 1, None
    for cells in (Cells.blocks((4, 4), 2), Cells((4, 3), (-1, 0), (2, 2), (2, 2))):
        with pytest.raises(ValueError, match="cells"):
            native.norm_sums_and_cells(*arguments, cells)
