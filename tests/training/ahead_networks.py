"""Small networks whose channels are chosen ahead, for the tests of these."""

import timm
import torch
import torch.nn.functional as F
from torch import nn

import ssprop_patch as ssp

BLOCK = 4


def a_network(layers=(1, 2)):
    torch.manual_seed(0)
    channels = (12, 16, 16, 16)
    stages = (*layers, *(0,) * (4 - len(layers)))
    model = timm.create_model(
        "resnet18", layers=stages, channels=channels, num_classes=5, stem_width=8
    )
    model.maxpool = nn.Identity()
    with torch.no_grad():  # of the norms that begin with zero, nothing goes back
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model.double().train()


def batch(size=24, number=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(number, 3, size, size, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 5, (number,), generator=generator)


def backward(model, size=24):
    x, y = batch(size)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def scores_of(module):
    return module._ssprop_policy.rule.ahead


def converted(model, rate=0.6, **settings):
    selection = ssp.Ahead(**settings) if settings else "ahead"
    return ssp.convert(model, rate, selection=selection, remainder="coarse")


def ready(model):
    converted(model, look_interval=100)
    for _ in range(4):
        backward(model)
    return model
