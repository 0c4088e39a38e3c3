"""The C functions over the taps of a weight equal torch's operations, and touch nothing else."""

import itertools

import pytest
import torch

from ssprop_patch.core.geometry import ConvParams
from ssprop_patch.ops import coarse_twin, native
from ssprop_patch.ops.coarse_twin import FastTwin
from ssprop_patch.ops.native.taps import put_taps, sum_taps

pytestmark = pytest.mark.skipif(
    native.why_unavailable() is not None, reason=f"no C functions: {native.why_unavailable()}"
)

KERNELS = [(2,), (3,), (1, 2), (3, 3), (4, 4), (5, 3), (7, 7), (2, 2, 2), (3, 3, 3)]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def weights(dtype, channels=(1, 5, 16, 37)):
    """Yield weights of every kernel, in both formats, of integers: sums in any order are exact."""
    for kernel, c in itertools.product(KERNELS, channels):
        w = torch.randint(-9, 9, (11, c, *kernel)).to(dtype)
        yield w
        if w.dim() in FORMATS:
            yield w.contiguous(memory_format=FORMATS[w.dim()])


def shares_of(w):
    """Powers of two: what they are multiplied with stays exact."""
    return 2.0 ** torch.randint(-3, 1, (w.shape[2:].numel(),)).to(w.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_and_rows_equal_torchs(dtype):
    torch.manual_seed(0)
    for w in weights(dtype):
        index, shares = torch.tensor([0, 3, 4, 10]), shares_of(w)
        taps = shares.view(w.shape[2:])
        sums = sum_taps(w, shares, index)
        assert torch.equal(sums, (w * taps).flatten(2).sum(2)[index]), w.shape
        wanted, values = w.clone(), sums + 1
        wanted[index] = values.view(*values.shape, *(1,) * taps.dim()) * taps
        assert put_taps(w, values, shares, index)
        assert torch.equal(w, wanted), w.shape


def test_nothing_around_the_rows_is_written():
    whole = torch.full((2 * 5 * 9 + 64,), 7.0)
    w = whole[32:-32].view(2, 5, 3, 3)
    assert put_taps(w, torch.ones(1, 5), torch.ones(9), torch.tensor([1]))
    assert (whole[: 32 + 45] == 7).all() and (whole[-32:] == 7).all()
    assert (whole[32 + 45 : -32] == 1).all()


def test_what_does_not_fit_is_left_alone():
    w, rows, index = torch.zeros(2, 5, 3, 3), torch.ones(1, 5), torch.tensor([1])
    for bad in (torch.ones(8), torch.ones(9, dtype=torch.float64), torch.ones(18)[::2]):
        assert sum_taps(w, bad, index) is None and not put_taps(w, rows, bad, index)
    assert not put_taps(w, torch.ones(1, 4), torch.ones(9), index)
    assert not put_taps(w, rows.double(), torch.ones(9), index)
    assert sum_taps(torch.zeros(2, 5, 1, 1), torch.ones(1), index) is None
    for wrong in (torch.tensor([2]), torch.tensor([-1])):
        with pytest.raises(IndexError):
            put_taps(w, rows, torch.ones(9), wrong)
        with pytest.raises(IndexError):
            sum_taps(w, torch.ones(9), wrong)
    assert not w.any()


@pytest.mark.parametrize("last", [False, True])
def test_the_twin_of_the_others_is_that_of_a_masked_gradient(last, monkeypatch):
    torch.manual_seed(0)
    dy, x = torch.randn(3, 7, 9, 6).double(), torch.randn(3, 5, 9, 6).double()
    w, kept = torch.randn(7, 5, 3, 3).double(), torch.tensor([1, 2, 6])
    if last:
        dy, x, w = (t.contiguous(memory_format=torch.channels_last) for t in (dy, x, w))
    twin = FastTwin.of(dy, x, w, ConvParams((1, 1), (1, 1), (1, 1), 1), 4)
    pooled = twin.pool_output(dy)
    pooled[:, kept] = torch.nan  # of a kept channel nothing is read
    rest = pooled.index_fill(1, kept, 0)

    def start():
        dw = torch.zeros_like(w)
        dw[kept] = 1.5
        return torch.ones_like(x), dw

    with torch.no_grad():
        wanted = twin.add_backward(start(), rest, x, w)
        by_c = twin.add_others(start(), pooled, kept, x, w)
        monkeypatch.setattr(coarse_twin, "put_taps", lambda *args: False)
        monkeypatch.setattr(coarse_twin, "sum_taps", lambda *args: None)
        by_torch = twin.add_others(start(), pooled, kept, x, w)
        alone = twin.add_others((None, start()[1]), pooled, kept, x, w)
    for got in (by_c, by_torch):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert alone[0] is None and torch.allclose(alone[1], wanted[1], rtol=1e-12)
