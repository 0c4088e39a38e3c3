"""The text of a schedule: every repr is read, nothing is run, what is wrong is said in one line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ssprop_patch as ssp
from ssprop_patch.schedule.parse import PRESETS, SCHEDULES, parse_schedule


@pytest.mark.parametrize(
    "schedule",
    [
        ssp.ConstantSchedule(0.5),
        ssp.BarSchedule(0.8, period=4, interval="step"),
        ssp.LinearSchedule(0.0, 0.8, total=10),
        ssp.CosineSchedule(0.0, 0.8, total=20, levels=8),
        ssp.StepSchedule([0.0, 0.5], milestones=[3]),
        ssp.SequentialSchedule([ssp.ConstantSchedule(0.0), ssp.BarSchedule(0.8)], milestones=[5]),
    ],
)
def test_every_repr_is_read(schedule):
    assert parse_schedule(repr(schedule)) == schedule


def test_every_schedule_but_the_one_with_a_function_has_a_text():
    public = {name for name in ssp.__all__ if name.endswith("Schedule")}
    assert set(SCHEDULES) == public - {"Schedule", "LambdaSchedule"}


def test_every_preset_that_is_a_schedule_has_its_name():
    named = {name: getattr(ssp.presets, name) for name in ssp.presets.__all__}
    assert {n: s for n, s in named.items() if isinstance(s, ssp.Schedule)} == PRESETS
    for name, schedule in PRESETS.items():
        for text in (name, name.lower(), f"ssp.presets.{name}"):
            assert parse_schedule(text) == schedule
    nested = parse_schedule("SequentialSchedule([ConstantSchedule(0.0), paper], [5])")
    assert nested.schedules[1] == ssp.presets.PAPER


def test_numbers_and_the_package_prefix_are_read():
    assert parse_schedule(" 0.5 ") == ssp.ConstantSchedule(0.5)
    assert parse_schedule("+0.5") == ssp.ConstantSchedule(0.5)
    assert parse_schedule("0") == ssp.ConstantSchedule(0.0)
    assert parse_schedule("ssp.BarSchedule(0.8)") == ssp.BarSchedule(0.8)
    assert parse_schedule("ssprop_patch.BarSchedule(0.8)") == ssp.BarSchedule(0.8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').mkdir('made')", "is not a schedule"),
        ("BarSchedule(__import__('os').mkdir('made'))", "is not a schedule"),
        ("BarSchedule(0.8).__class__", "neither a number"),
        ("LambdaSchedule(lambda t: 0.5)", "not a schedule that a text can name"),
        ("(lambda: BarSchedule(0.8))()", "is not a schedule"),
        ("[BarSchedule(0.8) for _ in '1']", "neither a number"),
        ("BarSchedule(**{'drop_rate': 0.8})", "no meaning"),
        ("BarSchedule(0.4 + 0.4)", "neither a number"),
        ("BarSchedule(0.8, period=-'2')", "neither a number"),
        ("BarSchedule(1.5)", "[0, 1)"),
        ("BarSchedule('high')", "must be a number"),
        ("BarSchedule(period=2)", "missing"),
        ("BarShedule(0.8)", "did you mean BarSchedule"),
        ("barschedule", "there are PAPER, STEADY; did you mean BarSchedule(...)?"),
        ("presets.whole_gradient", "nor a preset, of which there are PAPER, STEADY"),
        ("SequentialSchedule([0.5], milestones=[])", "must hold Schedule objects"),
        ("SequentialSchedule([BarSchedule(2)], [])", "[0, 1)"),
        ("[0.5]", "not a schedule; write"),
        ("0.5 0.6", "invalid syntax"),
        ("True", "not a schedule; write"),
        ("None", "not a schedule; write"),
        ("-1", "[0, 1)"),
        ("nan", "neither a number"),
        ("1e999", "[0, 1)"),
        ("9" * 400, "too large"),
        ("BarSchedule(" + "9" * 400 + ")", "too large"),
        ("", "invalid syntax"),
        ("(" * 5000, ""),
        ("BarSchedule(0.8\0)", ""),
        ("BarSchedule(\n'hi\ngh'\n)", ""),
    ],
)
def test_everything_else_is_refused_in_one_line_and_not_run(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        parse_schedule(text)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert repr(text)[:100] in str(error.value)
    assert not list(tmp_path.iterdir())


PIECES = [
    "BarSchedule",
    "StepSchedule",
    "(",
    ")",
    "[",
    "]",
    ",",
    "0.8",
    "2",
    "-",
    "=",
    "period",
    "levels",
    "'step'",
    "interval",
    "None",
    ".",
    "**",
    "lambda",
    " ",
]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=20))
def test_any_text_is_a_schedule_or_a_value_error(text):
    try:
        schedule = parse_schedule(text)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert 0.0 <= schedule(0) < 1.0
        assert parse_schedule(repr(schedule)) == schedule
