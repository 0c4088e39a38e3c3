"""A coarse remainder takes its block sums from the norm: the whole gradient is never formed."""

import copy

import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch.core.cells import Cells
from ssprop_patch.core.selection import l1_scores, l2_scores
from ssprop_patch.ops import channel_ops

from .norms import RATE, assert_same, inputs, needs_compiler, net, spread_out, step

pytestmark = [needs_compiler, pytest.mark.usefixtures("however_small")]

# The selections by other names: no gradient is lazy for them.
PLAIN = {"l1": lambda dy: l1_scores(dy.clone()), "l2": lambda dy: l2_scores(dy.clone())}


@pytest.fixture
def summed(monkeypatch):
    """The sizes of the cells over which norms summed their gradients."""
    seen, original = [], channel_ops.norm_sums

    def norm_sums(*args):
        seen.append(args[7].size)
        return original(*args)

    monkeypatch.setattr(channel_ops, "norm_sums", norm_sums)
    return seen


def both(model, x, selection="l1", remainder="coarse", **kwargs):
    """Return the gradients of a step, with lazy gradients and without."""
    sides = (
        ssp.convert(copy.deepcopy(model), RATE, selection=by, remainder=remainder, **kwargs)
        for by in (selection, PLAIN[selection])
    )
    return [step(side, x)[0] for side in sides]


@pytest.mark.parametrize("dims, last", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("block", [4, 3])
@pytest.mark.parametrize("selection", ["l1", "l2"])
def test_same_gradients_without_forming_them(formed, summed, selection, block, dims, last):
    model, x = spread_out(net(dims, groups=2)), inputs(dims)
    if last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    assert_same(*both(model, x, selection, ssp.Coarse(block)))
    assert [len(size) for size in summed] == [dims] * 2
    assert all(block - 1 <= n <= 1.5 * block for size in summed for n in size)
    assert formed["whole"] == 0 and formed["part"] == 2


def test_transposed_layers_and_three_dimensions_get_the_whole_gradient(summed):
    transposed = nn.Sequential(
        nn.ConvTranspose2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    types = nn.Conv2d, nn.ConvTranspose2d
    assert_same(*both(spread_out(transposed.double()), inputs(), types=types))
    assert_same(*both(spread_out(net(3)), inputs(3)))
    assert not summed


def test_a_changed_gradient_is_summed_anew(summed):
    class Doubled(nn.Module):
        def forward(self, x):
            x.register_hook(lambda grad: grad.mul_(2))
            return x

    model = spread_out(net())
    model.insert(1, Doubled())
    first, second = both(model, inputs())
    assert_same(first, second)
    assert len(summed) == 1  # of the other norm


def test_cells_that_c_cannot_sum():
    x = torch.randn(2, 3, 4, 6)
    assert channel_ops.can_sum_cells(x, Cells.blocks((4, 6), 4))
    assert not channel_ops.can_sum_cells(x, Cells.blocks((4, 4), 4))  # of other maps
    assert not channel_ops.can_sum_cells(x, Cells((4, 6), (1, 0), (2, 2), (2, 3)))  # a gap first
