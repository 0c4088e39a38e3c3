"""Schedules: exact values, purity, rounding to levels, repr, equality, pickling, bad input."""

import copy
import functools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ssprop_patch as ssp
from ssprop_patch.schedule import schedules
from ssprop_patch.schedule.schedules import (
    BarSchedule,
    ConstantSchedule,
    CosineSchedule,
    LambdaSchedule,
    LinearSchedule,
    Schedule,
    SequentialSchedule,
    StepSchedule,
    as_schedule,
)


def half(t):
    return 0.5


def rising(t):
    return t / (t + 1)


def values(schedule, n):
    return [schedule(t) for t in range(n)]


EXAMPLES = [
    ConstantSchedule(0.5),
    ConstantSchedule(0.5, interval="step", levels=4),
    BarSchedule(0.8),
    BarSchedule(0.8, period=5, interval="step"),
    LinearSchedule(0.0, 0.8, 10),
    LinearSchedule(0.7, 0.1, total=3, levels=8),
    CosineSchedule(0.0, 0.8, total=100, interval="step"),
    StepSchedule([0.0, 0.5, 0.8], milestones=[2, 4]),
    StepSchedule([0.3], [], levels=2),
    SequentialSchedule([ConstantSchedule(0.0), BarSchedule(0.8)], [5]),
    SequentialSchedule(
        [LinearSchedule(0.0, 0.9, 4, interval="step"), ConstantSchedule(0.9, interval="step")],
        milestones=[4],
        levels=10,
    ),
]
LAMBDAS = [LambdaSchedule(half), LambdaSchedule(rising, interval="step", levels=5)]


def test_constant():
    assert values(ConstantSchedule(0.3), 3) == [0.3, 0.3, 0.3]


def test_bar_default_is_the_papers():
    assert values(BarSchedule(0.8), 5) == [0.0, 0.8, 0.0, 0.8, 0.0]


def test_bar_halves_and_odd_period_gives_dense_the_extra_one():
    assert values(BarSchedule(0.6, period=4), 9) == [0, 0, 0.6, 0.6, 0, 0, 0.6, 0.6, 0]
    assert values(BarSchedule(0.6, 3), 7) == [0, 0, 0.6, 0, 0, 0.6, 0]


