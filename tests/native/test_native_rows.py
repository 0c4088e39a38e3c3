"""The backward of a convolution with one position in C against torch's in float64."""

import pytest
import torch
from native_checks import DTYPES, assert_close, needs_compiler

from ssprop_patch.ops import native


@needs_compiler
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("n", [1, 3, 4, 9])
@pytest.mark.parametrize("c_in, c_out, kept", [(1, 1, 1), (3, 7, 2), (33, 20, 4), (16, 9, 9)])
def test_rows_backward(dtype, n, c_in, c_out, kept, threads):
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((n, c_in, 1, 1), (c_out, c_in, 1, 1), (n, c_out, 1, 1))
    )
    index = torch.randperm(c_out, generator=generator)[:kept].sort().values
    masked = torch.zeros_like(dy).index_copy_(1, index, dy[:, index])
    expected = torch.ops.aten.convolution_backward(
        masked, x, w, [c_out], (1, 1), (0, 0), (1, 1), False, (0, 0), 1, [True] * 3
    )
    args = [t.to(dtype) for t in (dy[:, index], x, w)]
    for needed in (
        (True, True, True),
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ):
        grads = native.rows_backward(*args, index, needed)
        for got, like, need in zip(grads, expected, needed, strict=True):
            if need:
                assert got.shape == like.shape
                assert_close(got, like, dtype)
            else:
                assert got is None
