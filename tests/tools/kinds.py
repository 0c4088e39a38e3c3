"""Kinds of layers that tools meet, and which channels of them are kept."""

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn


class Doubled(nn.Conv2d):
    """A forward of its own, readable by TorchScript."""

    def forward(self, x):
        weight = self.weight * 2
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ThroughConvForward(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight * 2, self.bias)


class OnlyInit(nn.Conv2d):
    """Stock but for its name: torch.fx traces through it, as it is none of torch's own."""


KINDS = [nn.Conv2d, OnlyInit, Doubled, ThroughConvForward]


def make(cls):
    torch.manual_seed(0)
    return nn.Sequential(cls(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), cls(8, 8, 3))


def image(size=6):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def rows(grad):
    return int(grad.flatten(1).ne(0).any(1).sum())


def kept(model, x=None):
    """Of each 4-d weight the channels that a pass keeps; by name."""
    model.zero_grad()
    out = model(image() if x is None else x)
    out = list(out.values()) if isinstance(out, dict) else out
    out = out if isinstance(out, list) else [out]
    sum(o.pow(2).sum() for o in out).backward()
    return {
        n: rows(p.grad) for n, p in model.named_parameters() if p.dim() == 4 and p.grad is not None
    }
