"""Rows of a comparison of a network that nobody measured."""

from __future__ import annotations

import rows as schema

from ssprop_patch.timing import Quantiles

SETTING = schema.Setting(
    name="net",
    device="Some CPU, 2.0 GHz",
    dtype="float32",
    memory_format="contiguous",
    shape="2x3x8x8",
    drop_rate=0.8,
    selection="l1",
    options="",
    iterations=3,
    threads=1,
    torch="2",
    timm="1",
    python="3",
)
# Seconds: forward, backward, step.
DENSE = [Quantiles(0.8, 1.0, 1.2), Quantiles(1.9, 2.0, 2.5), Quantiles(3.0, 4.0, 5.0)]
SPARSE = [Quantiles(0.9, 1.1, 1.2), Quantiles(0.7, 0.8, 1.1), Quantiles(2.0, 2.5, 3.0)]


def compared(setting: schema.Setting = SETTING, modes=("forward", "backward", "step")):
    return schema.compare(
        setting,
        modes,
        {"dense": DENSE, "sparse": SPARSE},
        {"dense": 1.0, "sparse": 0.25},
        kernels={"sparse": "gather"},
        peaks={"dense": 7.5, "sparse": None},
    )
