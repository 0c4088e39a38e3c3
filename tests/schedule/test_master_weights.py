"""Optimizers over copies of the weights, one by one, count as the model's own."""

import copy
import warnings

import pytest
import torch
from torch import nn

import ssprop_patch as ssp


def make(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).to(dtype)


class Masters:
    """A torch optimizer over float copies of the weights, as of Apex O2 and mmcv."""

    def __init__(self, model, order=lambda parameters: parameters):
        self.parameters = order(list(model.parameters()))
        self.masters = [p.detach().float().requires_grad_() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, 1e-2)

    @torch.no_grad()
    def step(self):
        for p, q in zip(self.parameters, self.masters, strict=True):
            q.grad = p.grad.float()
        self.optimizer.step()
        for p, q in zip(self.parameters, self.masters, strict=True):
            p.copy_(q)


def train(model, optimizer, steps, accumulate=1):
    """Return after each step the count, and how many rows of a gradient are zero."""
    seen = []
    for _ in range(steps):
        model.zero_grad()
        for _ in range(accumulate):
            x = torch.randn(2, 3, 6, 6, dtype=model[0].weight.dtype)
            model(x).float().square().sum().backward()
        zero = (model[2].weight.grad.flatten(1).abs().sum(1) == 0).sum().item()
        optimizer.step()
        seen.append((ssp.get_controller(model).t, zero))
    return seen


@pytest.fixture(autouse=True)
def said():
    """What is said; nothing, unless the test takes it off the list."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
    assert not [str(w.message) for w in caught if "ssprop_patch" in str(w.message)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_they_are_counted_from_the_first(dtype):
    model = ssp.convert(make(dtype), ssp.BarSchedule(0.8), steps_per_epoch=2)
    zero = [rows for _, rows in train(model, Masters(model), 8)]
    assert zero == [0, 0, 6, 6, 0, 0, 6, 6]
    assert ssp.get_controller(model).t == 4


@pytest.mark.parametrize("accumulate", [4, 16])
def test_with_accumulated_gradients(accumulate):
    model = ssp.convert(make(), ssp.BarSchedule(0.8, interval="step"))
    train(model, Masters(model), 12, accumulate)
    assert ssp.get_controller(model).t == 12


def test_they_stay_known_when_the_model_is_converted_again():
    model = ssp.convert(make(), ssp.BarSchedule(0.8, interval="step"))
    optimizer = Masters(model)
    train(model, optimizer, 3)
    ssp.convert(model, controller=ssp.get_controller(model), exclude="^0$")
    train(model, optimizer, 3)
    assert ssp.get_controller(model).t == 6


def test_the_optimizer_of_a_twin_is_none_of_the_models(said):
    model = ssp.convert(make(torch.float32), ssp.BarSchedule(0.8, interval="step"))
    twin = ssp.revert(copy.deepcopy(model))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.0)  # so that both stay the same
    for _ in range(12):
        for m in (model, twin):
            m(torch.randn(2, 3, 6, 6)).square().sum().backward()
        optimizer.step()
    assert ssp.get_controller(model).t == 0
    assert "this model gets gradients, and 8 optimizer steps" in str(said.pop().message)


def test_in_another_order_they_are_not_known_and_that_is_said(said):
    model = ssp.convert(make(), ssp.BarSchedule(0.8, interval="step"))
    train(model, Masters(model, order=lambda parameters: parameters[::-1]), 8)
    assert ssp.get_controller(model).t == 0
    assert "no torch optimizer that holds its parameters" in str(said.pop().message)
