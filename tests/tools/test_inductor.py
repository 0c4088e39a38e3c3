"""With the compiler that users run: what only generated code can get wrong."""

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import ssprop_patch as ssp

from .compiling import INDUCTOR
from .networks import assert_same, gradients, images, oracle_gradients, tiny


class Checkpointed(nn.Module):
    def __init__(self, layers, last):
        super().__init__()
        self.layers, self.last = layers, last

    def forward(self, x):
        return self.last(checkpoint(self.layers, x, use_reentrant=False))


def checkpointed():
    """With a layer of its own forward behind, and a 1x1 convolution, a matrix product."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 1))
    return Checkpointed(layers, tiny().own.float()).double()


def test_a_compiled_model_is_converted_trained_by_a_schedule_and_reverted():
    """Three graphs: plain, sparse at every rate, and plain again, which is the first."""
    schedule = ssp.CosineSchedule(0.75, 0.25, 4, interval="step")
    plain, model = checkpointed(), checkpointed()
    counter = CompileCounterWithBackend(INDUCTOR)
    call = torch.compile(model, backend=counter, fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (plain, model)]
    graphs = []

    def step(rate):
        expected = oracle_gradients(plain, images(), rate) if rate else gradients(plain, images())
        # Sums of 100 terms in another order, over weights that differ by as much.
        assert_same(gradients(model, images(), call), expected, rtol=1e-9, atol=1e-11)
        for optimizer in optimizers:
            optimizer.step()
        graphs.append(counter.frame_count)

    step(0)
    ssp.convert(call, schedule=schedule)
    for t in range(4):
        step(schedule(t))
    ssp.revert(call)
    step(0)
    assert graphs == [1, 2, 2, 2, 2, 2]


def cast(call):
    """As in a training step with automatic mixed precision."""

    def run(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = call(x)
        assert y.dtype == torch.bfloat16
        return y.float()

    return run


def test_autocast_in_channels_last_at_any_size():
    def make():
        return tiny(torch.float32).to(memory_format=torch.channels_last)

    model, counter = ssp.convert(make(), 0.5), CompileCounterWithBackend(INDUCTOR)
    call = cast(torch.compile(model, backend=counter, fullgraph=True, dynamic=True))
    for batch, size in ((2, 8), (3, 8), (5, 10)):
        x = images(batch, size, torch.float32).contiguous(memory_format=torch.channels_last)
        plain = make()
        # The compiler may round elsewhere than eager code, to 8 bits: no channel so near a tie.
        expected = oracle_gradients(plain, x, 0.5, cast(plain), least_gap=2**-7)
        found = gradients(model, x, call)
        for name, gradient in expected.items():
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(
                found[name], gradient, rtol=0, atol=2**-8 * gradient.abs().max().item()
            )
    assert counter.frame_count <= 2
