"""What ends a command: one line on standard error, and an exit code."""

from __future__ import annotations

from .. import _text

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class CommandError(Exception):
    """Something did not work: exit code 1."""

    code = FAILED


class UsageError(CommandError):
    """The command line asks for something that there is not: exit code 2."""

    code = USAGE


def one_line(error: object, limit: int = 600) -> str:
    """Return an error, or its text, on one line of bearable length."""
    return _text.one_line(error, limit) or "no message"
