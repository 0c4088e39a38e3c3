"""A network to compile, and steps held against eager ones."""

import torch
from torch import nn

from .networks import WSConv2d


class Net(nn.Module):
    """One of each: with bias and batch norm, 'same', grouped, depthwise, own forward, reused."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.same = nn.Conv2d(16, 16, 2, padding="same", padding_mode="circular")
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.own = WSConv2d(16, 16, 3, padding=1)
        self.twice = nn.Conv2d(16, 16, 1)
        self.one = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = self.depthwise(self.grouped(self.same(x))).tanh()
        x = self.twice(self.twice(self.own(x)).tanh())
        gate = self.one(x.mean((2, 3))[:, None])[:, 0]
        return x * gate.sigmoid()[:, :, None, None]


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


class Few(nn.Module):
    """For what does not depend on the kind of layer: half as long to compile."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.own = WSConv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return self.own(self.stem(x).tanh())


def few():
    torch.manual_seed(0)
    return Few().double()


def images(batch=2, size=8, dtype=torch.float64):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def step(call, model, x=None):
    """Output and gradients of one call; batch norm's statistics are put back."""
    buffers = [b.clone() for b in model.buffers()]
    model.zero_grad(set_to_none=True)
    y = call(images() if x is None else x)
    y.square().sum().backward()
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)
    return [y.detach(), *(p.grad for p in model.parameters())]


def assert_same(compiled, eager, rtol=1e-12):
    for one, two in zip(compiled, eager, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            assert one.dtype == two.dtype
            torch.testing.assert_close(one, two, rtol=rtol, atol=rtol)


def assert_as_eager(call, model, x=None, rtol=1e-12):
    assert_same(step(call, model, x), step(model, model, x), rtol)


def sparse_layers(model):
    """Of a step just taken: which convolutions have a weight row that got no gradient."""
    return {
        name
        for name, m in model.named_modules()
        if hasattr(m, "groups") and not m.weight.grad.flatten(1).any(1).all()
    }
