"""Measuring several things in turns, so that no drift of the machine favours one of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

WARMUP = 3


class Quantiles(NamedTuple):
    """The 20th, 50th and 80th percentile of some measurements."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        """Interpolate between the sorted values, as ``torch.quantile`` does."""
        at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        return cls(*torch.tensor(values, dtype=torch.float64).quantile(at).tolist())


def alternate(
    sides: Mapping[str, Callable[[], Sequence[float]]],
    iterations: int,
    warmup: int = WARMUP,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Quantiles]]:
    """Measure each side once an iteration, in random order within each.

    Args:
        sides: By name, a function that measures once and returns one or several numbers.
        iterations: How many measurements of each side count.
        warmup: How many before them do not.
        progress: Is called with how many of how many measurements are done.

    Returns:
        For each side the quantiles of each of its numbers.
    """
    order = random.Random(0)  # its own, so that the process's stays where it is
    taken: dict[str, list[Sequence[float]]] = {side: [] for side in sides}
    done, total = 0, (warmup + iterations) * len(sides)
    for i in range(warmup + iterations):
        for side in order.sample(list(sides), len(sides)):
            numbers = sides[side]()
            if i >= warmup:
                taken[side].append(numbers)
            done += 1
            if progress is not None:
                progress(done, total)
    return {
        side: [Quantiles.of(column) for column in zip(*rows, strict=True)]
        for side, rows in taken.items()
    }
