"""Small networks, a training loop, and the FLOPs of a run counted in other ways than a meter's."""

import contextlib

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ssprop_patch as ssp
from ssprop_patch.flops.totals import Flops

RATES = (0.0, 0.75, 0.5, 0.0, 0.3)


def rate_at(t):
    """The drop rate of optimizer step t."""
    return RATES[t % len(RATES)]


def by_step():
    return ssp.LambdaSchedule(rate_at, interval="step")


def net(dtype=torch.float64, groups=1):
    """Stem, body and head, an own forward not among them; biases on some."""
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.Tanh(),
            nn.Conv2d(8, 12, 3, stride=2, groups=groups),
            nn.Tanh(),
            nn.Conv2d(12, 6, 1, bias=False),
            nn.Flatten(),
            nn.Linear(6 * 7 * 7, 5),
        )
        .to(dtype)
        .train()
    )


def batch(i, n=2, size=16, dtype=torch.float64):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(i)).to(dtype)


def loss_of(out):
    return out.square().mean() + out.sum() / 10


def train(model, steps, optimizer=None, call=None, start=0):
    """The ordinary loop."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
    for i in range(start, start + steps):
        loss_of((call or model)(batch(i))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def gradients(model, x, call=None):
    model.zero_grad(set_to_none=True)
    loss_of((call or model)(x)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@contextlib.contextmanager
def quiet_meter(model, **kwargs):
    """A meter that measures no energy."""
    with ssp.Meter(model, energy=kwargs.pop("energy", False), **kwargs) as meter:
        yield meter


def by_summary(model, x, rates):
    """Forward, dense backward, and backward FLOPs of one step at each of ``rates``."""
    return _triple(ssp.summary(model, inputs=x, drop_rate=rate).totals for rate in rates)


def layers_by_summary(model, x, rates):
    """The same of the layers alone."""
    found = [ssp.summary(model, inputs=x, drop_rate=rate) for rate in rates]
    return _triple(
        Flops(row.forward, row.dense_backward, row.sparse_backward)
        for s in found
        for row in s.layers
    )


def _triple(flops):
    total = sum(flops, Flops())
    return total.forward, total.dense_backward, total.backward


def counted(meter):
    """The same three of a meter, of the whole network."""
    return _triple([meter.network])


def layers_counted(meter):
    """Of its layers alone."""
    return _triple([meter.totals.flops])


def by_torch(run):
    """FLOPs of the convolutions and matrix products of ``run()`` as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
