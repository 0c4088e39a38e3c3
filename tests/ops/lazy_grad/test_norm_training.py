"""Ways of training through a batch norm whose gradient is lazy."""

import copy

import oracle
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import ssprop_patch as ssp
from ssprop_patch.ops import native

from .norms import (
    RATE,
    assert_same,
    inputs,
    inputs_once,
    needs_compiler,
    net,
    spread_out,
    step,
    two_sides,
)

pytestmark = pytest.mark.usefixtures("however_small")


def test_twice_through_a_retained_graph(way):
    grads = []
    for model in two_sides(way):
        loss = model(inputs_once()).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert_same(*grads)


def test_double_backward(way):
    grads = []
    for model in two_sides(way):
        x = inputs_once().requires_grad_()
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    assert_same(*grads)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(way, reentrant, formed):
    grads = []
    for model in two_sides(way):
        x = inputs_once().requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    assert_same(*grads)
    assert formed["part"] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(way, dtype, formed):
    outs = []
    for model in two_sides(way):
        model.float()
        x = inputs_once().float()
        with torch.autocast("cpu", dtype):
            out = model(x)
        out.float().square().sum().backward()
        outs.append((out, [p.grad for p in model.parameters()]))
    # In half precision the sums of |dy| are not computed apart.
    assert formed["part"] == (2 if way.order == 2 else 0)
    assert torch.equal(outs[0][0], outs[1][0])
    # The same kernels on the same chosen channels.
    for a, b in zip(outs[0][1], outs[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * b.abs().max().item())


@pytest.mark.parametrize("mode", ["norm", "all"])
def test_in_eval_mode_all_is_dense(way, mode, formed):
    model = spread_out(net())
    dense = copy.deepcopy(model)
    ssp.convert(model, RATE, selection=way.selection)
    for m in (model, dense):
        if mode == "all":
            m.eval()
        else:
            m[1].eval()
            m[4].eval()
    if mode == "all":
        got, expected = step(model, inputs_once()), step(dense, inputs_once())
        assert_same([*got[0], *got[1]], [*expected[0], *expected[1]], 0.0)
    else:  # the convolutions are sparse, on a gradient that is not the closed form's
        with oracle.network(dense, RATE, order=way.order):
            expected = step(dense, inputs_once())[0]
        assert_same(step(model, inputs_once())[0], expected)
    assert not any(formed.values())


def test_at_rate_0_all_is_dense(way, formed):
    model = spread_out(net())
    expected = step(copy.deepcopy(model), inputs_once())
    got = step(ssp.convert(model, 0.0, selection=way.selection), inputs_once())
    assert_same([*got[0], *got[1]], [*expected[0], *expected[1]], 0.0)
    assert not any(formed.values())


def test_compiled_without_a_graph_break(way):
    model, other = two_sides(way)
    counter = CompileCounterWithBackend("aot_eager")
    got = step(torch.compile(model, backend=counter, fullgraph=True), inputs_once())[0]
    assert counter.frame_count == 1
    assert_same(got, step(other, inputs_once())[0])


def test_under_compiled_autograd_the_backward_is_one_graph(way, formed):
    grads = []
    for model in two_sides(way):
        loss = model(inputs_once()).square().sum()
        counters.clear()
        torch._dynamo.reset()
        torch._dynamo.compiled_autograd.reset()
        with torch._dynamo.config.patch(compiled_autograd=True):
            torch.compile(lambda loss: loss.backward(), backend="aot_eager")(loss)
        breaks = [reason for reason in counters["graph_break"] if "backward() call" not in reason]
        assert counters["compiled_autograd"]["captures"] == 1 and not breaks
        grads.append([p.grad for p in model.parameters()])
    assert_same(*grads)
    assert not any(formed.values())


def test_batched_gradients_are_a_clear_error(way):
    model, x = ssp.convert(net(), RATE, selection=way.selection), inputs()
    y = model(x)
    with pytest.raises(RuntimeError, match=r"does not work inside torch\.func.*is_grads_batched"):
        torch.autograd.grad(y, x, torch.ones(2, *y.shape).double(), is_grads_batched=True)


@needs_compiler
def test_when_the_c_functions_go_away_in_between_the_gradient_is_right(monkeypatch):
    model = spread_out(net())
    dense, x = copy.deepcopy(model), inputs_once()
    with oracle.network(dense, RATE):
        expected = step(dense, x)[0]
    ssp.convert(model, RATE)
    x.requires_grad_()
    out = model(x)
    monkeypatch.setattr(native.tensors, "library", lambda *args: None)
    weigh = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    (out * weigh).sum().backward()
    assert_same([x.grad, *(p.grad for p in model.parameters())], expected)
