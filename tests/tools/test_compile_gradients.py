"""What compiled networks compute."""

import oracle
import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch import functional

from .compiled import assert_as_eager, assert_same, few, images, net, sparse_layers, step
from .networks import WSConv2d

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def strides(t):
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def test_compiled_gradients_equal_the_oracle():
    model = net()
    with oracle.network(model, 0.7) as record:
        expected = step(model, model)
    assert record.gap > 1e-9
    ssp.convert(model, schedule=0.7)
    assert_same(step(torch.compile(model, backend="aot_eager", fullgraph=True), model), expected)


@pytest.mark.parametrize("frozen", ["weight", "bias", "stem", "everything but stem", "input"])
def test_frozen_parameters(frozen):
    model, x = few(), images()
    for name, p in model.named_parameters():
        if frozen == "everything but stem":
            p.requires_grad_("stem" in name)
        else:
            p.requires_grad_(frozen not in name)
    x.requires_grad_(frozen != "input")
    ssp.convert(model, schedule=0.6)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    grads = []
    for run in (call, model):
        x.grad = None
        grads.append([*step(run, model, x), x.grad])
    assert_same(*grads)
    assert any(g is None for g in grads[0])


@pytest.mark.parametrize(
    "selection",
    ["l2", "random", lambda dy: dy.abs().amax((0, 2, 3))],
    ids=["l2", "random", "callable"],
)
def test_selections(selection):
    model = ssp.convert(few(), schedule=0.6, selection=selection)
    controller = ssp.get_controller(model)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    grads = []
    for run in (call, model):
        controller.manual_seed(5)
        grads.append(step(run, model))
        grads.append(step(run, model))
    assert_same(grads[0], grads[2])
    assert_same(grads[1], grads[3])
    if selection == "random":
        assert not torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_autocast(inside):
    model = ssp.convert(net(torch.float32), schedule=0.6)
    x = images(dtype=torch.float32)

    def cast(call):
        def run(x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = call(x)
            assert y.dtype == torch.bfloat16
            return y.float()

        return run

    def compiled(call):
        return torch.compile(call, backend="aot_eager", fullgraph=True)

    run = compiled(cast(model)) if inside else cast(compiled(model))
    one, two = step(run, model, x), step(cast(model), model, x)
    for a, b in zip(one, two, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * b.abs().max().item())
    assert sparse_layers(model) == {"stem", "same", "grouped", "depthwise", "own", "twice"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last(dtype):
    model = ssp.convert(net(dtype).to(memory_format=torch.channels_last), schedule=0.6)
    x = images(dtype=dtype).contiguous(memory_format=torch.channels_last)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    one, two = step(call, model, x), step(model, model, x)
    for a, b, p in zip(one[1:], two[1:], model.parameters(), strict=True):
        assert strides(a) == strides(b) == strides(p)
        torch.testing.assert_close(
            a, b, rtol=0, atol=32 * torch.finfo(dtype).eps * b.abs().max().item()
        )


@pytest.mark.parametrize("dynamic", [True, None])
def test_other_batch_and_image_sizes(dynamic):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), WSConv2d(8, 8, 3, groups=2)).double()
    ssp.convert(model, schedule=0.6)
    call = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch, size in ((2, 8), (3, 8), (4, 10)):
        assert_as_eager(call, model, images(batch, size))


@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_functional_form(dims, drop_rate):
    conv = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[dims]
    x = torch.randn(2, 4, *[5] * dims).double()
    w = torch.randn(8, 2, *[2] * dims).double().requires_grad_()
    b = torch.randn(8).double().requires_grad_()

    def call(x):
        return conv(x, w, b, 1, "same", groups=2, drop_rate=drop_rate)

    grads = []
    for run in (torch.compile(call, backend="aot_eager", fullgraph=True), call):
        w.grad = b.grad = None
        run(x).pow(3).sum().backward()
        grads.append([w.grad, b.grad])
    assert_same(*grads)
    assert (w.grad.flatten(1).any(1).sum() < 8) == (drop_rate > 0)
