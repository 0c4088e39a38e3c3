"""FLOPs of directions and of the coarse remainder, against torch's counter of what runs."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ssprop_patch as ssp
from ssprop_patch.core.geometry import ConvParams
from ssprop_patch.core.rule import BackwardKind, BackwardRule, Extent
from ssprop_patch.flops.gradient import layer_flops, mean_flops
from ssprop_patch.ops.whole_gradient import whole_backward

# Weight, input and output of a 2-d layer, its stride and groups, and the side that it takes.
LAYERS = {
    "output": ((24, 16, 3, 3), (3, 16, 9, 9), (3, 24, 9, 9), 1, 1, False),
    "groups": ((24, 8, 3, 3), (3, 16, 9, 9), (3, 24, 5, 5), 2, 2, False),
    "input": ((60, 16, 1, 1), (3, 16, 8, 8), (3, 60, 8, 8), 1, 1, False),
    "transposed": ((16, 12, 2, 2), (3, 16, 6, 6), (3, 12, 12, 12), 2, 1, True),
}
MASKS = [(True, True, True), (True, False, False), (False, True, True)]


def ran(name, rule, k, mask):
    """The kind of one more call, its extent, and what torch counts: products alone."""
    w_shape, x_shape, y_shape, stride, groups, transposed = LAYERS[name]
    padding = (w_shape[2] // 2) * (not transposed)
    p = ConvParams((stride,) * 2, (padding,) * 2, (1, 1), groups, transposed, (0, 0))
    dy, x, w = torch.randn(y_shape), torch.randn(x_shape), torch.randn(w_shape)
    seen = []

    class Observer:
        def backward(self, x, w, dy, k, output_mask, kind):
            seen.append((k, kind))

        def selected(self, index):
            pass

        computed = selected

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        whole_backward(dy, x, w, p, k, rule, mask, Observer())
    extent = Extent.of(x_shape, w_shape, y_shape, groups, transposed, rule.block)
    ((used, kind),) = seen
    return extent, kind, used, counter.get_total_flops()


def sums(e, kind, k, mask):
    """What is not a product: db, pooling and spreading."""
    cost = e.y_positions * e.channels * mask[2]
    if kind.block:
        cost += e.y_positions * e.channels
        cost += e.x_positions * e.inputs * e.groups * (mask[0] + mask[1])
        cost += e.y_positions * e.groups * k * (kind.selected == "output")
    return cost


# Of groups torch counts dW as if each output channel read all inputs.
CASES = [(n, m) for n in LAYERS for m in MASKS if n != "groups" or not m[1]]


@pytest.mark.parametrize("name, mask", CASES)
@pytest.mark.parametrize("block", [0, 3])
def test_products_are_those_that_torch_counts(name, block, mask):
    rule, k = BackwardRule(block=block, subspace=ssp.Subspace()), 4
    for number in range(4):
        e, kind, used, counted = ran(name, rule, k, mask)
        flops = layer_flops(e, kind, used, mask)
        assert kind.selected == ("input" if name == "input" else "output")
        assert kind.refreshed == (number < 3)
        if kind.refreshed:
            continue
        assert flops.backward == counted + sums(e, kind, k, mask)
        usual = layer_flops(e, kind, k, mask)
    refreshed = layer_flops(e, kind._replace(refreshed=True), k, mask)
    interval = 20
    mean = mean_flops(e, kind, kind._replace(refreshed=True), k, mask, interval)
    assert mean.backward == usual.backward + (refreshed.backward - usual.backward) // interval


@pytest.mark.parametrize("name", LAYERS)
def test_a_refresh_is_a_covariance_and_its_rotation(name):
    rule, k, mask = BackwardRule(subspace=ssp.Subspace()), 4, (True, name != "groups", False)
    e, kind, used, counted = ran(name, rule, k, mask)
    assert kind.refreshed
    group = e.channels // e.groups
    if kind.selected == "output":
        rotation = 2 * e.channels * group * k
    else:  # r of dX and of the weight gradient
        r = round(e.inputs * k / group)
        rotation = 2 * e.x_positions * e.groups * e.inputs * r + 2 * e.channels * e.inputs * r
    assert layer_flops(e, kind, used, mask).backward == counted + rotation


@pytest.mark.parametrize("kept, block", list(itertools.product([2, 12], [2, 4])))
def test_kept_channels_and_the_remainder_by_hand(kept, block):
    e = Extent.of((2, 6, 8, 8), (24, 6, 3, 3), (2, 24, 8, 8), 1, False, block)
    flops = layer_flops(e, BackwardKind("channels", block), kept, (True, True, True))
    m, blocks = 2 * 64, 2 * (8 // block) ** 2
    exact = 4 * m * 54 * kept
    coarse = 4 * blocks * 6 * (24 - kept)
    pooling = m * 24 + 2 * m * 6
    assert flops.backward == exact + coarse + pooling + m * 24 + 2 * m * 24
    assert flops.kept == kept


def test_the_gradient_as_a_whole_costs_what_it_did():
    e = Extent.of((2, 6, 1, 1), (24, 6, 1, 1), (2, 24, 1, 1), 1, False, 4)
    flops = layer_flops(e, BackwardKind("all"), 3, (True, True, True))
    assert flops.backward == flops.dense_backward and flops.kept == 24
