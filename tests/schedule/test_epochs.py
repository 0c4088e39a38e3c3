"""Epochs: told by steps_per_epoch, by hand, or by nobody, which warns."""

import pytest

import ssprop_patch as ssp

from .training import by_step, counting, sgd, steps


def test_steps_per_epoch():
    model, controller = counting(ssp.BarSchedule(0.8, period=2), steps_per_epoch=3)
    optimizer = sgd(model)
    seen = []
    for _ in range(8):
        optimizer.step()
        seen.append((controller.t, controller.drop_rate))
    assert seen == [(0, 0.0)] * 2 + [(1, 0.8)] * 3 + [(2, 0.0)] * 3
    assert controller.steps_per_epoch == 3


def test_steps_per_epoch_of_one():
    model, controller = counting(ssp.BarSchedule(0.8), steps_per_epoch=1)
    optimizer = sgd(model)
    rates = [(optimizer.step(), controller.drop_rate)[1] for _ in range(4)]
    assert rates == [0.8, 0.0, 0.8, 0.0]


def test_steps_per_epoch_means_nothing_to_a_schedule_of_steps():
    model, controller = counting(by_step(), steps_per_epoch=10)
    sgd(model).step()
    assert controller.t == 1


def test_epochs_that_nobody_tells_warn_once():
    model, controller = counting(ssp.BarSchedule(0.8))
    (text,) = steps(model)
    for part in ("BarSchedule(0.8, period=2)", "steps_per_epoch", ".step(epoch)", "'step'"):
        assert part in text
    assert controller.t == 0 and steps(model) == []


@pytest.mark.parametrize(
    ("schedule", "arguments"),
    [
        (0.5, {}),
        (0.0, {}),
        (ssp.ConstantSchedule(0.8), {}),
        (ssp.BarSchedule(0.8), {"steps_per_epoch": 2}),
        (ssp.BarSchedule(0.8, interval="step"), {}),
    ],
)
def test_no_warning_where_nothing_is_amiss(schedule, arguments):
    model, _ = counting(schedule, **arguments)
    assert steps(model) == []


@pytest.mark.parametrize("t", [0, 1, None])
def test_no_warning_when_the_epoch_was_told(t):
    model, controller = counting(ssp.BarSchedule(0.8))
    controller.step(t)
    assert steps(model) == [] and controller.t == (1 if t is None else t)
