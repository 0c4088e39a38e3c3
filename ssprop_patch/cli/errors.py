"""What ends a command: one line on standard error, and an exit code."""

from __future__ import annotations

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class CommandError(Exception):
    """Something did not work: exit code 1."""

    code = FAILED


class UsageError(CommandError):
    """The command line asks for something that there is not: exit code 2."""

    code = USAGE


def one_line(error: object, limit: int = 600) -> str:
    """Return an error, or its text, on one line of bearable length."""
    text = " ".join(str(error).split())
    if isinstance(error, Exception) and not text:
        text = "no message"
    return text if len(text) <= limit else text[: limit - 3] + "..."
