"""Deferred initialisation: converted on the meta device, given memory and weights later."""

import copy
import io

import pytest
import timm
import torch
from torch import nn

import ssprop_patch as ssp

from .by_hand import assert_same, by_step, loss_of, net, ordinary, run, run_by_hand, sgd


def on_meta(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5).double()
    ssp.convert(model, by_step())
    assert all(p.is_meta for p in model.parameters())
    return model


def by_to_empty(name, state):
    model = on_meta(name).to_empty(device="cpu")
    model.load_state_dict(state)
    return model


def by_assign(name, state):
    model = on_meta(name)
    model.load_state_dict(copy.deepcopy(state), assign=True)
    return model


def by_mmap_file(name, state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    model = on_meta(name)
    model.load_state_dict(torch.load(file, weights_only=True), assign=True)
    return model


@pytest.mark.parametrize("fill", [by_to_empty, by_assign, by_mmap_file])
@pytest.mark.parametrize("name", ["test_resnet", "test_nfnet"])
def test_converted_on_meta_and_filled_later(name, fill):
    plain = net(name)
    model = fill(name, plain.state_dict()).train()
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    expected = run_by_hand(plain, ordinary)
    assert_same(run(model, ordinary), expected)
    assert ssp.get_controller(model).t == 2


def test_a_default_device_without_memory():
    torch.set_default_device("meta")
    try:
        model = ssp.convert(timm.create_model("test_resnet", num_classes=5), 0.5)
        model(torch.randn(2, 3, 32, 32)).sum().backward()  # shapes alone
        for p in model.parameters():
            assert p.grad.is_meta and p.grad.shape == p.shape
    finally:
        torch.set_default_device(None)


def test_skip_init():
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    model = copy.deepcopy(plain)
    model[0] = nn.utils.skip_init(nn.Conv2d, 3, 8, 3, dtype=torch.float64)
    ssp.convert(model, by_step())
    model.load_state_dict(plain.state_dict())
    expected = run_by_hand(plain, ordinary)
    assert_same(run(model, ordinary), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_moved_and_cast_after_conversion(dtype):
    """The parameters are the same ones to the optimizer, or new ones: both ways they count."""
    model = ssp.convert(net(dtype=torch.float32), by_step())
    optimizer = sgd(model)
    model.to(dtype)
    loss_of(model, 0, dtype=dtype).backward()
    optimizer.step()
    assert ssp.get_controller(model).t == 1
    assert {p.grad.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("swap", [False, True])
def test_swapped_tensors(swap):
    """torch.__future__: a module's tensors are exchanged rather than changed when it moves."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        plain = net(dtype=torch.float32)
        model = ssp.convert(copy.deepcopy(plain), by_step()).double()
        model.load_state_dict(plain.double().state_dict())
        expected = run_by_hand(plain, ordinary)
        assert_same(run(model, ordinary), expected)
        assert ssp.get_controller(model).t == 2
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_without_memory_under_autocast():
    model = ssp.convert(nn.Conv2d(3, 8, 3, device="meta"), 0.5)
    x = torch.empty(2, 3, 6, 6, device="meta")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    y.sum().backward()
    assert y.is_meta and model.weight.grad.shape == model.weight.shape
