"""How far something long has come: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

# Between two lines where there is no terminal, and between two pictures of a bar.
_LINES, _PICTURES = 30.0, 0.1


class Progress:
    """Shows on standard error how much is done::

        with Progress("layers") as progress:
            for done, layer in enumerate(layers, 1):
                ...
                progress(done, len(layers))

    On a terminal it is rich's bar if rich is installed, else a counter, and gone at the end; drawn
    only when it is called, as a thread of its own would disturb what is timed. Where there is no
    terminal (a log file, a notebook) a plain line comes every half minute, so that what is soon
    done says nothing.

    Args:
        what: What is counted, such as ``"layers"``.
        shown: False shows nothing.
    """

    def __init__(self, what: str, shown: bool = True) -> None:
        self._what, self._shown = what, shown
        self._terminal = shown and sys.stderr.isatty()
        self._bar: Any = None
        self._width = 0  # of the counter that stands on the terminal
        self._next = time.monotonic() + (0.0 if self._terminal else _LINES)

    def __enter__(self) -> Progress:
        if self._terminal:
            self._bar = _rich_bar()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=None, text="")
        return self

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """Show that ``done`` of ``total`` are done, and ``text`` after it."""
        now = time.monotonic()
        if not self._shown or now < self._next:
            return
        self._next = now + (_PICTURES if self._terminal else _LINES)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, text=text)
            self._bar.refresh()
            return
        line = f"{self._what}: {done} of {total}" + (f", {text}" if text else "")
        if self._terminal:
            self._counter(line)
        else:
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line on standard error, above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
            return
        self._counter("")
        print(line, file=sys.stderr, flush=True)

    def _counter(self, line: str) -> None:
        if line or self._width:
            print(f"\r{line.ljust(self._width)}", end="", file=sys.stderr, flush=True)
            if not line:
                print("\r", end="", file=sys.stderr, flush=True)
            self._width = len(line)

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._counter("")


def _rich_bar() -> Any:
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[text]}"),
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,
    )
