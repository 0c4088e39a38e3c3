"""The C functions over cells of maps equal torch's operations, and touch nothing else."""

import random

import pytest
import torch

from ssprop_patch.core.cells import Cells
from ssprop_patch.ops import native
from ssprop_patch.ops.coarse_cells import FastCells
from ssprop_patch.ops.native.cells import add_cells, sum_cells

pytestmark = pytest.mark.skipif(
    native.why_unavailable() is not None, reason=f"no C functions: {native.why_unavailable()}"
)


def random_cells(rng):
    """Return cells of one or two dimensions, some outside of the map, and the map's channels."""
    dims = rng.choice([1, 2])
    length = tuple(rng.randint(1, 19) for _ in range(dims))
    size = tuple(rng.choice([1, 2, 3, 4, 4, 8]) for _ in range(dims))
    start = tuple(min(rng.choice([0, 0, -3, -1, 1, 5]), n - 1) for n in length)
    number = tuple(rng.randint(1, 6) for _ in range(dims))
    # Some of them lie in the map, as of every convolution.
    start = tuple(max(a, 1 - n * s) for a, n, s in zip(start, number, size, strict=True))
    return (length, start, size, number), rng.choice([1, 2, 5, 16])


def guarded(t):
    """Return a copy of ``t`` in its format with numbers around it, and these."""
    if t.is_contiguous():
        whole = torch.full((t.numel() + 64,), 7.0, dtype=t.dtype)
        inner = whole[32:-32].view(t.shape)
    else:
        whole = torch.full((t.numel() + 64,), 7.0, dtype=t.dtype)
        inner = whole[32:-32].view(t.shape[0], *t.shape[2:], t.shape[1]).movedim(-1, 1)
    return inner.copy_(t), (whole[:32], whole[-32:])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last", [False, True])
def test_they_equal_torchs_operations(last, dtype, threads):
    rng, taken = random.Random(last), 0
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(60):
            cells, channels = random_cells(rng)
            fast, plain = FastCells(*cells), Cells(*cells)
            # Integers: exact in any order of additions.
            t = torch.randint(-9, 9, (300, channels, *cells[0])).to(dtype)
            v = torch.randint(-9, 9, (300, channels, *cells[3])).to(dtype)
            if last and len(cells[0]) == 2:
                t, v = (a.contiguous(memory_format=torch.channels_last) for a in (t, v))
            with torch.no_grad():
                assert torch.equal(sum_cells(t, fast), plain.sums(t)), cells
                to, around = guarded(t)
                assert add_cells(to, v, fast)
                assert torch.equal(to, t + plain.spread(v)), cells
                assert all((a == 7).all() for a in around)
                assert torch.equal(fast.add_spread(t.clone(), v), t + plain.spread(v))
            taken += 1
    finally:
        torch.set_num_threads(before)
    assert taken == 60


def test_what_does_not_fit_is_left_to_torch():
    cells = FastCells((8, 8), (0, 0), (4, 4), (2, 2))
    t = torch.randn(2, 3, 8, 8)
    assert sum_cells(torch.randn(2, 3, 8, 9), cells) is None
    assert sum_cells(torch.randn(0, 3, 8, 8), cells) is None
    assert (
        sum_cells(torch.randn(2, 3, 8, 8, 8), FastCells((8,) * 3, (0,) * 3, (4,) * 3, (2,) * 3))
        is None
    )
    assert not add_cells(t, torch.randn(2, 3, 2, 3), cells)
    assert not add_cells(t, torch.randn(2, 3, 2, 2).double(), cells)
    assert not add_cells(t, torch.randn(2, 4, 2, 2), cells)
