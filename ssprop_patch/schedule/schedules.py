"""Schedules: pure functions of an absolute counter t that return a drop rate.

A schedule holds no state. Asking it twice, or in any order, gives the same answers, so a run
resumes exactly where it stopped once t is known, and a plot of a whole run is a list
comprehension. What t counts is the schedule's ``interval``: epochs or optimizer steps.

Schedules are frozen values: equal when class and arguments are equal, hashable, picklable, and
``eval(repr(s)) == s`` with the public names in scope.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .._validate import check_count, check_drop_rate

#: What a schedule's t counts.
Interval = Literal["epoch", "step"]

# What an argument must be, by its name, which means the same in every schedule.
_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "drop_rate": check_drop_rate,
    "start": check_drop_rate,
    "end": check_drop_rate,
    "period": lambda value, what: check_count(value, what, 2),
    "total": lambda value, what: check_count(value, what, 1),
    "levels": lambda value, what: None if value is None else check_count(value, what, 2),
}
_KEYWORD = {"period", "total", "milestones"}  # repr shows these, and what all share, by name


def _check_pieces(pieces: Any, milestones: Any, what: str) -> tuple[tuple[Any, ...], Any]:
    """Return both as tuples: n >= 1 pieces and the n - 1 increasing places where one ends."""
    for value, name in ((pieces, what), (milestones, "milestones")):
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise TypeError(f"{name} must be a list, got {value!r} of type {type(value).__name__}")
    pieces = tuple(pieces)
    points = tuple(check_count(m, "each of milestones", 1) for m in milestones)
    if not pieces or len(points) != len(pieces) - 1 or list(points) != sorted(set(points)):
        raise ValueError(
            f"{what} must hold at least one, and milestones must increase and be one fewer (where "
            f"each but the first begins); got {len(pieces)} {what}, milestones {list(points)}"
        )
    return pieces, points


@dataclass(frozen=True, repr=False)
class Schedule:
    """Base class: a drop rate D, 0 <= D < 1, for each value of an absolute counter t = 0, 1, ...

    A subclass implements ``_rate(t)``; all checks and ``levels`` are done here.

    Args:
        interval: What t counts: ``"epoch"``, or ``"step"`` (optimizer steps).
        levels: If given, D is rounded to the nearest of the ``levels`` values 0, 1/levels, ...,
            (levels - 1)/levels, so that few distinct rates occur. None leaves D as it is.

    Raises:
        TypeError, ValueError: When made, for an argument that is not as described.
    """

    interval: Interval = field(default="epoch", kw_only=True)
    levels: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.interval not in ("epoch", "step"):
            raise ValueError(f"interval must be 'epoch' or 'step', got {self.interval!r}")
        names = [f.name for f in dataclasses.fields(self) if f.name in _CHECKS]
        self._set(**{name: _CHECKS[name](getattr(self, name), name) for name in names})

    def _set(self, **values: Any) -> None:
        """Store checked values; the only writer, called while the object is being made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _rate(self, t: int) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must implement _rate(t) -> drop rate")

    def __call__(self, t: int) -> float:
        """Return the drop rate at ``t``, how many epochs or steps (see ``interval``) are done.

        Raises:
            TypeError: If t is not an integer, or the rate at t is not a number.
            ValueError: If t is negative, or the rate at t is NaN or outside [0, 1).
        """
        value = self._rate(check_count(t, "t", 0))
        # Named only on failure: a repr on each step would cost more than the schedule itself.
        if not (isinstance(value, float) and 0.0 <= value < 1.0):
            value = check_drop_rate(value, f"the drop rate of {self!r} at t={t}")
        rate = float(value)
        if self.levels is not None:
            rate = min(int(rate * self.levels + 0.5), self.levels - 1) / self.levels
        return rate

    @property
    def is_constant(self) -> bool:
        """True only when D is known to be the same for all t, so that nothing need count."""
        return False

    @property
    def rates(self) -> frozenset[float] | None:
        """All rates that occur, where that is known and does not depend on how long it runs."""
        return None

    def average(self, total: int) -> float:
        """Return the mean of D over t = 0, ..., total - 1 (total >= 1, in the interval's unit)."""
        total = check_count(total, "total", 1)
        return self(0) if self.is_constant else math.fsum(map(self, range(total))) / total

    def __repr__(self) -> str:
        own, shared = [], []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            text = repr(list(value)) if isinstance(value, tuple) else repr(value)
            if f.name not in ("interval", "levels"):
                own.append(f"{f.name}={text}" if f.name in _KEYWORD else text)
            elif f.repr and value != f.default:
                shared.append(f"{f.name}={text}")
        return f"{type(self).__name__}({', '.join(own + shared)})"


