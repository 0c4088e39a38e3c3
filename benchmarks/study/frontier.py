"""Which points nothing else beats on both sides."""

from __future__ import annotations

from collections.abc import Sequence


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the Pareto-optimal points, by increasing cost.

    Args:
        points: (cost, value): less cost and more value are better. A point is left out if another
            costs no more and is worth no less, and one of the two is better; of equal points the
            first stays.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i))
    best, found = float("-inf"), []
    for i in order:
        if points[i][1] > best:
            best = points[i][1]
            found.append(i)
    return found
