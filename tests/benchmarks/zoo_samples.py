"""Small networks for the checks of the zoo."""

from __future__ import annotations

import torch
from torch import nn
from zoo import check, models
from zoo.models import Entry, Sample


def entry_of(library: str, name: str) -> Entry:
    return next(e for e in models.entries() if (e.library, e.name) == (library, name))


def check_sample(sample: Sample) -> tuple[tuple[str, str], dict]:
    found: dict = {}
    return check.check(sample, 0, found), found


def small(*more: nn.Module) -> Sample:
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), *more, nn.Conv2d(8, 8, 3, groups=2)
    return Sample(nn.Sequential(*layers), (torch.randn(2, 3, 12, 12),))
