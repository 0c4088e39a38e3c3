"""What counts as a drop rate and as a count: the rules that every public entry point applies."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any


def check_drop_rate(value: Any, what: str = "drop_rate") -> float:
    """Return ``value`` as a float, or say what is wrong with it.

    Args:
        value: A real number, or a one-element tensor or array.
        what: How the error calls it.

    Returns:
        The rate as a Python float, ``0 <= rate < 1``.

    Raises:
        TypeError: If ``value`` is not a real number (text, a bool, None, ...).
        ValueError: If it is NaN or outside [0, 1).
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        rate = float(value)
    elif hasattr(value, "item") and getattr(value, "size", None) is not None:  # tensor, array
        return check_drop_rate(value.item(), what)
    else:
        raise TypeError(
            f"{what} must be a number in [0, 1), the fraction of output channels whose gradient "
            f"is dropped; got {value!r} of type {type(value).__name__}"
        )
    if not 0.0 <= rate < 1.0:  # also catches NaN
        hint = ""
        if 1.0 < rate <= 100.0 and math.isfinite(rate):
            hint = f" (a fraction, not a percentage: {rate:g} % would be {rate / 100:g})"
        elif rate == 1.0:
            hint = " (1 would drop every channel; at least one is always kept)"
        raise ValueError(f"{what} must be in [0, 1), got {rate!r}{hint}")
    return rate + 0.0  # -0.0 would show in reprs, by which schedules are compared


def check_count(value: Any, what: str, least: int = 0) -> int:
    """Return ``value`` as an int of at least ``least``; numpy integers are welcome, bools not.

    Raises:
        TypeError: If ``value`` is not an integer.
        ValueError: If it is below ``least``.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{what} must be an integer >= {least}, got {value!r}")
    count = operator.index(value)
    if count < least:
        raise ValueError(f"{what} must be an integer >= {least}, got {value!r}")
    return count
