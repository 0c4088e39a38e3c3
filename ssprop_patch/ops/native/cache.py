"""Keeps compiled libraries in the user's cache folder, for later processes and other ranks.

The name of a file says what it was compiled from and what it contains: a hash of all that could
change the result, and the SHA-256 of the library itself. A file is written under another name and
renamed, so any number of processes may read and write at a time. Nothing here is an error: where
the folder or a file cannot be used or trusted, the library is compiled as if there were no cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_DAY = 24 * 60 * 60.0
_LONGEST_UNUSED = 60 * _DAY
_NAME = re.compile(r"[a-z]+-[a-z]+-[0-9a-f]{32}-[0-9a-f]{64}\.so(\.\w+\.tmp)?")


def find_entry(
    name: str, compiler: list[str], flags: Iterable[str], sources: Path
) -> CacheEntry | None:
    """Return the place of a library in the cache; None if nothing can be kept.

    Args:
        name: Of the library, ``word-word``.
        compiler: Its command.
        flags: What it is called with, but for files.
        sources: Folder of the files that are compiled; all of them count.

    Raises:
        OSError: If the sources cannot be read.
    """
    folder = find_folder()
    version = None if folder is None else _version_of(tuple(compiler))
    if folder is None or version is None:
        return None
    path = shutil.which(compiler[0])
    made_of = [
        name,
        [*compiler, *flags],
        path and os.path.realpath(path),
        version,
        _processor(),
        platform.libc_ver(),
        [
            (file.name, hashlib.sha256(file.read_bytes()).hexdigest())
            for file in sorted(sources.glob("*.[ch]"))
        ],
    ]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    return CacheEntry(folder, f"{name}-{key[:32]}")


def find_folder() -> Path | None:
    """Return the folder of compiled libraries, made if need be; None if there is none to trust.

    It is ``$SSPROP_PATCH_CACHE``, or else ``ssprop_patch`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    Where ``SSPROP_PATCH_CACHE`` is 0 or empty there is none. Libraries are loaded only from a
    folder that belongs to this user, and that nobody else may write to.
    """
    chosen, shared = (os.environ.get(name) for name in ("SSPROP_PATCH_CACHE", "XDG_CACHE_HOME"))
    if chosen in ("", "0"):
        return None
    home = os.path.expanduser("~")
    try:
        if chosen is not None:
            folder = os.path.abspath(os.path.expanduser(chosen))
        elif shared and os.path.isabs(shared):
            folder = os.path.join(shared, "ssprop_patch")
        elif os.path.isabs(home) and _is_own(os.stat(home)):  # under sudo it may be another user's
            folder = os.path.join(home, ".cache", "ssprop_patch")
        else:
            return None
        os.makedirs(folder, mode=0o700, exist_ok=True)
        status = os.stat(folder)
    except (OSError, ValueError):  # a null character
        return None
    return Path(folder) if _is_own(status) and _only_owner_writes(status) else None


@dataclass(frozen=True)
class CacheEntry:
    """Place of one library in the cache."""

    folder: Path
    stem: str  # its name and its key

    def load(self) -> ctypes.CDLL | None:
        """Load the library; None if it is not there. A file that was damaged is removed."""
        for path in sorted(self.folder.glob(f"{self.stem}-*.so")):
            with contextlib.suppress(OSError):
                if not _is_intact(path):
                    path.unlink()
                    continue
                library = ctypes.CDLL(str(path))  # fails on a file system without execution
                _mark_used(path)
                return library
        return None

    def store(self, library: Path) -> None:
        """Keep a compiled library, if that is possible."""
        with contextlib.suppress(OSError):
            content = library.read_bytes()
            target = self.folder / f"{self.stem}-{hashlib.sha256(content).hexdigest()}.so"
            descriptor, beside = tempfile.mkstemp(".tmp", f"{target.name}.", self.folder)
            try:
                with open(descriptor, "wb") as file:
                    file.write(content)
                os.replace(beside, target)
            except BaseException:
                os.unlink(beside)
                raise
            self._remove_unused()

    def _remove_unused(self) -> None:
        """Remove libraries with other keys, and what killed processes left, after 60 days."""
        for path in self.folder.iterdir():
            if not _NAME.fullmatch(path.name) or path.name.startswith(self.stem):
                continue
            with contextlib.suppress(OSError):
                if time.time() - path.lstat().st_mtime > _LONGEST_UNUSED:
                    path.unlink()


def _mark_used(path: Path) -> None:
    """Set the time of a file that :meth:`CacheEntry._remove_unused` looks at, once a day."""
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > _DAY:
            os.utime(path)


def _is_intact(path: Path) -> bool:
    """Whether a file is the library that was stored under its name."""
    status = path.lstat()  # a link is not
    if not (stat.S_ISREG(status.st_mode) and _is_own(status) and _only_owner_writes(status)):
        return False
    return path.stem.rpartition("-")[2] == hashlib.sha256(path.read_bytes()).hexdigest()


def _is_own(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid()


def _only_owner_writes(status: os.stat_result) -> bool:
    return not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@functools.cache
def _version_of(compiler: tuple[str, ...]) -> str | None:
    """Return what a compiler says of itself; None if it does not."""
    try:
        done = subprocess.run(
            [*compiler, "--version"],
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout + done.stderr


@functools.cache
def _processor() -> str:
    """Return what the compiler's choice of instructions depends on."""
    wanted = {"vendor_id", "cpu family", "model", "flags"}
    wanted |= {"CPU implementer", "CPU part", "Features"}  # of ARM
    found = [platform.machine()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo", errors="replace") as file:
        for line in file:
            if not line.strip():
                break  # the other processors are like the first
            if line.partition(":")[0].strip() in wanted:
                found.append(line.strip())
    return "\n".join(found if len(found) > 1 else [*found, platform.processor()])
