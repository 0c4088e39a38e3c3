"""Small networks, and their gradients: as the package computes them, and as the oracle does."""

import oracle
import timm
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn

import ssprop_patch as ssp


class WSConv2d(nn.Conv2d):
    """A forward of its own: the weight is standardised, then convolved with."""

    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), True), self.weight.std((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (std + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Small(nn.Module):
    """Without bias before a batch norm, own forward, depthwise, grouped; a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.own = WSConv2d(8, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = self.grouped(self.depthwise(self.own(x)).tanh())
        return self.head(x.square().mean((2, 3)))


def small(dtype=torch.float64):
    """In training mode, with weights that are the same in every call."""
    torch.manual_seed(0)
    return Small().to(dtype)


class Tiny(nn.Module):
    """The least that has a stock layer and one of its own forward: compilers take their time."""

    def __init__(self):
        super().__init__()
        self.stock = nn.Conv2d(3, 8, 3)
        self.own = WSConv2d(8, 8, 3)

    def forward(self, x):
        return self.own(self.stock(x).tanh())


def tiny(dtype=torch.float64):
    torch.manual_seed(0)
    return Tiny().to(dtype)


class OwnForwards(nn.Module):
    """timm's layers that write their own forward: "same" padding, standardised weights."""

    def __init__(self):
        super().__init__()
        self.same = timm.layers.Conv2dSame(3, 8, 3, stride=2)
        self.scaled = timm.layers.ScaledStdConv2d(8, 8, 3, padding=1)
        self.both = timm.layers.StdConv2dSame(8, 8, 3, stride=2)

    def forward(self, x):
        return self.both(self.scaled(self.same(x).tanh()).tanh()).mean((2, 3))


def own_forwards(dtype=torch.float64):
    torch.manual_seed(0)
    return OwnForwards().to(dtype)


def from_timm(name, dtype=torch.float64, **kwargs):
    """One of timm's miniature networks, with every residual branch awake.

    They begin with scales of (nearly) zero, behind which no gradient arrives.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **kwargs)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2 and "bias" not in name and p.abs().max() < 1e-3:
                p.fill_(0.5)
    return model.to(dtype).train()


def images(batch=2, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)


def tensors_of(out):
    """The tensors in an output: of a head, of a list or a dict of features, or of both."""
    if isinstance(out, torch.Tensor):
        return [out]
    parts = out.values() if isinstance(out, dict) else out
    return [t for part in parts for t in tensors_of(part)]


def loss_of(out):
    return sum(t.square().mean() for t in tensors_of(out))


def gradients(model, x, call=None):
    """Of one pass: every parameter's gradient, by name; None where there is none."""
    model.zero_grad(set_to_none=True)
    loss_of((model if call is None else call)(x)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def oracle_gradients(model, x, drop_rate, call=None, least_gap=1e-6):
    """The same of an unconverted model, by masking; its choice must not be a matter of rounding."""
    assert not ssp.is_converted(model)
    with oracle.network(model, drop_rate) as record:
        found = gradients(model, x, call)
    assert record.gap > least_gap, "two channels all but tie: use another seed"
    assert record.dropped, "the oracle dropped no channel"
    return found


def assert_same(found, expected, rtol=1e-9, atol=1e-12):
    """Equal up to the order of summation; that is what the default allows in float64."""
    assert any(t is not None and t.any() for t in expected.values()), "nothing to compare"
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def assert_equal(found, expected):
    """Bit for bit."""
    assert_same(found, expected, rtol=0, atol=0)


def assert_trains_sparsely(model, make, x, drop_rate):
    """``model`` is what ``make()`` makes, converted, and one pass of it is what it should be."""
    assert_same(gradients(model.train(), x), oracle_gradients(make(), x, drop_rate))
