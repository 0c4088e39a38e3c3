"""Which drop rates torch.compile gets graphs of their own for, in which Inductor sees the backward.

All other rates share one graph, in which the sparse backward is an opaque operator that reads the
rate from a tensor. A graph for each of many rates would take minutes to compile, and torch.compile
gives up after eight graphs of one function.
"""

from __future__ import annotations

from collections.abc import Iterable

from .schedules import Schedule

# Rates above 0 of a schedule; pairs of a rate and a rule in the whole process.
_MOST_RATES, _MOST_PAIRS = 2, 5

_traced: set[tuple[float, str]] = globals().get("_traced", set())  # goes on if this is reloaded


def rates_to_trace(schedule: Schedule) -> dict[float, str]:
    """Return the rates of a schedule that may have graphs of their own, as numbers and as text.

    Text is what torch.compile guards on: a number that changes it takes for one that varies.
    """
    rates = getattr(schedule, "rates", None)  # of a schedule from before this was imported again
    above = sorted(rate for rate in rates or () if rate > 0)
    return {rate: repr(rate) for rate in above} if len(above) <= _MOST_RATES else {}


def may_trace(rates: Iterable[float], rule: str) -> bool:
    """Whether the graphs of these rates under a rule can be added to those of the process."""
    pairs = {(rate, rule) for rate in rates}
    if len(_traced | pairs) > _MOST_PAIRS:
        return False
    _traced.update(pairs)
    return True
