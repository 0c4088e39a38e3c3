"""A training of two steps an epoch, one epoch dense and one sparse."""

from __future__ import annotations

import torch
from ddpm.settings import Settings, parse, runs

# Two steps an epoch, one epoch dense and one sparse.
TINY = [
    "--data",
    "digits",
    "--image-size",
    "8",
    "--channels",
    "8",
    "16",
    "--blocks",
    "1",
    "--share",
    "0.1",
    "--batch-size",
    "64",
    "--epochs",
    "2",
    "--held-out",
    "40",
    "--samples",
    "12",
    "--sample-steps",
    "3",
    "--feature-network",
    "resnet8_narrow",
    "--feature-epochs",
    "1",
]
CPU = torch.device("cpu")


def settings_of(*more: str) -> Settings:
    return next(runs(parse("", [*TINY, "--methods", "ssprop", *more])))
