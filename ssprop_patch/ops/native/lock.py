"""A lock between processes, so that one of them compiles what the others wait for."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

_FILE = "lock"
_POLL = 0.05  # seconds


@contextlib.contextmanager
def one_at_a_time(folder: Path | None, patience: float) -> Iterator[bool]:
    """Wait for the lock of a cache folder and hold it.

    The system releases it when the process that holds it ends, however that comes about, so the
    file may stay: nothing is read from it. It is one for all libraries, as a file that is removed
    while others wait for it locks nothing.

    Args:
        folder: The cache; None if there is none.
        patience: Seconds to wait for another process.

    Yields:
        Whether the lock is held. Not where there is no folder, where a file in it cannot be locked
        (a read-only disk, some network file systems), or once patience is over.
    """
    descriptor = None if folder is None else _open(folder / _FILE)
    if descriptor is None:
        yield False
        return
    import fcntl  # not on Windows, where nothing is compiled

    held = False
    try:
        end = time.monotonic() + patience
        while not held:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if time.monotonic() > end:
                    break
                time.sleep(_POLL)
            except OSError:  # not on this file system
                break
        yield held
    finally:
        if held:
            # Not by closing alone: a process forked meanwhile has the file open, too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
