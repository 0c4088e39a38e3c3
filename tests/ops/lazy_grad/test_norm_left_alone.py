"""Norms and activations are left alone, and what looks like them is not taken for them."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn

import ssprop_patch as ssp
from ssprop_patch.ops import native

from .norms import (
    RATE,
    Way,
    assert_same,
    compare_with_oracle,
    inputs,
    inputs_once,
    net,
    spread_out,
    step,
    two_sides,
)

pytestmark = pytest.mark.usefixtures("however_small")


def test_no_class_and_no_hook_of_a_norm_or_an_activation_changes(way):
    model = net(norm=BatchNormAct2d)
    others = [m for m in model if not isinstance(m, nn.Conv2d)]
    before = [(type(m), dict(vars(m))) for m in others]
    ssp.convert(model, RATE, selection=way.selection)
    step(model, inputs())
    assert [(type(m), dict(vars(m))) for m in others] == before


def test_under_l1_without_a_compiler_the_gradients_are_torchs_own(formed, monkeypatch):
    monkeypatch.setattr(native.tensors, "library", lambda *args: None)
    compare_with_oracle(Way("l1"), net(), inputs())
    assert not any(formed.values())


def test_copies_and_pickles_defer_too(way, formed):
    model = ssp.convert(spread_out(net()), RATE, selection=way.selection)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    expected = step(copy.deepcopy(model), inputs_once())[0]
    assert_same(step(torch.load(saved, weights_only=False), inputs_once())[0], expected, 0.0)
    assert formed["part"] == 4


def test_an_optimizer_that_steps_within_the_backward(way, formed):
    # The weight of a norm changes before the convolution in front of it asks for its gradient.
    def change(p):
        p.data.add_(1.0)

    grads = []
    for model in two_sides(way):
        for p in (*model[1].parameters(), *model[4].parameters()):
            p.register_post_accumulate_grad_hook(change)
        x = inputs_once().requires_grad_()
        model(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    assert_same(*grads)
    assert formed["part"] == 2


class CallsTheOther(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + torch.batch_norm(
            x * 2, None, None, None, None, True, 0.1, 1e-5, False
        )


class CallsBoth(nn.BatchNorm2d):
    def forward(self, x):
        own = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True)
        return own + F.batch_norm(x * 2, None, None, training=True)


@pytest.mark.parametrize("norm", [CallsTheOther, CallsBoth])
def test_a_norm_of_another_tensor_is_left_alone(way, norm, formed):
    compare_with_oracle(way, net(norm=norm), inputs())
    assert formed["part"] == 0 and formed["whole"] == 2


class Frozen(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False)


def test_a_forward_that_keeps_to_the_running_statistics_in_training(way, formed):
    compare_with_oracle(way, net(norm=Frozen), inputs())
    assert formed["part"] == 0


def test_metered_it_defers_too(way, formed):
    model = ssp.convert(spread_out(net()), RATE, selection=way.selection)
    expected = step(copy.deepcopy(model), inputs_once())[0]
    before = dict(formed)
    with ssp.Meter(model):
        got = step(model, inputs_once())[0]
    assert_same(got, expected, 0.0)
    assert formed["part"] == before["part"] + 2 and not formed["whole"]
