"""From the text of a schedule to the schedule, without evaluating anything."""

from __future__ import annotations

import ast
import difflib
from typing import Any

from . import presets
from .schedules import (
    BarSchedule,
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    Schedule,
    SequentialSchedule,
    StepSchedule,
)

#: What a text can name: all but LambdaSchedule, whose function no text can hold.
SCHEDULES: dict[str, type[Schedule]] = {
    cls.__name__: cls
    for cls in (
        ConstantSchedule,
        BarSchedule,
        LinearSchedule,
        CosineSchedule,
        StepSchedule,
        SequentialSchedule,
    )
}

#: Schedules with a name, which counts in small letters, too.
PRESETS: dict[str, Schedule] = {"PAPER": presets.PAPER, "STEADY": presets.STEADY}

# Where Python itself gives up on a text (too deep, null bytes), it is as wrong as others.
_WRONG = (SyntaxError, ValueError, TypeError, OverflowError, RecursionError, MemoryError)


def parse_schedule(text: str) -> Schedule:
    """Return the schedule that ``text`` describes.

    The text is a call of one of ``SCHEDULES`` with numbers, texts, lists and other such calls as
    arguments, as a schedule's own repr is; the name of a preset, such as ``paper``; or a bare
    number, a constant rate. It is read as a syntax tree, never run, so a command line taken from
    elsewhere can do no harm.

    Raises:
        ValueError: If the text is anything else, or a schedule refuses its arguments. One line.
    """
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = ConstantSchedule(float(value))
    except _WRONG as error:
        message = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"{_short(text)}: {message}") from error
    if not isinstance(value, Schedule):
        raise ValueError(
            f"{_short(text)}: not a schedule; write for example 'BarSchedule(0.8, period=2)', a "
            f"number for a constant drop rate, or a preset: {', '.join(PRESETS)}"
        )
    return value


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:197] + "...")


def _value(node: ast.expr) -> Any:
    """Return the value of one node; ValueError for what a schedule's text has no use for."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, type(None))):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _value(node.operand)
        if isinstance(value, (int, float)):
            return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Call):
        return _call(node)
    if isinstance(node, (ast.Name, ast.Attribute)):
        return _preset(node)
    raise ValueError(
        f"{ast.unparse(node)!r} is neither a number, a text, a list nor one of the schedules "
        f"{', '.join(SCHEDULES)}"
    )


def _preset(node: ast.expr) -> Schedule:
    name = ast.unparse(node)
    bare = _bare(name).removeprefix("presets.").upper()
    if bare in PRESETS:
        return PRESETS[bare]
    known = {name.upper(): f"{name}(...)" for name in SCHEDULES} | {n: n for n in PRESETS}
    near = difflib.get_close_matches(bare, known, n=1)
    hint = f"; did you mean {known[near[0]]}?" if near else ""
    raise ValueError(
        f"{name!r} is neither a number nor a preset, of which there are {', '.join(PRESETS)}{hint}"
    )


def _bare(name: str) -> str:
    return name.removeprefix("ssp.").removeprefix("ssprop_patch.")


def _call(node: ast.Call) -> Schedule:
    name = ast.unparse(node.func)
    bare = _bare(name)
    if bare not in SCHEDULES:
        near = difflib.get_close_matches(bare, SCHEDULES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SCHEDULES)}"
        raise ValueError(f"{name!r} is not a schedule that a text can name; {hint}")
    if any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("'**' has no meaning in a schedule's text")
    arguments = [_value(argument) for argument in node.args]
    named = {k.arg: _value(k.value) for k in node.keywords if k.arg is not None}
    return SCHEDULES[bare](*arguments, **named)
