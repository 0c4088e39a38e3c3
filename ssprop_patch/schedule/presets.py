"""Schedules with a name.

Both save about 40 % of the convolutions' backward FLOPs. ``benchmarks/RESULTS.md`` has what they do
to accuracy.
"""

from __future__ import annotations

from .schedules import BarSchedule, ConstantSchedule

__all__ = ["PAPER", "STEADY"]

#: The paper's recommended run (arXiv 2408.12561), and the default: 80 % of the channels dropped in
#: every other epoch.
PAPER = BarSchedule(0.8, period=2)

#: The same FLOPs, spread evenly: 40 % dropped in every epoch. In the reduced trials of
#: ``benchmarks/RESULTS.md`` it kept more accuracy than PAPER where a network was still learning
#: fast, and a little less where it over-fitted. It saves less time than PAPER, as the cost of
#: choosing channels comes in every epoch.
STEADY = ConstantSchedule(0.4)
