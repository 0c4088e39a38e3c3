"""Whether something is the state of a meter: found out before any of it is taken over."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from .._text import counted
from .._validate import check_count
from .layer_record import LayerTotals

_PARTS = {
    "version",
    "steps",
    "seconds",
    "wall_seconds",
    "joules",
    "no_joules_because",
    "layers",
    "others",
    "not_known_because",
}


def check_state(state: Any, layers: Iterable[str]) -> dict[str, Any]:
    """Return the state of a meter that counts ``layers``, checked throughout.

    Raises:
        TypeError, ValueError: If it is none.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"the state of a Meter is a dict, got {type(state).__name__}")
    missing = sorted(_PARTS - set(state))
    if missing:
        raise ValueError(f"not the state of a Meter: {', '.join(missing)} missing")
    if state["version"] != 1:
        raise ValueError(f"state of version {state['version']!r}; this package reads version 1")
    for part in ("seconds", "joules", "layers", "others"):
        if not isinstance(state[part], Mapping):
            raise TypeError(f"{part} of a state must be a dict, got {state[part]!r}")
    other = sorted(set(state["layers"]) ^ set(layers))
    if other:
        raise ValueError(
            f"the state is of another model: {counted(len(other), 'layer')} in one of them only, "
            f"such as {other[0]!r}"
        )
    for name, totals in state["layers"].items():
        LayerTotals.checked(totals, name)
    if set(state["others"]) != {"forward", "backward"}:
        raise ValueError("others of a state must have forward, backward")
    return {
        **state,
        "steps": check_count(state["steps"], "steps", 0),
        "wall_seconds": _amount(state["wall_seconds"], "wall_seconds"),
        "no_joules_because": str(state["no_joules_because"]),
        "others": {n: check_count(f, f"others' {n}", 0) for n, f in state["others"].items()},
        "not_known_because": str(state["not_known_because"]),
        **{
            part: {str(name): _amount(n, f"{part} of {name}") for name, n in state[part].items()}
            for part in ("seconds", "joules")
        },
    }


def _amount(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what} must be a number, got {value!r}")
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{what} must be finite and not negative, got {value!r}")
    return number
