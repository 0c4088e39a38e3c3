"""What a training run did: FLOPs that really ran, seconds, joules, and who kept which channels.

stopwatch and energy read the machine, layer_record and channel_history take note of layers,
instrument puts them on a model; entries, passes and other_work follow the calls of the model,
optimizer_steps the optimizer's; meter is all of it over a run; meter_report, state and loggers are
what comes out.
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
