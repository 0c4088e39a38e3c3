"""What a converted layer really ran: how often sparse, how often dense, and why.

Plain counters, as they are written to at every call. Compiled code runs no Python and is not
counted; that there was any is known, see :func:`was_compiled`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from .._torch_compat import call_while_tracing

#: What was dense is counted under these, and printed as these.
REASONS = {
    "rate_zero": "rate 0",
    "keeps_all": "keeps every channel",
    "evaluated": "eval()",
    "no_gradient": "no gradient needed",
    "recorded": "traced or exported",
    "uncaught": "no call to catch in its forward",
    "foreign_weight": "weight is a tensor subclass",
}


@dataclass(frozen=True)
class Ran:
    """How often a layer ran; forwards, those that checkpointing repeats included.

    Attributes:
        sparse: Calls with a sparse backward.
        dense: Calls with an ordinary backward or none, by the reason; without those of 0.
    """

    sparse: int = 0
    dense: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Ran) -> Ran:
        reasons = [r for r in REASONS.values() if r in self.dense or r in other.dense]
        dense = {r: self.dense.get(r, 0) + other.dense.get(r, 0) for r in reasons}
        return Ran(self.sparse + other.sparse, dense)

    def __bool__(self) -> bool:
        return bool(self.sparse or self.dense)

    def __str__(self) -> str:
        parts = [f"{self.sparse} sparse"] if self.sparse or not self.dense else []
        if self.dense:
            why = ", ".join(f"{reason}: {n}" for reason, n in self.dense.items())
            parts.append(f"{sum(self.dense.values())} dense ({why})")
        return ", ".join(parts)


class Calls:
    """Counts the calls of one layer.

    Args:
        saw_gradient: Is called with the counter and a number at the first, second, third, fourth,
            eighth, ... call of a kind that needs a gradient.

    Attributes:
        old_gradient: Whether the layer still has a gradient from before it was converted.
    """

    __slots__ = (
        "__weakref__",
        "_saw_gradient",
        "evaluated",
        "foreign_weight",
        "keeps_all",
        "no_gradient",
        "old_gradient",
        "rate_zero",
        "recorded",
        "sparse",
        "uncaught",
    )
    sparse: int
    rate_zero: int
    keeps_all: int
    evaluated: int
    no_gradient: int
    recorded: int
    uncaught: int
    foreign_weight: int

    def __init__(self, saw_gradient: Callable[[Calls, int], None]) -> None:
        self._saw_gradient = saw_gradient
        self.old_gradient = False
        self.restore((0,) * (1 + len(REASONS)))

    @property
    def in_training(self) -> int:
        """Calls in training mode that autograd goes back through."""
        return self.sparse + self.rate_zero + self.keeps_all + self.uncaught + self.foreign_weight

    def ran_sparse(self) -> None:
        """Ran with a sparse backward."""
        self.sparse = n = self.sparse + 1
        if n < 4 or not n & (n - 1):
            self._saw_gradient(self, n)

    def ran_at_rate_zero(self) -> None:
        """Ran dense for no other reason than its drop rate."""
        self.rate_zero = n = self.rate_zero + 1
        if n < 4 or not n & (n - 1):
            self._saw_gradient(self, n)

    def was_evaluated(self) -> None:
        """Ran dense as it was in ``eval()``, and autograd goes back through it."""
        self.evaluated = n = self.evaluated + 1
        if n < 4 or not n & (n - 1):
            self._saw_gradient(self, n)

    def kept_all(self, drop_rate: float) -> None:
        """Ran dense, as no channel is dropped at its ``drop_rate``."""
        if drop_rate == 0.0:
            self.ran_at_rate_zero()
        else:
            self.keeps_all += 1

    def caught_nothing(self, cls: type, functions: Iterable[str]) -> None:
        """Ran dense, as a forward of its own called none of the functions of these names."""
        self.uncaught += 1
        if self.uncaught == 1:
            names = "/".join(f"torch.nn.functional.{f}" for f in functions)
            warnings.warn(
                f"ssprop_patch: {cls.__name__}.forward called no {names} with a plain weight under "
                "autograd: its backward stays dense",
                stacklevel=2,
            )

    def had_foreign_weight(self, cls: type, weight: type) -> None:
        """Ran dense, as its weight was a tensor subclass with operations of its own."""
        self.foreign_weight += 1
        if self.foreign_weight == 1:
            warnings.warn(
                f"ssprop_patch: {cls.__name__}: its weight is a {weight.__name__}, a tensor "
                "subclass with operations of its own: its backward stays dense",
                stacklevel=2,
            )

    def ran(self) -> Ran:
        """Return the counts."""
        counts = {text: getattr(self, name) for name, text in REASONS.items()}
        return Ran(self.sparse, {text: n for text, n in counts.items() if n})

    def values(self) -> tuple[int, ...]:
        """Return what :meth:`restore` takes."""
        return self.sparse, *(getattr(self, name) for name in REASONS)

    def restore(self, values: tuple[int, ...]) -> None:
        """Go back to earlier counts."""
        for name, value in zip(("sparse", *REASONS), values, strict=True):
            setattr(self, name, value)


_compiled: list[bool] = []


def note_compiled() -> bool:
    """Take note that torch.compile traces a converted layer."""
    _compiled[:] = [True]
    return True


call_while_tracing(note_compiled)


def was_compiled() -> bool:
    """Whether torch.compile has traced a converted layer in this process.

    Which layers run in compiled code cannot be said: many blocks may share one graph.
    """
    return bool(_compiled)
