"""Milliseconds on this machine, dense and sparse: of single layers and of whole training steps.

turns: measuring several things fairly. calls: what a layer is given in its network. layers,
networks, steps: what is measured.
"""

from .._device import device_name, waiter
from .interleaved import Quantiles, alternate
from .layers import LayerTime, time_layers
from .networks import time_networks
from .steps import MODES, StepTime, joules_per_step, time_steps, training_step

__all__ = [
    "MODES",
    "LayerTime",
    "Quantiles",
    "StepTime",
    "alternate",
    "device_name",
    "joules_per_step",
    "time_layers",
    "time_networks",
    "time_steps",
    "training_step",
    "waiter",
]
