"""Files that are whole at any moment: written beside and renamed, or added to in one piece."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from os import PathLike
from pathlib import Path


def write_atomically(path: str | PathLike[str], content: str | bytes) -> None:
    """Write ``content``, text as UTF-8, wholly or not at all, see :func:`replacing`."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as beside:
        beside.write_bytes(data)


@contextlib.contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """Give a path in the same folder to write to, that takes the place of ``path`` in the end.

    Whenever the process is killed, the machine stops or the disk is full, ``path`` is the old file
    or the new one, never a part of one. In all else it is as with ``open(path, "w")``: a file that
    is there keeps its mode, a new one gets the usual, a link still points where it did, and what
    may not be written is not. What is no ordinary file, such as ``/dev/stdout``, is written itself.

    On an exception the file beside is removed; only a kill leaves one, ``NAME.*.tmp``.
    """
    target = Path(os.path.realpath(path))  # what a link points to, even if that is not there yet
    try:
        old = os.stat(target)
    except FileNotFoundError:
        old = None
    if old is not None and not stat.S_ISREG(old.st_mode):
        yield target  # a device or a pipe; opening a folder says what is wrong
        return
    if old is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    # 255 bytes may be all that a name has.
    beside = target.with_name(f"{target.name[:50]}.{secrets.token_hex(6)}.tmp")
    try:
        try:  # not by mkstemp, so that the umask counts
            mode = 0o666 if old is None else 0o600
            os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        except OSError as error:
            error.filename = str(path)
            raise
        yield beside
        _to_disk(beside, os.O_RDWR)
        if old is not None:
            if hasattr(os, "chown"):
                with contextlib.suppress(OSError):  # who is not root cannot give a file away
                    os.chown(beside, old.st_uid, old.st_gid)
            os.chmod(beside, stat.S_IMODE(old.st_mode))
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    with contextlib.suppress(OSError):  # not every system can do that to a folder
        _to_disk(target.parent, os.O_RDONLY)


def _to_disk(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def write_whole(descriptor: int, data: bytes) -> None:
    """Write all of ``data`` to a file that is open for appending, or, on a full disk, nothing."""
    length = os.fstat(descriptor).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except BaseException:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, length)
        raise
