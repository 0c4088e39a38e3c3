"""What a converted network's gradients have to be, layer by layer from ``core.reference``.

The directions are those that the converted network has; all else is worked out anew.
"""

import torch
from torch import nn

from ssprop_patch.core import reference
from ssprop_patch.core.geometry import ConvParams
from ssprop_patch.core.rule import BackwardKind, Extent, kind_of
from ssprop_patch.core.selection import l1_scores, topk_indices


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, layer, policy):
        ctx.save_for_backward(x, w)
        ctx.how = layer, policy
        return type(layer).forward(layer, x)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        layer, policy = ctx.how
        dims, transposed = w.dim() - 2, getattr(layer, "transposed", False)
        if not dims:  # a linear layer on (N, height, width, features)
            x, dy, w = x.movedim(-1, 1), dy.movedim(-1, 1), w[..., None, None]
            p = ConvParams((1, 1), (0, 0), (1, 1), 1)
        else:
            geometry = layer.stride, layer.padding, layer.dilation, layer.groups
            p = ConvParams(*geometry, transposed, layer.output_padding)
        mask = (*ctx.needs_input_grad[:2], ctx.needs_input_grad[2])
        extent = Extent.of(x.shape, w.shape, dy.shape, p.groups, transposed, policy.rule.block)
        k = policy.kept(extent.channels // extent.choices)
        kind = kind_of(policy.rule, extent, k)
        bases = {} if policy.rule.subspace is None else policy.rule.subspace.bases
        how = {"block": kind.block}
        if kind.selected == "channels":
            choices = 1 if extent.is_depthwise else p.groups
            how["kept"] = topk_indices(l1_scores(dy), k, choices)
        elif kind.selected == "output":
            how["u"] = bases["dy"].vectors
        elif kind.selected == "input":
            how["v"] = bases["dx"].vectors if mask[0] else None
            how["t"] = bases["dw"].vectors if mask[1] else None
        kinds.append(kind.selected)
        refreshed = kind.selected == "input" and _refreshed(policy.rule.subspace)
        if kind == BackwardKind("channels"):
            grads = reference.sparse_backward(dy, x, w, p, k, output_mask=mask)
        elif kind.selected == "all" or refreshed:
            grads = reference.dense_backward(dy, x, w, p, mask)
        else:
            grads = reference.whole_backward(dy, x, w, p, mask, **how)
        if not dims:
            grads = grads[0].movedim(1, -1), grads[1][..., 0, 0], grads[2]
        return *grads, None, None


def _refreshed(subspace):
    return subspace.settings.refreshes_at(subspace.passes - 1)


kinds = []


def gradients(model, converted, loss):
    """The gradients of ``loss(model)`` by name, where ``converted`` has just run its backward.

    ``model`` is an unconverted copy, of the buffers of before.
    """
    kinds.clear()
    policies = {
        name: vars(m)["_ssprop_policy"]
        for name, m in converted.named_modules()
        if "_ssprop_policy" in vars(m)
    }
    for name, policy in policies.items():
        layer = model.get_submodule(name)
        layer.forward = _forward(layer, policy)
    model.zero_grad()
    loss(model).backward()
    for name in policies:
        del vars(model.get_submodule(name))["forward"]
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _forward(layer, policy):
    def forward(x):
        return _Layer.apply(x, layer.weight, layer.bias, layer, policy)

    return forward


class Net(nn.Module):
    """Layers of every kind: both sides, groups, depthwise, transposed, linear."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)  # output side, needs no dX
        self.norm = nn.BatchNorm2d(16)
        self.expand = nn.Conv2d(16, 64, 1, bias=False)  # input side
        self.depthwise = nn.Conv2d(64, 64, 3, stride=2, padding=1, groups=64)
        self.grouped = nn.Conv2d(64, 24, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(24, 16, 4, stride=2, padding=1)
        self.head = nn.Linear(16, 30)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.depthwise(self.expand(x)))
        x = torch.tanh(self.up(torch.relu(self.grouped(x))))
        return self.head(x.movedim(1, -1)).mean((1, 2))


TYPES = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def make():
    torch.manual_seed(0)
    return Net().double()


def images(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, 3, 9, 9, generator=g, dtype=torch.float64)


def loss(model, x=None):
    y = model(images() if x is None else x)
    return (y * torch.linspace(0.1, 1, y.shape[1])).pow(2).sum()


def subspaces(model):
    """The layers that have directions, by name."""
    found = {
        name: vars(m)["_ssprop_policy"].rule.subspace
        for name, m in model.named_modules()
        if "_ssprop_policy" in vars(m)
    }
    return {name: subspace for name, subspace in found.items() if subspace is not None}


def passes(model, number=4):
    """Run so many training passes; the gradients of the last one by name."""
    for seed in range(number):
        model.zero_grad()
        loss(model, images(seed)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
