"""Files that are whole at any moment: written beside and renamed, or added to row by row."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content``, text as UTF-8, wholly or not at all, see :func:`replacing`."""
    with replacing(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path in the same folder to write to, that takes the place of ``path`` in the end.

    Whenever the process is killed or the disk is full, ``path`` is the old file or the new one,
    never a part of one. What is no ordinary file, such as ``/dev/stdout``, is written itself.
    """
    target = Path(os.path.realpath(path))  # a link still points where it did
    if target.exists() and not target.is_file():
        yield target
        return
    beside = target.with_name(f"{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def whole_rows(content: bytes) -> bytes:
    """Return what a CSV file holds without a last row that was left unfinished.

    A row ends with a line break outside of quotes.
    """
    end = len(content)
    while (end := content.rfind(b"\n", 0, end)) >= 0:
        # An odd number of quotes before it: inside a quoted cell.
        if content.count(b'"', 0, end) % 2 == 0:
            return content[: end + 1]
    return b""


def append_rows(path: Path, rows: str, header: str = "") -> None:
    """Add whole rows to a CSV file, and put them on the disk; begin it with ``header``.

    A row that a killed process left unfinished is cut off first.
    """
    with path.open("a+b") as file:
        file.seek(0)
        length = len(whole_rows(file.read()))
        file.truncate(length)
        file.write((rows if length else header + rows).encode())
        file.flush()
        os.fsync(file.fileno())
