"""How many channels are kept, of which groups, and by what they are ranked."""

import math

import oracle
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ssprop_patch import functional
from ssprop_patch.core.selection import kept_channels, selectable_channels

from .convolutions import SSP, assert_close, cases

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # by torch.func itself
]


@given(st.integers(1, 4096), st.floats(0.0, 1.0, exclude_max=True))
@example(5, 0.8)
@example(1, 0.999)
@example(2, 0.75)
@example(10**9, 1 - 2**-53)
def test_number_of_kept_channels(channels, drop_rate):
    k = kept_channels(channels, drop_rate)
    assert isinstance(k, int)
    assert k == oracle.number_kept(channels, drop_rate)
    assert 1 <= k <= channels
    exact = (1 - drop_rate) * channels
    assert k == 1 if exact < 0.5 else abs(k - exact) <= 0.5
    assert k >= kept_channels(channels, min(math.nextafter(1, 0), drop_rate + 0.1))


@pytest.mark.parametrize(
    "channels, drop_rate, k",
    [
        (64, 0.0, 64),
        (64, 0.8, 13),
        (10, 0.8, 2),
        (5, 0.5, 3),
        (7, 0.5, 4),
        (3, 0.5, 2),
        (4, 0.875, 1),
        (4, 0.9, 1),
        (1, 0.9, 1),
        (100, 0.999, 1),
        (100, 0.004, 100),
        (100, 0.006, 99),
        (6, 0.75, 2),
        (2, 0.75, 1),
    ],
)
def test_number_of_kept_channels_rounds_half_up_and_never_to_none(channels, drop_rate, k):
    assert kept_channels(channels, drop_rate) == k


@pytest.mark.parametrize("groups, channels", [(1, 9), (3, 9), (9, 9)])
def test_the_channels_one_choice_is_made_from(groups, channels):
    assert selectable_channels(channels, groups) == (3 if groups == 3 else 9)


def test_importance_is_the_mean_magnitude_not_the_sum_the_maximum_or_the_energy():
    dy = torch.zeros(2, 4, 4, dtype=torch.float64)
    dy[:, 0] = torch.tensor([3.0, -3.0, 3.0, -3.0])  # sum 0, mean magnitude 3
    dy[:, 1] = 1.0  # sum 8
    dy[0, 2, 0] = 16.0  # maximum and energy, mean magnitude 2; one example only
    x, w = torch.randn(2, 2, 4, dtype=torch.float64), torch.randn(4, 2, 1, dtype=torch.float64)
    w.requires_grad_()
    functional.conv1d(x, w, drop_rate=0.75).backward(dy)
    assert [c for c in range(4) if w.grad[c].any()] == [0]


def test_grouped_convolutions_keep_as_many_channels_in_each_group():
    dy = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0]).view(1, 8, 1)  # group 0 is larger
    x, w = torch.ones(1, 4, 1), torch.ones(8, 2, 1, requires_grad=True)
    functional.conv1d(x, w, groups=2, drop_rate=0.5).backward(dy)
    assert [c for c in range(8) if w.grad[c].any()] == [0, 1, 6, 7]


def test_depthwise_convolutions_choose_among_the_groups():
    dy = torch.tensor([1.0, 5.0, 2.0, 4.0]).view(1, 4, 1)
    x, w = torch.ones(1, 4, 1, requires_grad=True), torch.ones(4, 1, 1, requires_grad=True)
    functional.conv1d(x, w, groups=4, drop_rate=0.5).backward(dy)
    assert [c for c in range(4) if w.grad[c].any()] == [1, 3]
    assert x.grad.flatten().tolist() == [0, 5, 0, 4]


@settings(max_examples=60)
@given(cases(drop_rates=st.floats(0.2, 0.95)))
def test_a_gradient_that_is_the_same_everywhere_keeps_k(case):
    # y.sum().backward(): an expanded dy, all channels tie, and any k of them are right.
    x, w, b = case.leaves()
    w.requires_grad_()
    y = SSP[case.dims](x, w, b, **case.geometry, drop_rate=case.drop_rate)
    y.sum().backward()
    keep = (w.grad != 0).flatten(1).any(1)
    for among in oracle.choices(len(keep), case.groups):
        assert sum(keep[c].item() for c in among) <= oracle.number_kept(len(among), case.drop_rate)
    dy = torch.ones_like(case.dy)
    expected = oracle.gradients(case.x, case.w, case.b, dy, keep, **case.geometry)
    assert_close(w.grad, expected[1])
    if x.requires_grad:
        assert_close(x.grad, expected[0])


def test_no_rescaling():
    # With one channel that carries everything, sparse and dense gradients are the same numbers.
    x, w = torch.randn(2, 3, 5, 5), torch.randn(8, 3, 3, 3)
    dy = torch.zeros(2, 8, 3, 3)
    dy[:, 5] = torch.randn(2, 3, 3)
    grads = []
    for rate in (0.0, 0.8):
        leaf = w.clone().requires_grad_()
        functional.conv2d(x, leaf, drop_rate=rate).backward(dy)
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
