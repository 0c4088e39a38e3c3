"""A network that trains with the Triton kernels."""

import copy

import oracle
import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch.ops import channel_ops, triton_kernels
from ssprop_patch.ops.lazy_grad import graph as lazy_grad

from .places import everywhere


def noted(function, calls):
    def call(*args):
        calls.append(function.__name__)
        return function(*args)

    return call


def train_with_them(device, selection, memory_format):
    """Return the gradients of a network whose passes they do, and of the oracle; their calls."""
    torch.manual_seed(0)
    model = (
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 3, bias=False),
            nn.BatchNorm2d(16, affine=False),
            nn.ReLU(),
            nn.Conv2d(16, 5, 1),
        )
        .double()
        .to(device, memory_format=memory_format)
    )
    nn.init.uniform_(model[1].weight, -2, 2)
    x = torch.randn(4, 3, 9, 9, dtype=torch.double, device=device)
    x = x.contiguous(memory_format=memory_format)
    dense = copy.deepcopy(model)
    with oracle.network(dense, 0.6, order={"l1": 1, "l2": 2}[selection]) as record:
        dense(x).square().sum().backward()
    assert record.dropped
    ssp.convert(model, 0.6, selection=selection)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy_grad, "_MIN_ELEMENTS", 0)
        patch.setattr(lazy_grad, "_MIN_RELU_ELEMENTS", 0)
        patch.setattr(channel_ops, "_kernels", lambda t: triton_kernels)
        patch.setattr(triton_kernels, "is_available", lambda t: True)
        for name in ("channel_sums", "take_channels", "norm_grad_sums", "norm_input_grad"):
            patch.setattr(triton_kernels, name, noted(getattr(triton_kernels, name), calls))
        model(x).square().sum().backward()
    grads = [[p.grad.cpu() for p in m.parameters()] for m in (model, dense)]
    return *grads, calls


@everywhere
@pytest.mark.parametrize("selection", ["l1", "l2"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_network_trains_with_them(run, selection, memory_format):
    got, expected, calls = run(train_with_them, run.device, selection, memory_format)
    largest = max(g.abs().max() for g in expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * largest.item())
    assert calls.count("norm_input_grad") == 2  # both norms have theirs formed in part
    assert calls.count("norm_grad_sums") == (2 if selection == "l1" else 0)
    assert calls.count("channel_sums") == 1  # of the last layer, which has no norm
