"""Rows put together: by conditions, by method, over seeds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from study import labels
from study.settings import Settings

#: By how much, as a share, the FLOPs of trainings of "equal compute" may differ.
NEAR = 0.02


@dataclass(frozen=True, eq=False)
class Method:
    """The finished runs of one method under one condition.

    Attributes:
        settings: Of any of them; only the seed differs.
        rows: By seed, as the CSV has them.
        base: The condition's first dense training, whose regularisers others are seen against.
    """

    settings: Settings
    rows: dict[int, Mapping[str, str]]
    base: Settings

    @cached_property
    def label(self) -> str:
        """Return what it is called."""
        return labels.method(self.settings, self.base)

    @property
    def regularised(self) -> bool:
        """Tell whether it has another regulariser than the first dense training."""
        return bool(labels.regularisers(self.settings, self.base))

    def values(self, name: str) -> list[float]:
        """Return a column, seed by seed."""
        return [float(row[name]) for row in self.rows.values()]

    def mean(self, name: str) -> float:
        """Return the mean of a column over the seeds."""
        return statistics.fmean(self.values(name))

    def above(self, other: Method, name: str) -> list[float]:
        """Return by how much a column exceeds that of another method, where both have the seed.

        Seed by seed, so that what both runs of a pair share does not count as spread.
        """
        return [
            float(self.rows[seed][name]) - float(other.rows[seed][name])
            for seed in self.rows
            if seed in other.rows
        ]


@dataclass(frozen=True)
class Condition:
    """The methods that met the same conditions, in the order of their first runs."""

    label: str
    methods: tuple[Method, ...]

    def dense(self, method: Method) -> Method | None:
        """Return the dense training of the same length with the same regularisers.

        For a dense method the first dense one of the condition, None for that one itself.
        """
        like = method.base if method.settings.method == "dense" else method.settings
        same = {name: getattr(like, name) for name in labels.REGULARISERS}
        found = self._find(method="dense", steps_share=1.0, frozen=(), **same)
        return None if found is method else found

    def equal_compute(self, method: Method) -> Method | None:
        """Return the dense training of the same FLOPs as this ssProp run, None if there is none.

        Its own, or else one that was cut to another schedule whose FLOPs are the same within
        ``NEAR``: schedules of one mean rate need one baseline, not one each.
        """
        if method.settings.method != "ssprop":
            return None
        same = {n: getattr(method.settings, n) for n in labels.OF_A_METHOD}
        own = self._find(**same | {"method": "dense-equal-compute", "selection": ""})
        if own is not None and method.settings.selection != "principal":
            return own  # else it was cut to what the schedule costs with the paper's rule
        regularisers = {n: same[n] for n in labels.REGULARISERS}
        flops = method.mean("total_flops")

        def far(other: Method) -> float:
            return abs(other.mean("total_flops") / flops - 1)

        others = self._all(method="dense-equal-compute", **regularisers)
        nearest = min(others, key=far, default=None)
        return nearest if nearest is not None and far(nearest) <= NEAR else None

    def shortened(self, method: Method) -> list[Method]:
        """Return the dense trainings of any number of steps, with the same regularisers."""
        same = {name: getattr(method.settings, name) for name in labels.REGULARISERS}
        return self._all(method="dense", frozen=(), **same)

    def _all(self, **wanted: Any) -> list[Method]:
        return [
            method
            for method in self.methods
            if all(getattr(method.settings, name) == value for name, value in wanted.items())
        ]

    def _find(self, **wanted: Any) -> Method | None:
        return next(iter(self._all(**wanted)), None)


def conditions(rows: Iterable[Mapping[str, str]]) -> Sequence[Condition]:
    """Return the finished runs, grouped."""
    found: dict[Settings, dict[Settings, dict[int, Mapping[str, str]]]] = {}
    for row in rows:
        settings = Settings.of_row(row)
        methods = found.setdefault(labels.key_of_condition(settings), {})
        methods.setdefault(dataclasses.replace(settings, seed=0), {})[settings.seed] = row
    out = []
    for condition, methods in found.items():
        base = next((s for s in methods if s.method == "dense"), Settings())
        label = ", ".join([labels.condition(condition), *labels.regularisers(base)])
        out.append(Condition(label, tuple(Method(s, r, base) for s, r in methods.items())))
    return out
