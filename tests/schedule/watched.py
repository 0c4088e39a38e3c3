"""A small network under the watchdog, and what it said."""

import warnings

import torch
from torch import nn

import ssprop_patch as ssp


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))


def by_bar(model=None, **arguments):
    return ssp.convert(model or make(), ssp.BarSchedule(0.8), steps_per_epoch=2, **arguments)


def sgd(*modules):
    return torch.optim.SGD([p for m in modules for p in m.parameters()], 1e-3, momentum=0.9)


def image():
    return torch.randn(2, 3, 6, 6)


def forward_and_backward(model):
    model.zero_grad()
    model(image()).square().sum().backward()


def train(model, steps, optimizer=None):
    optimizer = optimizer or sgd(model)
    for _ in range(steps):
        forward_and_backward(model)
        optimizer.step()


def said(function, *args, **kwargs):
    """What the watchdog warns of while a function runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args, **kwargs)
    return [str(w.message) for w in caught if str(w.message).startswith("ssprop_patch:")]


class Foreign:
    """An optimizer that is no torch.optim.Optimizer, as fastai's own."""

    def __init__(self, model):
        self.parameters = list(model.parameters())

    @torch.no_grad()
    def step(self):
        for p in self.parameters:
            p.data.add_(p.grad, alpha=-1e-3)
