"""What the tests of single C functions share: random tensors, their formats and tolerances."""

import pytest
import torch

from ssprop_patch.ops.native import build, cache

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C compiler")
DTYPES = {torch.float32: 2e-5, torch.float64: 1e-12}  # and what rounding may cost

SHAPES = [
    (3, 5, 7, 3),  # no size a multiple of anything
    (2, 16, 4, 4),
    (1, 1, 1, 1),
    (5, 33),  # of a linear layer
    (2, 6, 2500),  # more than one block
    (2, 3, 2, 3, 5),
    (3, 8, 1, 1),  # as in memory, rows of channels
    (1, 40, 1, 2),
    (0, 4, 3, 3),
]


def random(shape, dtype, last, seed=0):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lying(t.to(dtype), last)


def lying(t, last):
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if last else t.contiguous()


def assert_close(got, expected, dtype):
    assert got.dtype == dtype
    tolerance = DTYPES[dtype]
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        got.double(), expected, rtol=tolerance, atol=tolerance * max(1.0, largest)
    )


def each_case(shapes):
    def decorate(test):
        for name, values in (
            ("shape", shapes),
            ("last", [False, True]),
            ("dtype", list(DTYPES)),
        ):
            test = pytest.mark.parametrize(name, values, ids=str)(test)
        return needs_compiler(test)

    return decorate


def forget():
    """Forget what this process compiled: the next call looks for it as a new process does."""
    for function in (build._build, build._announce, cache._version_of):
        function.cache_clear()
    for found in (build._settled, build._compiling):
        found.clear()
