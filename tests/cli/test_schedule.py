"""``schedule``: the values of a schedule and their average."""

from __future__ import annotations

import json

import pytest

import ssprop_patch as ssp


def test_schedule_prints_the_rate_of_each_epoch_and_the_average(printed):
    lines = printed("schedule", "StepSchedule([0, 0.25, 0.5], [1, 3])", "--epochs", 4).splitlines()
    assert [line.split()[:2] for line in lines[2:6]] == [
        ["0", "0"],
        ["1", "0.25"],
        ["2", "0.25"],
        ["3", "0.5"],
    ]
    assert [line.count("#") for line in lines[2:6]] == [0, 10, 10, 20]
    assert lines[6].endswith("average drop rate 0.25 over 4 epochs")


def test_a_schedule_of_steps_prints_mean_and_range_of_each_epoch(printed):
    text = "StepSchedule([0.0, 0.5], [3], interval='step')"
    lines = printed("schedule", text, "--epochs", 3, "--steps-per-epoch", 2).splitlines()
    assert [line.split()[:4] for line in lines[2:5]] == [
        ["0", "0", "0", "0"],
        ["1", "0.25", "0", "0.5"],
        ["2", "0.5", "0.5", "0.5"],
    ]
    assert lines[5].endswith("average drop rate 0.25 over 3 epochs of 2 steps")


def test_schedule_as_json_and_csv_has_every_value(printed, read_csv):
    text = "CosineSchedule(0.1, 0.7, total=5, interval='step', levels=7)"
    schedule = ssp.CosineSchedule(0.1, 0.7, total=5, interval="step", levels=7)
    rates = [schedule(t) for t in range(6)]
    arguments = ("schedule", text, "--epochs", 2, "--steps-per-epoch", 3)
    found = json.loads(printed(*arguments, "--json"))
    assert found["drop_rates"] == rates
    assert found["average"] == pytest.approx(sum(rates) / 6)
    assert found["schedule"] == repr(schedule)
    rows = read_csv(printed(*arguments, "--csv"))
    assert [float(row["drop_rate"]) for row in rows] == rates
    assert [int(row["epoch"]) for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [int(row["t"]) for row in rows] == list(range(6))


def test_a_preset_is_named_in_any_case(printed):
    for word in ("paper", "PAPER", "presets.PAPER"):
        last = printed("schedule", word, "--epochs", 2).splitlines()[-1]
        assert last == "BarSchedule(0.8, period=2): average drop rate 0.4 over 2 epochs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["papr", "--epochs", "2"], "there are PAPER, STEADY; did you mean PAPER?"),
        (["BarShedule(0.8)", "--epochs", "2"], "did you mean BarSchedule"),
        (["__import__('os')", "--epochs", "2"], "is not a schedule"),
        (["BarSchedule(0.8)"], "--epochs"),
        (["BarSchedule(0.8)", "--epochs", "-1"], "'-1' is not an integer >= 1"),
        (["BarSchedule(0.8, interval='step')", "--epochs", "2"], "give --steps-per-epoch"),
    ],
)
def test_a_schedule_that_is_none_is_one_line_and_code_2(arguments, message, refused):
    line, code = refused("schedule", *arguments)
    assert message in line and code == 2
