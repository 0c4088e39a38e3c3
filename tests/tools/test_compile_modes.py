"""torch.compile in the ways that users combine with it: checkpointing, regions, strict settings."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import ssprop_patch as ssp

from .networks import (
    WSConv2d,
    assert_equal,
    assert_same,
    from_timm,
    gradients,
    images,
    oracle_gradients,
    tiny,
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "schedule",
    [
        ssp.LinearSchedule(0.1, 0.8, 12, interval="step"),
        ssp.BarSchedule(0.8, period=2, interval="step"),
    ],
    ids=lambda s: type(s).__name__,
)
def test_once_both_graphs_are_there_torch_may_forbid_any_other(schedule):
    model = ssp.convert(tiny(), schedule=schedule)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    controller = ssp.get_controller(model)
    for t in (0, 1):
        controller.step(t)
        gradients(model, images(), call)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in range(2, 13):
            controller.step(t)
            expected = (
                gradients(tiny(), images())
                if schedule(t) == 0
                else (oracle_gradients(tiny(), images(), schedule(t)))
            )
            assert_same(gradients(model, images(), call), expected)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(x).tanh() + x


def test_only_blocks_compiled():
    """Regional compilation: the blocks are alike, and share a graph."""

    def make():
        torch.manual_seed(0)
        blocks = [Block() for _ in range(4)]
        return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, WSConv2d(8, 8, 3)).double()

    counts = []
    for model in (make(), ssp.convert(make(), 0.5)):
        torch._dynamo.reset()
        backend = CompileCounterWithBackend("aot_eager")
        for block in model[1:5]:
            block.compile(backend=backend, fullgraph=True)
        found = gradients(model, images())
        counts.append(backend.frame_count)
    assert counts[1] == counts[0] > 0
    assert_same(found, oracle_gradients(make(), images(), 0.5))


# --- activation checkpointing -------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return checkpoint(self.layers, x, use_reentrant=False)


def stock():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3, groups=8)).double()


def test_checkpointing_inside_of_a_compiled_network_breaks_no_graph():
    model = ssp.convert(Checkpointed(stock()), 0.5)
    backend = CompileCounterWithBackend("aot_eager")
    call = torch.compile(model, backend=backend, fullgraph=True)
    for rate in (0.5, 0.75):
        ssp.get_controller(model).drop_rate = rate
        expected = oracle_gradients(Checkpointed(stock()), images(), rate)
        assert_same(gradients(model, images(), call), expected)
    assert backend.frame_count == 2  # of the schedule's rate, and of all others


# By default torch breaks the graph at such a layer, for it is entered within a mode of torch's.
NO_BREAKS = {"skip_fwd_side_effects_in_bwd_under_checkpoint": True}


@pytest.mark.parametrize("settings", [{}, NO_BREAKS], ids=["graph break", "whole"])
def test_checkpointed_layers_with_a_forward_of_their_own(settings):
    if any(not hasattr(torch._dynamo.config, name) for name in settings):
        settings = {}  # torch 2.6 does not know it
    expected = oracle_gradients(Checkpointed(tiny()), images(), 0.5)
    model = ssp.convert(Checkpointed(tiny()), 0.5)
    with torch._dynamo.config.patch(settings):
        call = torch.compile(model, backend="aot_eager", fullgraph=bool(settings))
        assert_same(gradients(model, images(), call), expected)


def test_timms_own_checkpointing_compiled():
    x, model = images(size=32), from_timm("test_resnet")
    expected = oracle_gradients(from_timm("test_resnet"), x, 0.6)
    model.set_grad_checkpointing(True)
    ssp.convert(model, 0.6)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(gradients(model, x, call), expected)


# --- no training --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_with_a_compiled_model_is_the_plain_one(mode):
    plain, model = tiny().eval(), ssp.convert(tiny(), 0.5).eval()
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    with mode():
        assert torch.equal(call(images()), plain(images()))
    assert_equal(gradients(model, images(), call), gradients(plain, images()))
    assert_same(gradients(model.train(), images(), call), oracle_gradients(tiny(), images(), 0.5))
