"""By how much a method exceeds dense training that stops at the same FLOPs, or seconds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import stats

from study.groups import Condition, Method

Cost = Literal["total_flops", "train_s"]


def above_dense(condition: Condition, method: Method, cost: Cost = "total_flops") -> list[float]:
    """Return the differences of accuracy at the same cost, seed by seed.

    Dense training at another cost than it was stopped at is interpolated, linearly in the cost,
    between the dense trainings of the same seed. A seed in which the method costs more or less
    than all of them has no difference.
    """
    dense = condition.shortened(method)
    if len(dense) < 2 or method in dense:
        return []
    found = []
    for seed, row in method.rows.items():
        points = sorted(
            (float(d.rows[seed][cost]), float(d.rows[seed]["accuracy"]))
            for d in dense
            if seed in d.rows
        )
        own = float(row[cost])
        if points and points[0][0] <= own <= points[-1][0]:
            x, y = zip(*points, strict=True)
            found.append(float(row["accuracy"]) - float(np.interp(own, x, y)))
    return found


def interval(values: Sequence[float], level: float = 0.95) -> float:
    """Return half of the confidence interval of a mean (Student's t); nan of a single value."""
    if len(values) < 2:
        return math.nan
    quantile = float(stats.t.ppf(0.5 + level / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def text(values: Sequence[float]) -> str:
    """Return the mean in points, with half of its 95 % interval where there are two values."""
    if not values:
        return ""
    mean, half = 100 * statistics.fmean(values), 100 * interval(values)
    return f"{mean:+.2f}" if math.isnan(half) else f"{mean:+.2f} ± {half:.2f}"