def test_linear():
    assert values(LinearSchedule(0.0, 0.5, total=4), 7) == [0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert values(LinearSchedule(0.5, 0.0, total=2), 4) == [0.5, 0.25, 0, 0]


def test_cosine():
    s = CosineSchedule(0.2, 0.6, total=4)
    quarter = 0.2 + 0.4 * (1 - math.cos(math.pi / 4)) / 2
    assert s(0) == 0.2 and s(4) == 0.6 and s(1000) == 0.6
    assert s(1) == pytest.approx(quarter, abs=1e-15)
    assert s(2) == pytest.approx(0.4, abs=1e-15)
    assert s(3) == pytest.approx(0.8 - quarter, abs=1e-15)


def test_step():
    s = StepSchedule([0.0, 0.5, 0.8], milestones=[2, 5])
    assert values(s, 7) == [0, 0, 0.5, 0.5, 0.5, 0.8, 0.8]
    assert values(StepSchedule((0.25,), ()), 2) == [0.25, 0.25]


def test_sequential_children_start_from_their_own_zero():
    s = SequentialSchedule(
        [ConstantSchedule(0.1), LinearSchedule(0.0, 0.8, 2), BarSchedule(0.5)], [2, 5]
    )
    assert values(s, 9) == [0.1, 0.1, 0.0, 0.4, 0.8, 0.0, 0.5, 0.0, 0.5]


def test_sequential_takes_the_interval_of_its_children():
    steps = [ConstantSchedule(0, interval="step"), BarSchedule(0.8, interval="step")]
    assert SequentialSchedule(steps, [3]).interval == "step"
    assert SequentialSchedule(steps[:1], []).interval == "step"


def test_sequential_children_keep_their_own_levels_and_nest():
    inner = SequentialSchedule([LinearSchedule(0, 0.9, 3, levels=2), ConstantSchedule(0.33)], [4])
    outer = SequentialSchedule([ConstantSchedule(0.77), inner], [1])
    assert values(outer, 7) == [0.77, 0.0, 0.5, 0.5, 0.5, 0.33, 0.33]


def test_lambda():
    assert values(LambdaSchedule(rising), 3) == [0.0, 0.5, 2 / 3]
    assert LambdaSchedule(lambda t: torch.tensor(0.25))(0) == 0.25
    result = LambdaSchedule(lambda t: np.float32(0.5))(0)
    assert result == 0.5 and type(result) is float


@pytest.mark.parametrize("schedule", EXAMPLES + LAMBDAS, ids=repr)
class TestEvery:
    def test_is_pure(self, schedule):
        forward = [schedule(t) for t in range(12)]
        assert [schedule(t) for t in reversed(range(12))] == forward[::-1]
        assert [schedule(t) for t in range(12) for _ in (0, 1)][::2] == forward

    def test_returns_a_float_in_range(self, schedule):
        assert all(type(d) is float and 0 <= d < 1 for d in values(schedule, 200))

    def test_average_is_the_mean(self, schedule):
        assert schedule.average(1) == schedule(0)
        assert schedule.average(13) == pytest.approx(sum(values(schedule, 13)) / 13)

    def test_constant_ones_say_so_truly(self, schedule):
        assert schedule.is_constant <= (len(set(values(schedule, 200))) == 1)

    def test_survives_pickle_and_deepcopy(self, schedule):
        for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
            assert twin == schedule and hash(twin) == hash(schedule)
            assert values(twin, 12) == values(schedule, 12)

    def test_is_frozen(self, schedule):
        with pytest.raises(AttributeError):
            schedule.interval = "step"

    def test_takes_numpy_integers(self, schedule):
        assert schedule(np.int64(3)) == schedule(3)

    @pytest.mark.parametrize("t", [True, 1.0, "1", None, np.float32(1)])
    def test_refuses_a_counter_that_is_not_an_integer(self, schedule, t):
        with pytest.raises(TypeError, match="t must be an integer >= 0"):
            schedule(t)

    def test_refuses_a_negative_counter(self, schedule):
        with pytest.raises(ValueError, match="t must be an integer >= 0, got -1"):
            schedule(-1)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_repr_evaluates_to_an_equal_schedule(schedule):
    assert eval(repr(schedule), vars(schedules)) == schedule


def test_repr_hides_what_is_default():
    assert repr(BarSchedule(0.8)) == "BarSchedule(0.8, period=2)"
    cosine = CosineSchedule(0, 0.8, 100, interval="step")
    assert repr(cosine) == "CosineSchedule(0.0, 0.8, total=100, interval='step')"
    assert repr(ConstantSchedule(0, levels=4)) == "ConstantSchedule(0.0, levels=4)"
    assert repr(StepSchedule((0, 0.5), (3,))) == "StepSchedule([0.0, 0.5], milestones=[3])"
    joined = SequentialSchedule((ConstantSchedule(0, interval="step"),), ())
    assert repr(joined) == (
        "SequentialSchedule([ConstantSchedule(0.0, interval='step')], milestones=[])"
    )


def test_repr_of_lambda_names_the_function_and_not_its_address():
    assert repr(LambdaSchedule(half)) == f"LambdaSchedule({__name__}.half)"
    assert repr(LambdaSchedule(half, levels=3)) == f"LambdaSchedule({__name__}.half, levels=3)"
    for fn in (lambda t: 0.5, functools.partial(max, 0.1), type("C", (), {"__call__": half})()):
        assert "0x" not in repr(LambdaSchedule(fn))
    # Methods of classes that are written in C have no module of their own.
    for fn in (tuple.__getitem__, (0.0, 0.5).__getitem__):
        assert repr(LambdaSchedule(fn)) == "LambdaSchedule(builtins.tuple.__getitem__)"
    assert repr(LambdaSchedule([0.5].pop)) == "LambdaSchedule(builtins.list.pop)"


def test_equality_and_hash_are_by_value():
    assert BarSchedule(0.8) == BarSchedule(0.8, period=2)
    assert hash(BarSchedule(0.8)) == hash(BarSchedule(0.8, period=2))
    assert BarSchedule(0.8) != BarSchedule(0.8, interval="step")
    assert LinearSchedule(0, 0.5, 3) != CosineSchedule(0, 0.5, 3)
    assert StepSchedule([0, 0.5], [3]) == StepSchedule((0.0, 0.5), (3,))
    assert LambdaSchedule(half) == LambdaSchedule(half) != LambdaSchedule(rising)
    assert len({*EXAMPLES, *copy.deepcopy(EXAMPLES)}) == len(EXAMPLES)


def test_what_is_constant():
    assert ConstantSchedule(0.5).is_constant
    assert BarSchedule(0.0).is_constant and not BarSchedule(0.1).is_constant
    assert CosineSchedule(0.5, 0.5, 9).is_constant and not LinearSchedule(0, 0.5, 9).is_constant
    assert SequentialSchedule([ConstantSchedule(0.5), ConstantSchedule(0.5)], [3]).is_constant
    assert not SequentialSchedule([ConstantSchedule(0.5), ConstantSchedule(0.4)], [3]).is_constant
    assert not LambdaSchedule(half).is_constant  # not provable


def test_levels_round_to_the_nearest_and_stop_below_one():
    fine = [0.0, 0.09, 0.11, 0.3, 0.31, 0.5, 0.69, 0.71, 0.89, 0.95, 0.999]
    coarse = [ConstantSchedule(d, levels=5)(0) for d in fine]
    assert coarse == [0.0, 0.0, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8, 0.8, 0.8]
    assert len(set(values(CosineSchedule(0, 0.99, 500, levels=5), 501))) == 5


rates = st.floats(0, 1, exclude_max=True)
shared = {"interval": st.sampled_from(["epoch", "step"]), "levels": st.none() | st.integers(2, 99)}
counts = st.integers(1, 10**6)
simple = st.one_of(
    st.builds(ConstantSchedule, rates, **shared),
    st.builds(BarSchedule, rates, st.integers(2, 50), **shared),
    st.builds(LinearSchedule, rates, rates, counts, **shared),
    st.builds(CosineSchedule, rates, rates, counts, **shared),
    st.builds(StepSchedule, st.tuples(rates, rates), st.tuples(counts), **shared),
)


@given(simple, st.integers(0, 2 * 10**6))
def test_every_rate_is_in_range_and_a_multiple_of_its_level(schedule, t):
    rate = schedule(t)
    assert 0.0 <= rate < 1.0
    if schedule.levels:
        assert round(rate * schedule.levels) / schedule.levels == rate
    assert eval(repr(schedule), vars(schedules)) == schedule


@given(rates, rates, counts)
def test_ramps_end_exactly_and_stay_between_their_ends(start, end, total):
    for kind in (LinearSchedule, CosineSchedule):
        s = kind(start, end, total)
        assert s(0) == start and s(total) == end and s(total + 7) == end
        assert min(start, end) <= s(total // 2) <= max(start, end)


@given(simple, simple, counts, st.integers(0, 10**6))
def test_sequential_is_its_children_shifted(first, second, milestone, t):
    if first.interval != second.interval:
        with pytest.raises(ValueError, match="share one interval"):
            SequentialSchedule([first, second], [milestone])
        return
    joined = SequentialSchedule([first, second], [milestone])
    assert joined(t) == (first(t) if t < milestone else second(t - milestone))


BAD_RATES = [(-0.1, ValueError), (1.0, ValueError), (80, ValueError), (math.nan, ValueError)]
BAD_RATES += [(math.inf, ValueError), ("0.5", TypeError), (None, TypeError), (True, TypeError)]


@pytest.mark.parametrize(("rate", "error"), BAD_RATES)
def test_refuses_a_bad_rate_when_made(rate, error):
    makers = [
        (ConstantSchedule, "drop_rate"),
        (BarSchedule, "drop_rate"),
        (lambda r: LinearSchedule(r, 0.5, 3), "start"),
        (lambda r: CosineSchedule(0.5, r, 3), "end"),
        (lambda r: StepSchedule([0.0, r], [1]), r"drop_rates\[1\]"),
    ]
    for make, name in makers:
        with pytest.raises(error, match=f"{name} must be"):
            make(rate)


@pytest.mark.parametrize(("rate", "error"), BAD_RATES)
def test_a_bad_rate_from_a_function_names_the_schedule_and_t(rate, error):
    s = SequentialSchedule([LambdaSchedule(lambda t: rate if t == 7 else 0.5)], [])
    assert s(6) == 0.5
    with pytest.raises(error, match=r"LambdaSchedule\(.*<lambda>\) at t=7 must be"):
        s(7)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BarSchedule(0.8, interval="epochs"), ValueError, "interval must be 'epoch' or"),
        (lambda: BarSchedule(0.8, interval=None), ValueError, "interval must be 'epoch' or"),
        (lambda: BarSchedule(0.8, levels=1), ValueError, "levels must be an integer >= 2"),
        (lambda: BarSchedule(0.8, levels=4.0), TypeError, "levels must be an integer >= 2"),
        (lambda: BarSchedule(0.8, period=1), ValueError, "period must be an integer >= 2"),
        (lambda: BarSchedule(0.8, period=2.5), TypeError, "period must be an integer >= 2"),
        (lambda: BarSchedule(0.8, period=True), TypeError, "period must be an integer >= 2"),
        (lambda: LinearSchedule(0, 0.8, 0), ValueError, "total must be an integer >= 1"),
        (lambda: CosineSchedule(0, 0.8, "9"), TypeError, "total must be an integer >= 1"),
        (lambda: StepSchedule([], []), ValueError, "drop_rates must hold at least one"),
        (lambda: StepSchedule([0.5], [3]), ValueError, "one fewer"),
        (lambda: StepSchedule([0, 0.5, 0.6], [3, 3]), ValueError, "must increase"),
        (lambda: StepSchedule([0, 0.5], [0]), ValueError, "milestones must be an integer >= 1"),
        (lambda: StepSchedule([0, 0.5], [1.5]), TypeError, "milestones must be an integer >= 1"),
        (lambda: StepSchedule(0.5, [1]), TypeError, "drop_rates must be a list"),
        (lambda: StepSchedule([0, 0.5], 3), TypeError, "milestones must be a list"),
        (lambda: SequentialSchedule([], []), ValueError, "schedules must hold at least one"),
        (lambda: SequentialSchedule([BarSchedule(0.8)], [3]), ValueError, "one fewer"),
        (lambda: SequentialSchedule([BarSchedule(0.8)] * 3, [5, 2]), ValueError, "must increase"),
        (lambda: SequentialSchedule([0.5, half], [5]), TypeError, "Schedule objects"),
        (lambda: SequentialSchedule("ab", [5]), TypeError, "schedules must be a list"),
        (
            lambda: SequentialSchedule([BarSchedule(0.8), BarSchedule(0.8, interval="step")], [5]),
            ValueError,
            "share one interval, got .*interval='step'",
        ),
        (lambda: LambdaSchedule(0.5), TypeError, "fn must be a function"),
        (lambda: LambdaSchedule(BarSchedule), TypeError, "fn must be a function"),
        (lambda: BarSchedule(0.8).average(0), ValueError, "total must be an integer >= 1"),
        (lambda: Schedule()(0), NotImplementedError, "_rate"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_as_schedule():
    bar = BarSchedule(0.8)
    assert as_schedule(bar) is bar
    for number in (0.5, np.float64(0.5), np.float32(0.5), torch.tensor(0.5)):
        assert as_schedule(number) == ConstantSchedule(0.5)
    assert as_schedule(0) == ConstantSchedule(0.0)
    assert as_schedule(rising) == LambdaSchedule(rising)
    for other in ("0.5", None, True, [0.5], BarSchedule):
        with pytest.raises(TypeError, match=r"a Schedule such as .* number .* function"):
            as_schedule(other)
    with pytest.raises(ValueError, match=r"drop_rate must be in \[0, 1\).*80 % would be 0.8"):
        as_schedule(80)


def test_a_users_own_subclass_gets_checks_levels_and_repr():
    class Sawtooth(Schedule):
        def _rate(self, t):
            return (t % 4) / 4

    s = Sawtooth(levels=2, interval="step")
    assert values(s, 5) == [0.0, 0.5, 0.5, 0.5, 0.0]
    assert repr(s) == "Sawtooth(interval='step', levels=2)"


def test_presets_are_schedules_of_the_same_mean_rate():
    paper, steady = ssp.presets.PAPER, ssp.presets.STEADY
    assert (repr(paper), repr(steady)) == ("BarSchedule(0.8, period=2)", "ConstantSchedule(0.4)")
    assert sum(map(paper, range(10))) == pytest.approx(sum(map(steady, range(10))))
    model = ssp.convert(torch.nn.Conv2d(2, 4, 1))
    assert ssp.get_controller(model).schedule == paper


@pytest.mark.parametrize("recipe", [ssp.presets.whole_gradient, ssp.presets.two_resolutions])
def test_the_recipe_is_what_convert_takes(recipe):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3))
    ssp.convert(model, **recipe(0.6))
    controller = ssp.get_controller(model)
    assert controller.schedule == ssp.ConstantSchedule(0.6)
    for _ in range(6):
        model.zero_grad()
        model(torch.randn(2, 3, 9, 9)).sum().backward()
    assert set(controller.state_dict()["layers"]) == {"0", "1"}  # what both remember
    # The remainder leaves no row of a gradient zero.
    assert all((m.weight.grad.flatten(1) != 0).any(1).all() for m in model)
    with pytest.raises(ValueError, match="drop_rate"):
        recipe(1.0)
