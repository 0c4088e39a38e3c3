"""Inductor: two graphs that train as eager, and its own layouts."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import ssprop_patch as ssp
from ssprop_patch.ops import custom_ops
from ssprop_patch.ops.channel_ops import is_channels_last

from .compiled import assert_as_eager, assert_same, images, sparse_layers, step
from .compiling import INDUCTOR

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def test_inductor_compiles_two_graphs_that_train_as_eager():
    def small():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8),
        ).double()

    model = ssp.convert(small(), schedule=0)
    counter = CompileCounterWithBackend(INDUCTOR)
    call = torch.compile(model, backend=counter, fullgraph=True)
    for rate in (0, 0.5, 0.8, 0.3, 0):
        ssp.get_controller(model).drop_rate = rate
        assert_as_eager(call, model, rtol=1e-10)
        assert bool(sparse_layers(model)) == (rate > 0)
    assert counter.frame_count == 2


def test_inductor_in_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)).double()
    model = ssp.convert(model.to(memory_format=torch.channels_last), schedule=0.6)
    x = images().contiguous(memory_format=torch.channels_last).requires_grad_()
    call = torch.compile(model, backend=INDUCTOR, fullgraph=True)
    grads = []
    for run in (call, model):
        x.grad = None
        grads.append([*step(run, model, x), x.grad])
    assert_same(*grads, rtol=1e-10)


@pytest.mark.skipif(INDUCTOR != "inductor", reason="what is tested is inductor's layout")
@pytest.mark.parametrize("optimized", [False, True])
def test_inductor_hands_its_own_layout_to_the_backward(optimized, monkeypatch):
    # Where it made the forward channels_last, no copies go back to the format of eager mode.
    torch.manual_seed(0)
    layers = [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    # Of a function the compiler does not know the rates: it calls the operator.
    model = ssp.convert(nn.Sequential(*copy.deepcopy(layers), *layers).double(), lambda t: 0.8)
    x = torch.randn(2, 64, 12, 12).double()
    formats = []
    real = custom_ops.backward.sparse_backward

    def spy(dy, x, w, *args):
        formats.append([is_channels_last(t) for t in (dy, x, w)])
        return real(dy, x, w, *args)

    monkeypatch.setattr(custom_ops.backward, "sparse_backward", spy)
    with torch._inductor.config.patch(layout_optimization=optimized, force_disable_caches=True):
        call = torch.compile(model, backend=INDUCTOR, fullgraph=True)
        compiled = step(call, model, x)
    # But for the gradient of the output, which comes in eager's format in some versions of torch.
    assert [format[1:] for format in formats] == [[optimized] * 2] * 2
    assert formats[1][0] is optimized
    assert_same(compiled, step(model, model, x), rtol=1e-10)
