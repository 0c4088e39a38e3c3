"""Train a converted network, and a plain copy by hand with masked gradients; compare.

A way of training is written once, as a generator ``train(model)`` that makes its own optimizer and
yields after each optimizer step, with anything that is to be compared as well. It runs over a
converted copy, which looks after itself, and over a plain one, whose gradients the oracle masks
at the rate that is due in that step. The rate differs from step to step, so a step counted once
too often, or not at all, shows in the weights.
"""

import contextlib
from unittest import mock

import oracle
import timm
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch import kernels
from ssprop_patch.ops.algorithms import Algorithms

RATES = (0.75, 0.5, 0.25)


def falling(t):
    """The drop rate of optimizer step t."""
    return RATES[min(t, len(RATES) - 1)]


def by_step():
    return ssp.LambdaSchedule(falling, interval="step")


def net(name="test_resnet", dtype=torch.float64, **kwargs):
    """One of timm's miniature networks, with every residual branch awake.

    They begin with scales of (nearly) zero, behind which no gradient arrives.
    """
    model = timm.create_model(name, num_classes=5, **kwargs)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2 and "bias" not in name and p.abs().max() < 1e-3:
                p.fill_(0.5)
    return model.to(dtype).train()


def tiny():
    """All kinds of convolution, without norms: every parameter has a gradient."""
    return (
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.Tanh(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.Conv2d(8, 16, 1, stride=2),
            nn.Tanh(),
            nn.Conv2d(16, 16, 3, groups=4),
            nn.Flatten(),
            nn.Linear(2304, 5),
        )
        .double()
        .train()
    )


def batch(i, size=32, dtype=torch.float64, n=4):
    """Images and labels number i."""
    generator = torch.Generator().manual_seed(i)
    images = torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(5, (n,), generator=generator)


def loss_of(model, i, **kwargs):
    images, labels = batch(i, **kwargs)
    return nn.functional.cross_entropy(model(images), labels)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def ordinary(model, steps=2, lr=0.1):
    """The way of training that needs no explanation."""
    optimizer = sgd(model, lr)
    for i in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, i)
        loss.backward()
        optimizer.step()
        yield loss.detach()


class Result:
    """What a training leaves behind: parameters and buffers, and what it yielded on the way."""

    def __init__(self, model, yielded):
        self.state = {
            **{name: p.detach() for name, p in model.named_parameters()},
            **dict(model.named_buffers()),
        }
        self.yielded = yielded


def run(model, train):
    """Train a converted network."""
    torch.manual_seed(1)
    return Result(model, list(train(model)))


def ranked(dy):
    """Scores for ``selection=`` that leave no tie, in half precision a common thing: the oracle's.

    Among equals the oracle keeps the first.
    """
    scores = oracle.importance(dy)
    order = sorted(range(len(scores)), key=lambda c: scores[c], reverse=True)
    return torch.tensor(order).argsort().neg().float()


def run_by_hand(model, train, rates=falling, least_gap=1e-9):
    """Train a plain network with masked gradients; the rate is asked for before each step."""
    torch.manual_seed(1)
    yielded, dropped = [], 0
    steps = train(model)
    while True:
        with oracle.network(model, rates(len(yielded))) as record:
            try:
                yielded.append(next(steps))
            except StopIteration:
                break
        assert record.gap >= least_gap, "two channels all but tie: use another seed"
        dropped += record.dropped
    assert dropped, "the oracle dropped no channel"
    return Result(model, yielded)


def assert_same(result, expected, *, exact=False, rtol=1e-9, atol=1e-11):
    """The same training; bit for bit if ``exact``."""
    if exact:
        rtol = atol = 0
    assert all(t.isfinite().all() for t in expected.state.values()), "nothing left to compare"
    close = dict(rtol=rtol, atol=atol)
    torch.testing.assert_close(result.state, expected.state, **close)
    torch.testing.assert_close(result.yielded, expected.yielded, **close)


def one_kernel():
    """Let every layer mask dy and call torch's dense kernel, as the oracle does.

    What is left to differ is all but the kernel, and that must be equal bit for bit.
    """
    return mock.patch.object(kernels, "choose", lambda *args: Algorithms("mask", "mask"))


def compare(make, train, *, hand=None, after=None, steps=2, exact=False):
    """Train both ways, expect ``steps`` optimizer steps and the same network; return both.

    Args:
        make: Makes the network, each time the same.
        train: A way of training.
        hand: The way by hand, where it is to be another than ``train``.
        after: ``after(model)`` changes the network once it is converted.
        steps: How many optimizer steps ``train`` takes.
        exact: Bit for bit, with the kernel and the order of channels of the oracle.
    """
    plain, model = _make(make), _make(make)
    ssp.convert(model, by_step(), selection=ranked if exact else "l1")
    if after is not None:
        for m in (plain, model):
            torch.manual_seed(2)
            after(m)
    expected = run_by_hand(plain, hand or train, least_gap=0 if exact else 1e-9)
    with one_kernel() if exact else contextlib.nullcontext():
        result = run(model, train)
    assert len(result.yielded) == steps
    assert ssp.get_controller(model).t == steps
    assert_same(result, expected, exact=exact)
    return model, plain


def _make(make):
    torch.manual_seed(0)
    return make()
