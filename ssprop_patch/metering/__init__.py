"""What a training run did: FLOPs that really ran, seconds, joules, and who kept which channels.

clock and energy read the machine, counting and channels take note of layers, meter puts them on a
model, report is what it says.
"""

from .channels import ChannelHistory
from .energy import Energy, EnergyCounter
from .meter import Meter
from .report import LayerReport, MeterReport

__all__ = ["ChannelHistory", "Energy", "EnergyCounter", "LayerReport", "Meter", "MeterReport"]
