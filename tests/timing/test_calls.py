"""What each layer is given in its network, and the layer taken out of it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import ssprop_patch as ssp
from ssprop_patch import timing
from ssprop_patch.timing import recorded_calls as calls

from .networks import X, net


def test_calls_have_shapes_strides_and_numbers_and_leave_out_what_needs_no_gradient():
    model = net()
    found = calls.record_calls(model, [m for m in model.modules() if isinstance(m, nn.Conv2d)], X)
    names = {m: name for name, m in model.named_modules()}
    shown = [(names[c.module], n, c.input.shape, c.output_shape) for c, n in found]
    assert shown == [
        ("stem", 1, (2, 3, 6, 6), (2, 8, 6, 6)),
        ("twice", 2, (2, 8, 6, 6), (2, 8, 6, 6)),
        ("alike", 1, (2, 8, 6, 6), (2, 8, 6, 6)),
        ("wide", 1, (2, 8, 3, 6), (2, 20, 3, 6)),
    ]
    by_name = {names[c.module]: c for c, _ in found}
    assert not by_name["stem"].input.requires_grad and by_name["twice"].input.requires_grad
    (x,), kwargs = by_name["wide"].make_inputs(torch.Generator())
    assert x.is_contiguous(memory_format=torch.channels_last) and not kwargs
    assert x.dtype == torch.float64 and x.requires_grad
    assert by_name["twice"].key == by_name["alike"].key
    assert len({c.key for c in by_name.values()}) == 3


def test_layers_that_differ_in_anything_that_takes_time_are_not_alike():
    def key(layer, x, autocast=None):
        model = nn.Sequential(nn.Identity(), layer)
        [(call, _)] = calls.record_calls(model, [layer], x, autocast)
        return call.key

    x = torch.randn(2, 4, 8, 8)
    frozen = nn.Conv2d(4, 8, 3)
    frozen.weight.requires_grad_(False)
    keys = [
        key(nn.Conv2d(4, 8, 3), x),
        key(nn.Conv2d(4, 8, 3, bias=False), x),
        key(nn.Conv2d(4, 8, 3, stride=2), x),
        key(nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last), x),
        key(nn.Conv2d(4, 8, 3), x.contiguous(memory_format=torch.channels_last)),
        key(nn.Conv2d(4, 8, 3), torch.randn(3, 4, 8, 8)),
        key(nn.Conv2d(4, 8, 3), x.clone().requires_grad_()),
        key(nn.Conv2d(4, 8, 3).double(), x.double()),
        key(parametrizations.weight_norm(nn.Conv2d(4, 8, 3)), x),
        key(frozen, x),
    ]
    assert len(set(keys)) == len(keys)
    assert key(nn.Conv2d(4, 8, 3), x) == keys[0]
    # What a parametrization or a pre-hook does, nobody knows: such a layer is like no other.
    assert key(parametrizations.weight_norm(nn.Conv2d(4, 8, 3)), x) not in keys
    hooked = nn.Conv2d(4, 8, 3)
    hooked.register_forward_pre_hook(lambda m, args: None)
    assert key(hooked, x) not in keys


def test_under_autocast_layers_are_given_what_it_makes():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    found = calls.record_calls(model, list(model), torch.randn(2, 3, 8, 8), torch.bfloat16)
    assert [call.input.dtype for call, _ in found] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("converted", [True, False])
def test_timing_layers_leaves_the_model_as_it_was(training, converted):
    model = net().train(training)
    if converted:
        ssp.convert(model, 0.4)
    seen = []
    model.twice.register_forward_hook(lambda *args: seen.append(1))
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    flags = [m.training for m in model.modules()]
    classes = [type(m) for m in model.modules()]
    timing.time_layers(model, X, iterations=1)
    assert torch.equal(torch.get_rng_state(), rng)
    assert flags == [m.training for m in model.modules()]
    assert classes == [type(m) for m in model.modules()]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert all(p.grad is None for p in model.parameters())
    assert not converted or ssp.get_controller(model).drop_rate == 0.4
    assert all("forward" not in vars(m) for m in model.modules())
    count = len(seen)  # the one real run calls hooks, the timed copies do not
    assert count <= 2
    model.train()(X)
    assert len(seen) == count + 2


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm])
def test_an_isolated_layer_computes_the_same_on_parameters_of_its_own(norm):
    layer = norm(nn.Conv1d(3, 4, 3))
    layer.register_forward_hook(lambda m, args, out: out * 2)
    alone = calls.isolated(layer)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(alone(x) * 2, layer(x))
    ours = {id(p) for p in layer.parameters()}
    assert not ours & {id(p) for p in alone.parameters()}
    assert len(layer._forward_hooks) == 1
    assert not ssp.is_converted(calls.isolated(ssp.convert(nn.Conv2d(3, 8, 3), 0.5)))


class Block(nn.Module):
    """Norms: right behind a convolution, behind an activation, and of another use of the output."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x):
        x = self.norms[0](self.convs[0](x))
        x = self.norms[1](self.convs[1](x).relu())
        return self.norms[2](self.convs[2](x) + x)


@pytest.mark.parametrize("least, paired", [(0, True), (math.inf, False)])
def test_a_batch_norm_that_defers_its_gradient_is_timed_with_its_layer(least, paired, monkeypatch):
    monkeypatch.setattr("ssprop_patch.ops.lazy_grad.graph._MIN_ELEMENTS", least)
    monkeypatch.setattr("ssprop_patch.ops.native.may_be_available", lambda: True)
    model, x = Block(), torch.randn(2, 3, 8, 8, requires_grad=True)
    before = [dict(vars(m)) for m in model.modules()]
    found = [call for call, _ in calls.record_calls(model, list(model.convs), x)]
    assert [call.norm for call in found] == [model.norms[0] if paired else None, None, None]
    assert len({call.key for call in found}) == (2 if paired else 1)
    assert [dict(vars(m)) for m in model.modules()] == before
    rows = timing.time_layers(model, x, iterations=1)
    assert [row.with_norm for row in rows] == [paired, False, False]


def test_without_a_compiler_no_norm_is_timed_with_its_layer(monkeypatch):
    monkeypatch.setattr("ssprop_patch.ops.lazy_grad.graph._MIN_ELEMENTS", 0)
    monkeypatch.setattr("ssprop_patch.ops.native.may_be_available", lambda: False)
    model = Block()
    found = calls.record_calls(model, list(model.convs), torch.randn(2, 3, 8, 8))
    assert all(call.norm is None for call, _ in found)
