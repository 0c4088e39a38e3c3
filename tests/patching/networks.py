"""Networks and classes of layers to be converted, and what is asked of them."""

import torch
import torch.nn.functional as F
from torch import nn

from ssprop_patch.schedule.step_counter import Membership


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.norm(self.conv1(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = Block(8)
        self.layer2 = Block(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


NAMES = ["stem", "layer1.conv1", "layer1.conv2", "layer2.conv1", "layer2.conv2"]


class Standardised(nn.Conv2d):
    """Weight standardisation in a forward of its own; F.conv2d gets everything by position."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ByKeyword(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(
            input=x, weight=self.weight * 2, bias=self.bias, padding=self.padding, stride=1
        )


class OnlyConvForward(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * 3, bias)


class ThroughConvForward(nn.Conv2d):
    def forward(self, x, scale=1.0):
        return self._conv_forward(x, self.weight * scale, self.bias)


OWN = [Standardised, ByKeyword, OnlyConvForward, ThroughConvForward]


def image(n=4, size=6):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def make(cls=Net, *args, **kwargs):
    torch.manual_seed(0)
    return cls(*args, **kwargs)


def loss(y):
    return (y * torch.linspace(0.1, 1.0, y[0].numel()).view(y[0].shape)).pow(2).sum()


def backward(model, x=None):
    """One pass; the gradients by name, copied."""
    model.zero_grad()
    loss(model(image() if x is None else x)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def rows(grad):
    """How many output channels got a gradient."""
    return int(grad.flatten(1).ne(0).any(1).sum())


def all_rows(grads):
    return {n.removesuffix(".weight"): rows(g) for n, g in grads.items() if g.dim() == 4}


def assert_same(grads, others):
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, others[name]), name


def snapshot(model):
    """Every module's class and attributes; equal only if the very same objects are in place."""

    def content(value):
        if isinstance(value, Membership):  # made anew, with the same meaning
            return "membership", value.controller
        return dict(value) if isinstance(value, dict) else value

    return {
        name: (type(m), {k: content(v) for k, v in vars(m).items()})
        for name, m in model.named_modules(remove_duplicate=False)
    }


def optimizer_step(model):
    torch.optim.SGD(model.parameters(), 0.0).step()
