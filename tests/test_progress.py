"""Progress: on a terminal a bar that goes away, elsewhere a line every half minute."""

import io
import sys
import time

import pytest

from ssprop_patch._progress import Progress


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def stderr(monkeypatch):
    def put(terminal, rich=True):
        if not rich:
            monkeypatch.setitem(sys.modules, "rich", None)
        stream = Stream(terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return put


def test_without_a_terminal_there_is_a_line_every_half_minute(stderr, clock):
    stream = stderr(terminal=False)
    with Progress("layers") as progress:
        for done in range(1, 10):
            clock[0] += 8
            progress(done, 9, "slow")
    assert stream.getvalue() == "layers: 4 of 9, slow\nlayers: 8 of 9, slow\n"


def screen(text):
    """What is left on a line of a terminal, of texts that return to its start."""
    shown = ""
    for part in text.split("\r"):
        shown = part + shown[len(part) :]
    return shown.rstrip()


def test_on_a_terminal_without_rich_a_counter_counts_and_is_gone_at_the_end(stderr, clock):
    stream = stderr(terminal=True, rich=False)
    with Progress("layers") as progress:
        for done in (9, 10):
            clock[0] += 1
            progress(done, 10, "of resnet18" * (done == 9))
            assert screen(stream.getvalue()) == f"layers: {done} of 10" + (
                ", of resnet18" * (done == 9)
            )
    assert screen(stream.getvalue()) == "" and "\n" not in stream.getvalue()


@pytest.mark.parametrize("rich", [True, False])
def test_a_failure_ends_it_and_what_is_said_stands_on_a_line_of_its_own(stderr, clock, rich):
    stream = stderr(terminal=True, rich=rich)
    with pytest.raises(OSError), Progress("layers") as progress:
        progress(1, 7)
        progress.say("a [remark]")
        raise OSError
    assert "a [remark]\n" in stream.getvalue()
    assert ("1/7" if rich else "1 of 7") in stream.getvalue()
    show, hide = "\x1b[?25h", "\x1b[?25l"  # the cursor
    assert stream.getvalue().count(show) == stream.getvalue().count(hide) == rich


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_not_to_be_shown_is_not(stderr, clock, terminal):
    stream = stderr(terminal)
    with Progress("layers", shown=False) as progress:
        clock[0] += 100
        progress(1, 7)
    assert stream.getvalue() == ""
