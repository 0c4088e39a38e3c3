"""What a training run did: FLOPs that really ran, seconds, joules, and who kept which channels.

clock and energy read the machine, counting and channels take note of layers, attachment puts them
on a model, meter is all of it over a run; report, state and loggers are what comes out.
"""

from .channel_history import ChannelHistory, Winners
from .energy import Energy, EnergyCounter
from .meter import Meter
from .meter_report import LayerReport, MeterReport

__all__ = [
    "ChannelHistory",
    "Energy",
    "EnergyCounter",
    "LayerReport",
    "Meter",
    "MeterReport",
    "Winners",
]