@dataclass(frozen=True, repr=False)
class ConstantSchedule(Schedule):
    """The same ``drop_rate`` always."""

    drop_rate: float

    def _rate(self, t: int) -> float:
        return self.drop_rate

    @property
    def is_constant(self) -> bool:
        return True

    @property
    def rates(self) -> frozenset[float]:
        """The one."""
        return frozenset((self(0),))


@dataclass(frozen=True, repr=False)
class BarSchedule(Schedule):
    """Dense for the first half of each period, sparse for the second: the paper's default.

    Source: Zhong, Huang, Shi, arXiv 2408.12561. ``period``, >= 2 and in the interval's unit, is
    the length of both parts together; when it is odd the dense part is the longer one, by one.
    """

    drop_rate: float
    period: int = 2

    def _rate(self, t: int) -> float:
        return self.drop_rate if t % self.period >= (self.period + 1) // 2 else 0.0

    @property
    def is_constant(self) -> bool:
        return self.drop_rate == 0.0

    @property
    def rates(self) -> frozenset[float]:
        """0 and the rate of the sparse half."""
        return frozenset((self(0), self(self.period - 1)))


@dataclass(frozen=True, repr=False)
class LinearSchedule(Schedule):
    """A straight line from ``start`` at t = 0 to ``end`` at t = total, and ``end`` from there on.

    ``end`` may be below ``start``; ``total``, >= 1, is in the interval's unit.
    """

    start: float
    end: float
    total: int

    def _curve(self, done: float) -> float:
        return done  # share of the way from start to end, at the share ``done`` of the time

    def _rate(self, t: int) -> float:
        # The ends are returned, not computed, so that they are exact; the clamp keeps rounding
        # from stepping outside [start, end] and so outside [0, 1).
        if t == 0 or t >= self.total:
            return self.start if t == 0 else self.end
        rate = self.start + (self.end - self.start) * self._curve(t / self.total)
        return min(max(rate, min(self.start, self.end)), max(self.start, self.end))

    @property
    def is_constant(self) -> bool:
        return self.start == self.end


class CosineSchedule(LinearSchedule):
    """Half a cosine wave from ``start`` at t = 0 to ``end`` at t = total, and ``end`` after.

    D(t) = start + (end - start) (1 - cos(pi t / total)) / 2 in between: slow, fast, slow.
    """

    def _curve(self, done: float) -> float:
        return (1.0 - math.cos(math.pi * done)) / 2.0


@dataclass(frozen=True, repr=False)
class StepSchedule(Schedule):
    """Constant pieces: ``StepSchedule([0.0, 0.5, 0.8], milestones=[10, 30])``.

    The example is dense for t < 10, drops 0.5 for 10 <= t < 30 and 0.8 from 30 on. Rates are
    spelled out, not multiplied by a gamma as in ``torch.optim.lr_scheduler.StepLR``: a drop rate
    mostly starts at 0 and rises, and it must stay below 1. ``milestones``, increasing integers
    >= 1, are where each piece but the first begins.
    """

    drop_rates: Sequence[float]
    milestones: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        rates, points = _check_pieces(self.drop_rates, self.milestones, "drop_rates")
        rates = tuple(check_drop_rate(r, f"drop_rates[{i}]") for i, r in enumerate(rates))
        self._set(drop_rates=rates, milestones=points)

    def _rate(self, t: int) -> float:
        return self.drop_rates[bisect_right(self.milestones, t)]

    @property
    def rates(self) -> frozenset[float]:
        """Those of the pieces."""
        return frozenset(self(t) for t in (0, *self.milestones))


