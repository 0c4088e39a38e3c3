"""Schedules with a name, and whole recipes: ``ssp.convert(model, **ssp.presets.whole_gradient())``.

Both schedules save about 40 % of the convolutions' backward FLOPs. ``benchmarks/RESULTS.md`` has
what each of these does to accuracy.
"""

from __future__ import annotations

from typing import Any

from .._validate import check_drop_rate
from .schedules import BarSchedule, ConstantSchedule

__all__ = ["PAPER", "STEADY", "two_resolutions", "whole_gradient"]

#: The paper's recommended run (arXiv 2408.12561), and the default: 80 % of the channels dropped in
#: every other epoch.
PAPER = BarSchedule(0.8, period=2)

#: The same FLOPs, spread evenly: 40 % dropped in every epoch. In the reduced trials of
#: ``benchmarks/RESULTS.md`` it kept more accuracy than PAPER where a network was still learning
#: fast, and a little less where it over-fitted. It saves less time than PAPER, as the cost of
#: choosing channels comes in every epoch.
STEADY = ConstantSchedule(0.4)


def whole_gradient(drop_rate: float = 0.8) -> dict[str, Any]:
    """Return the arguments of ``convert`` that keep a cheap version of the whole gradient.

    The gradient goes back along its leading directions in every step, and what they leave goes back
    coarsely (``docs/whole-gradient.md``). In the trials of ``benchmarks/RESULTS.md``, of networks
    that were still learning, this was ahead of dense training at equal FLOPs. It was not at equal
    seconds on a CPU: ``plan(..., measure=True)`` says for which layers it is.

    Args:
        drop_rate: Share of the directions left out, in [0, 1). At 0.6 more accuracy was kept, at
            0.8 more FLOPs are saved.

    Raises:
        TypeError, ValueError: If the rate is not a number in [0, 1).
    """
    schedule = ConstantSchedule(check_drop_rate(drop_rate))
    return {"schedule": schedule, "selection": "principal", "remainder": "coarse"}


def two_resolutions(drop_rate: float = 0.8) -> dict[str, Any]:
    """Return the arguments of ``convert`` for the shortest steps that keep the whole gradient.

    Channels are chosen ahead, and gradients between layers have two resolutions: the kept channels
    as they are, block means of the others (``docs/whole-gradient.md``). In the trial of
    ``benchmarks/RESULTS.md`` a residual network of 3x3 convolutions that was still learning ended
    above dense training at equal FLOPs and at equal seconds on a CPU.

    Args:
        drop_rate: Share of the channels that go back as block means, in [0, 1).

    Raises:
        TypeError, ValueError: If the rate is not a number in [0, 1).
    """
    schedule = ConstantSchedule(check_drop_rate(drop_rate))
    return {"schedule": schedule, "selection": "ahead", "remainder": "coarse"}
