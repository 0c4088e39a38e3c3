"""Raises an interrupt at a line, or at an instruction, of this package's own code."""

import os
import sys

import ssprop_patch

FOLDER = os.path.dirname(ssprop_patch.__file__) + os.sep


#: What only looks at the model: an interrupt in there is tried now and then.
LOOKS = {
    f"{FOLDER}{name}.py"
    for name in (
        "patching/dry_run",
        "patching/plan",
        "patching/eligibility",
        "patching/name_patterns",
        "patching/weight_readers",
        "patching/weights",
        "patching/gradient_hooks",
        "_validate",
    )
}
assert all(map(os.path.exists, LOOKS))


class Interrupt(BaseException):
    """Stands for a KeyboardInterrupt, of which nobody but the test knows."""


def interrupted(action, n, event="line"):
    """Run ``action()`` with an interrupt at its ``n``-th ``event``; tell whether there was one.

    Args:
        action: What is run.
        n: From 0.
        event: ``"line"`` or ``"opcode"``.
    """

    def at(i, frame):
        if i == n:
            raise Interrupt  # with which Python stops tracing

    try:
        _traced(action, at, event)
    except Interrupt:
        return True
    return False


def every(prepare, event="line", step=1):
    """Yield what ``prepare()`` made, for each place where its action can be interrupted.

    Args:
        prepare: Returns something new and the action on it.
        event: As for :func:`interrupted`.
        step: Every so many places.
    """
    files = []
    for _ in range(2):  # the first time makes classes
        files.clear()
        _traced(prepare()[1], lambda i, frame: files.append(frame.f_code.co_filename), event)
    places = [n for n, file in enumerate(files) if n % (20 * step) == 0 or file not in LOOKS]
    assert len(places) > 20, "hardly anything can be interrupted"
    for n in places[::step]:
        made, action = prepare()
        assert interrupted(action, n, event)
        yield made


def _traced(action, at, event):
    """Run ``action()``, and ``at(i, frame)`` at its i-th event in this package's own code."""
    count = 0

    def trace(frame, kind, argument):
        nonlocal count
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        frame.f_trace_opcodes = event == "opcode"
        if kind == event:
            count += 1
            at(count - 1, frame)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