@dataclass(frozen=True, repr=False)
class SequentialSchedule(Schedule):
    """One schedule after another, as ``torch.optim.lr_scheduler.SequentialLR``.

    Each sees t - (the milestone where it begins), so it starts from its own 0. A warm-up of five
    dense epochs: ``SequentialSchedule([ConstantSchedule(0.0), BarSchedule(0.8)], [5])``.

    All must have the same interval, which becomes this one's; each applies its own ``levels``.
    ``milestones`` are where each but the first begins: increasing integers >= 1.
    """

    schedules: Sequence[Schedule]
    milestones: Sequence[int]
    interval: Interval = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parts, points = _check_pieces(self.schedules, self.milestones, "schedules")
        if not all(map(_is_schedule, parts)):
            raise TypeError(f"schedules must hold Schedule objects, got {list(parts)}")
        if len({part.interval for part in parts}) > 1:
            raise ValueError(f"schedules must share one interval, got {list(parts)}")
        self._set(schedules=parts, milestones=points, interval=parts[0].interval)
        super().__post_init__()

    def _rate(self, t: int) -> float:
        i = bisect_right(self.milestones, t)
        return self.schedules[i](t - self.milestones[i - 1] if i else t)

    @property
    def is_constant(self) -> bool:
        return all(s.is_constant and s(0) == self.schedules[0](0) for s in self.schedules)

    @property
    def rates(self) -> frozenset[float] | None:
        """Those of all parts."""
        found: set[float] = set()
        for part in self.schedules:
            if part.rates is None:
                return None
            found |= part.rates
        return frozenset(found)


@dataclass(frozen=True, repr=False)
class LambdaSchedule(Schedule):
    """Any function t -> D, as ``torch.optim.lr_scheduler.LambdaLR``.

    Its repr holds the qualified name of ``fn``, the same in every process; equal when the
    functions are; picklable when ``fn`` is. ``fn`` should be pure, for a run to resume as it was.
    """

    fn: Callable[[int], float]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.fn) or isinstance(self.fn, type):
            raise TypeError(f"fn must be a function t -> drop rate, got {self.fn!r}")

    def _rate(self, t: int) -> Any:
        return self.fn(t)

    def __repr__(self) -> str:
        named: Any = self.fn if hasattr(self.fn, "__qualname__") else type(self.fn)
        module = getattr(named, "__module__", None)
        if module is None:  # a method of a class that is written in C
            owner = named.__objclass__ if hasattr(named, "__objclass__") else type(named.__self__)
            module = owner.__module__
        return super().__repr__().replace(repr(self.fn), f"{module}.{named.__qualname__}")


def _is_schedule(obj: Any) -> bool:
    """Whether ``obj`` is a schedule; of this package before it was imported again, too."""
    if isinstance(obj, Schedule):
        return True
    module = __name__.rpartition(".")[2]
    return hasattr(obj, "is_constant") and any(
        base.__qualname__ == Schedule.__qualname__ and base.__module__.endswith(f".{module}")
        for base in type(obj).__mro__
    )


def as_schedule(obj: Any) -> Schedule:
    """Return ``obj`` itself, a ConstantSchedule of a number, or a LambdaSchedule of a function.

    Raises:
        TypeError: If ``obj`` is none of these.
        ValueError: If it is a number outside [0, 1).
    """
    if _is_schedule(obj):
        return obj
    if not isinstance(obj, bool) and (isinstance(obj, numbers.Real) or hasattr(obj, "item")):
        return ConstantSchedule(obj)
    if callable(obj) and not isinstance(obj, type):
        return LambdaSchedule(obj)
    raise TypeError(
        "a schedule must be a Schedule such as BarSchedule(0.8), a number in [0, 1) for a "
        f"constant drop rate, or a function t -> drop rate; got {obj!r}"
    )


def constant(drop_rate: Any, schedule_too: bool) -> ConstantSchedule:
    """Return the schedule that ``drop_rate=`` means where a schedule is expected.

    Args:
        drop_rate: What was given.
        schedule_too: Whether a schedule was given besides.

    Raises:
        TypeError, ValueError: If it is no rate, or both were given.
    """
    if schedule_too:
        raise ValueError("give schedule or drop_rate, not both: drop_rate=0.8 is schedule=0.8")
    if callable(drop_rate):
        raise TypeError(f"drop_rate is a number: give {drop_rate!r} as schedule=...")
    return ConstantSchedule(drop_rate)
