"""A network whose layers are called in all the ways that matter for timing them."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    """A layer twice, two that are alike, one without gradients, one in another format."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.alike = nn.Conv2d(8, 8, 3, padding=1)
        self.frozen = nn.Conv2d(8, 8, 1).eval().requires_grad_(False)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.wide = nn.Conv2d(8, 20, 1, groups=2)

    def forward(self, x):
        x = self.twice(self.twice(self.stem(x)))
        x = self.norm(self.frozen(self.alike(x)))
        return self.wide(self.drop(x)[:, :, ::2].contiguous(memory_format=torch.channels_last))


def net():
    model = Net().double().train()
    model.frozen.eval()
    return model


X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
