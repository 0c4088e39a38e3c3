"""A backward that is after some gradients only computes those, as torch's own layers do."""

import contextlib

import oracle
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ssprop_patch as ssp

RATE = 0.5
LAYERS = {
    "conv": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2),
    "pointwise": lambda: nn.Conv2d(8, 8, 1),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1),
    "linear": lambda: nn.Linear(8, 8),
}
TYPES = nn.Conv2d, nn.ConvTranspose2d, nn.Linear
over_layers = pytest.mark.parametrize("kind", LAYERS)


def net(kind, rate=RATE):
    torch.manual_seed(0)
    model = nn.Sequential(*(LAYERS[kind]() for _ in range(3))).double()
    return ssp.convert(model, rate, types=TYPES) if rate else model


def x_of(kind):
    return torch.randn(2, 8, 8, 8, dtype=torch.double, requires_grad=True)


class Masks:
    """Takes note of which of dX, dW, db each backward is after."""

    def __init__(self, model):
        self.seen = []
        for layer in model:
            layer._ssprop_policy = layer._ssprop_policy.metered(self)

    def backward(self, x, w, dy, k, mask):
        self.seen.append(tuple(mask))

    def forward(self, *args): ...
    def selected(self, *args): ...
    def computed(self, *args): ...
    def dense(self, *args): ...


WHAT = {
    "x": lambda y, model, x: torch.autograd.grad(y, x),
    "weights": lambda y, model, x: torch.autograd.grad(y, [m.weight for m in model]),
    "first weight": lambda y, model, x: torch.autograd.grad(y, model[0].weight),
    "last bias": lambda y, model, x: torch.autograd.grad(y, model[2].bias),
    "all": lambda y, model, x: torch.autograd.grad(y, [x, *model.parameters()]),
    "into x": lambda y, model, x: y.backward(inputs=[x]),
    "into weights": lambda y, model, x: y.backward(inputs=[m.weight for m in model]),
    "backward": lambda y, model, x: y.backward(),
}
DX, DW, DB = (True, False, False), (False, True, False), (False, False, True)
# Of the layers from the last to the first.
EXPECTED = {
    "x": [DX, DX, DX],
    "weights": [(True, True, False), (True, True, False), DW],
    "first weight": [DX, DX, DW],
    "last bias": [DB],
    "all": [(True, True, True)] * 3,
    "into x": [DX, DX, DX],
    "into weights": [(True, True, False), (True, True, False), DW],
    "backward": [(True, True, True)] * 3,
}


@over_layers
@pytest.mark.parametrize("what", WHAT)
def test_only_what_is_asked_for_is_computed(kind, what):
    model, x = net(kind), x_of(kind)
    masks = Masks(model)
    WHAT[what](model(x).square().sum(), model, x)
    assert masks.seen == EXPECTED[what]


@over_layers
@pytest.mark.parametrize("what", WHAT)
def test_and_is_right(kind, what):
    x, sides = x_of(kind), []
    for model in (net(kind), net(kind, rate=None)):
        x.grad = None
        if ssp.is_converted(model):
            y = model(x)
        else:
            with oracle.network(model, RATE, types=TYPES):
                y = model(x)
        grads = WHAT[what](y.square().sum(), model, x)
        sides.append([*(grads or ()), x.grad, *(p.grad for p in model.parameters())])
    for got, expected in zip(*sides, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("what", ["x", "weights", "into x", "backward"])
def test_the_flops_are_that_share_of_the_dense_ones(rate, what, monkeypatch):
    flops = []
    for model in (net("conv", rate), net("conv", None)):
        x = x_of("conv")
        y = model(x).square().sum()
        with FlopCounterMode(display=False) as counter:
            WHAT[what](y, model, x)
        flops.append(counter.get_total_flops())
    assert flops[0] == pytest.approx((1 - rate) * flops[1])


def test_a_gradient_penalty_is_right():
    grads = []
    for model in (net("conv"), net("conv", None)):
        x = torch.ones(2, 8, 8, 8, dtype=torch.double, requires_grad=True)
        dense = not ssp.is_converted(model)
        masked = oracle.network(model, RATE) if dense else contextlib.nullcontext()
        with masked:
            y = model(x).sin().sum()
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        ((dx.square().sum((1, 2, 3)).sqrt() - 1) ** 2).sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
