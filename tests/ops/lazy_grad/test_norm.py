"""Batch norm before a sparse convolution: its lazy gradient is that of the masked network."""

import copy
import math

import pytest
import timm
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn

import ssprop_patch as ssp
from ssprop_patch import kernels
from ssprop_patch.ops.algorithms import Algorithms
from ssprop_patch.ops.lazy_grad import graph as lazy_grad
from ssprop_patch.patching.sync_selection import SynchronizedScores

from .norms import (
    RATE,
    assert_same,
    compare_with_oracle,
    inputs,
    net,
    spread_out,
    step,
)

pytestmark = pytest.mark.usefixtures("however_small")


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_is_that_of_the_masked_dense_network(way, dims, formed):
    compare_with_oracle(way, net(dims), inputs(dims))
    assert formed == {"whole": 0, "part": 2, "masked": 0}


@pytest.mark.parametrize(
    "kwargs",
    [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.5}],
    ids=str,
)
def test_of_every_kind_of_batch_norm(way, kwargs, formed):
    compare_with_oracle(way, net(**kwargs), inputs())
    assert formed["part"] == 2


def test_of_timms_norm_with_an_activation(way, formed):
    compare_with_oracle(way, net(norm=BatchNormAct2d), inputs())
    assert formed["part"] == 2


def test_of_a_grouped_convolution(way, formed, monkeypatch):
    monkeypatch.setattr(kernels, "by_rule", lambda *args: Algorithms("mask", "mask"))
    compare_with_oracle(way, net(groups=4), inputs())
    assert formed["masked"] > 0 and formed["whole"] == 0


@pytest.mark.parametrize("alone", [True, False])
def test_with_one_choice_for_all_ranks(way, formed, alone, monkeypatch):
    if not alone:  # two ranks that see the same
        monkeypatch.setattr(SynchronizedScores, "_group_in_use", lambda *args: "group")
        monkeypatch.setattr(dist, "all_reduce", lambda scores, group: scores.mul_(2))
    compare_with_oracle(way, net(), inputs(), sync_selection=True)
    assert formed == {"whole": 0, "part": 2, "masked": 0}


def test_of_a_depthwise_convolution(way, formed):
    layers = nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)
    model = nn.Sequential(*layers).double()
    compare_with_oracle(way, model, inputs(channels=6))
    assert formed == {"whole": 0, "part": 1, "masked": 0}


@pytest.mark.parametrize("groups", [1, 4])
def test_in_channels_last(way, groups, formed):
    model = net(groups=groups).to(memory_format=torch.channels_last)
    compare_with_oracle(way, model, inputs().contiguous(memory_format=torch.channels_last))
    assert formed["whole"] == 0


def test_with_frozen_parts(way, formed):
    model = net()
    model[0].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    model[4].requires_grad_(False)
    compare_with_oracle(way, model, inputs())
    assert formed["part"] == 2


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "regnety_002", "densenet121"])
def test_in_networks(way, name, formed):
    model = spread_out(timm.create_model(name, num_classes=5).double().train())
    for m in model.modules():  # nothing drawn at random between the two sides
        if isinstance(m, nn.Dropout) or type(m).__name__ == "DropPath":
            m.p = m.drop_prob = 0.0
    x = torch.randn(3, 3, 48, 48, dtype=torch.double)
    other = copy.deepcopy(model)
    ssp.convert(model, RATE, selection=way.selection)
    ssp.convert(other, RATE, selection=way.unfused)
    got, state = step(model, x)
    assert formed["part"] + formed["masked"] >= 15 and formed["whole"] == 0
    expected, expected_state = step(other, x)
    # Less than of one norm alone: rounding in one layer is input to the next.
    assert_same(got, expected, 1e-7)
    assert_same(state, expected_state, 0.0)


def test_of_few_elements_is_torchs_own(way, formed, monkeypatch):
    monkeypatch.setattr(lazy_grad, "_MIN_ELEMENTS", math.inf)
    compare_with_oracle(way, net(), inputs())
    assert not any(formed.values())


def test_of_few_positions_is_torchs_own(way, formed):
    compare_with_oracle(way, net(), torch.randn(2, 3, 5, 5, dtype=torch.double))  # 2 * 2 * 2 behind
    assert formed["part"] == 1
