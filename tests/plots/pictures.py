"""Pictures to look at, and what can be seen in them."""

from collections import OrderedDict
from unittest import mock

import timm
import torch
from matplotlib.text import Text
from torch import nn

import ssprop_patch as ssp
from ssprop_patch import plots


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 16, 3)).double()


def deep():
    """15 layers."""
    return nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(15)]).double()


def metered(rate=0.5, steps=4, every=1, net=small, **kwargs):
    """Train ``net`` for some steps; return its meter."""
    torch.manual_seed(0)
    model = ssp.convert(net(), rate, **kwargs)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ssp.Meter(model, energy=False, channels_every=every) as meter:
        for _ in range(steps):
            model(torch.randn(2, 3, 12, 12).double()).square().mean().backward()
            optimizer.step()
    return meter


def summary(network):
    return ssp.summary(timm.create_model(network), input_size=(1, 3, 64, 64), drop_rate=0.8)


RUNS = [
    {
        "method": m,
        "seed": s,
        "accuracy": 0.5 + 0.1 * i + 0.05 * e + 0.01 * s,
        "flops": (e + 1) * (3e12 - i * 1e12),
        "seconds": (e + 1) * (10.0 - i) + s,
        "joules": (e + 1) * 700.0,
    }
    for i, m in enumerate(["dense", "ssprop"])
    for s in range(3)
    for e in range(4)
]

FIGURES = {
    "schedule": lambda **ax: plots.schedule(ssp.BarSchedule(0.8), 10, **ax),
    "long schedule": lambda **ax: plots.schedule(
        ssp.StepSchedule([i / 100 for i in range(60)], range(1, 60)), 60, **ax
    ),
    "full schedule": lambda **ax: plots.schedule(0.999, 10, **ax),
    "resnet50": lambda **ax: plots.flops_per_layer(summary("resnet50"), **ax),
    "resnet18": lambda **ax: plots.flops_per_layer(summary("resnet18"), **ax),
    "one layer": lambda **ax: plots.flops_per_layer(
        ssp.summary(nn.Conv2d(3, 8, 3), input_size=(1, 3, 64, 64), drop_rate=0.8), **ax
    ),
    "long names": lambda **ax: plots.flops_per_layer(
        ssp.summary(
            nn.Sequential(OrderedDict({"backbone_encoder_" * 4: nn.Conv2d(3, 8, 3)})),
            input_size=(1, 3, 64, 64),
            schedule=ssp.StepSchedule([i / 100 for i in range(60)], range(1, 60)),
            epochs=60,
        ),
        **ax,
    ),
    "report": lambda **ax: plots.flops_per_layer(metered().report(), **ax),
    "accuracy": lambda **ax: plots.accuracy(RUNS, **ax),
    "one cost": lambda **ax: plots.accuracy(
        [{**r, "flops": "", "joules": None} for r in RUNS], **ax
    ),
    "channels": lambda **ax: plots.channels(metered().channels, **ax),
    "one layer's channels": lambda **ax: plots.channels(metered().channels, ["0"], **ax),
    "twelve layers' channels": lambda **ax: plots.channels(metered(net=deep).channels, **ax),
}


def texts(figure):
    """Return all that is written, as (text, where): what is drawn, and not what might be."""
    figure.draw_without_rendering()  # lays it out
    found = []
    draw = Text.draw

    def noted(self, renderer):
        if self.get_visible() and self.get_text().strip():
            found.append((self, self.get_window_extent()))
        draw(self, renderer)

    with mock.patch.object(Text, "draw", noted):
        figure.draw_without_rendering()
    return found


def words(figure):
    return [text.get_text() for text, _ in texts(figure)]
