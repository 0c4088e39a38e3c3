"""A small converted network, its controller, and a loop that trains it."""

import warnings

import torch
from torch import nn

import ssprop_patch as ssp


def tenths(t):
    return min(t, 9) / 10


def by_step():
    """t counts optimizer steps, and the rate shows t."""
    return ssp.LambdaSchedule(tenths, interval="step")


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 2)
    )


def counting(schedule=None, **arguments):
    """A converted model and its controller."""
    model = ssp.convert(make(), by_step() if schedule is None else schedule, **arguments)
    return model, ssp.get_controller(model)


def sgd(*modules):
    return torch.optim.SGD([p for m in modules for p in m.parameters()], 0.01)


def image():
    return torch.randn(2, 3, 6, 6)


def train(model, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        model(image()).pow(2).sum().backward()
        optimizer.step()


def rows(conv):
    return int(conv.weight.grad.flatten(1).ne(0).any(1).sum())


def steps(model, n=5):
    """The warnings of n optimizer steps."""
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(n):
            optimizer.step()
    return [str(w.message) for w in caught]


def run(model, optimizer, steps):
    """What each step was: t, the rate, and the channels kept in each convolution."""
    controller, log = ssp.get_controller(model), []
    for _ in range(steps):
        before = controller.t, controller.drop_rate
        train(model, optimizer)
        kept = [m.weight.grad.flatten(1).ne(0).any(1).tolist() for m in (model[0], model[2])]
        log.append((*before, kept))
    return log
