"""Networks with batch norms whose gradients are lazy, held against the oracle."""

import copy

import oracle
import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch.core.selection import l1_scores, l2_scores
from ssprop_patch.ops import native

RATE = 0.6
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ORDER = {"l1": 1, "l2": 2}
SCORES = {"l1": l1_scores, "l2": l2_scores}
CAN_BUILD = native.build.find_compiler() is not None
needs_compiler = pytest.mark.skipif(not CAN_BUILD, reason="no C compiler")


class Way:
    """Which selection, computed by what."""

    def __init__(self, selection):
        self.selection, self.order = selection, ORDER[selection]

    def unfused(self, dy):
        """The selection by another name: no norm defers for it."""
        return SCORES[self.selection](dy.clone())


def net(dims=2, groups=1, norm=None, **kwargs):
    make = norm or NORM[dims]
    return nn.Sequential(
        CONV[dims](3, 8, 3, padding=1),
        make(8, **kwargs),
        nn.ReLU(inplace=norm is None),
        CONV[dims](8, 16, 3, stride=2, groups=groups, bias=False),
        make(16, **kwargs),
        nn.Tanh(),
        CONV[dims](16, 4, 1),
    ).double()


def inputs(dims=2, channels=3):
    return torch.randn(4, channels, *[9] * dims, dtype=torch.double, requires_grad=True)


def spread_out(model):
    """Give the norms weights and buffers of every size, as in a network that has been trained."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
            nn.init.uniform_(m.weight, -2, 2)
            nn.init.normal_(m.bias)
    return model


def step(model, x, weigh=None):
    """Gradients of input and parameters, output and buffers, of one training pass."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = model(x)
    weigh = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    (out * weigh).sum().backward()
    grads = [x.grad, *(p.grad for p in model.parameters())]
    return grads, [out.detach(), *(b.clone() for b in model.buffers())]


def assert_same(got, expected, tolerance=1e-10):
    # Of the largest of all: a bias in front of a batch norm has no gradient but rounding.
    largest = max(b.abs().max().item() for b in expected if b is not None)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * largest)


def compare_with_oracle(way, model, x, **kwargs):
    model = spread_out(model)
    dense = copy.deepcopy(model)
    with oracle.network(dense, RATE, order=way.order) as record:
        expected, expected_state = step(dense, x)
    assert record.dropped and record.gap > 1e-9
    ssp.convert(model, RATE, selection=way.selection, **kwargs)
    got, state = step(model, x)
    assert_same(got, expected)
    for a, b in zip(state, expected_state, strict=True):
        assert torch.equal(a, b)


def two_sides(way, **kwargs):
    model = spread_out(net(**kwargs))
    other = copy.deepcopy(model)
    return (
        ssp.convert(model, RATE, selection=way.selection),
        ssp.convert(other, RATE, selection=way.unfused),
    )


def inputs_once():
    return torch.randn(4, 3, 9, 9, dtype=torch.double, generator=torch.Generator().manual_seed(3))
