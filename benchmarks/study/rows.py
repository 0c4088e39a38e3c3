"""The CSV that holds one row a finished run, and who may train which run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from classifier.options import UserError
from filelock import FileLock, Timeout

from ssprop_patch._csv_table import CsvTable


class Rows:
    """Rows of a CSV, appended by any number of processes, each row once.

    A row is written in one piece and put on the disk before ``append`` returns. What a process
    that was killed left of one is cut off before the next is written.

    Args:
        path: Of the CSV; a lock file stands beside it while it is written to.
        fields: Its columns; the first, ``id``, says which run it is.
        added: Columns that a file of an older version may lack, with what then stands for them.
    """

    def __init__(
        self, path: Path, fields: Iterable[str], added: Mapping[str, str] | None = None
    ) -> None:
        self.path, self.fields, self.added = path, tuple(fields), dict(added or {})
        self._table = CsvTable(path, self.fields, self.added)
        self._lock = FileLock(path.with_name(path.name + ".lock"))

    def read(self) -> list[dict[str, str]]:
        """Return the rows, all as text.

        Raises:
            UserError: If the file has other columns.
        """
        try:
            return self._table.read()
        except ValueError as error:
            raise UserError(f"{error}, or give another --output") from error

    def ids(self) -> set[str]:
        """Return the finished runs."""
        return {row["id"] for row in self.read()}

    def append(self, row: Mapping[str, Any]) -> bool:
        """Add a row, unless the file has one of that id; tell whether it was added."""
        with self._lock:
            if str(row["id"]) in self.ids():
                return False
            self._table.append([self._whole(row)])
        return True

    def replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Let the file hold these rows and no others."""
        self._table.replace(map(self._whole, rows))

    def _whole(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: row[name] for name in self.fields}  # none is missing

    def same_images(self, name: str, size: int, digest: str, origin: str) -> None:
        """Refuse to mix rows of different images under one name.

        Args:
            name, size: Of the images, as the columns ``data`` and ``image_size`` have them.
            digest: Of all pixels and labels.
            origin: Where they came from, for the message.

        Raises:
            UserError: If a row has the name and the size, but another digest.
        """
        for row in self.read():
            same = row["data"] == name and int(row["image_size"]) == size
            if same and row["digest"] != digest:
                raise UserError(
                    f"{self.path} holds runs on other images called {name!r} (from "
                    f"{row['origin']}, not {origin}): give another --output"
                )


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Tell whether what ``path`` stands for is this process's, until the block is left.

    The system gives a lock back however its holder ends, so a killed process blocks nobody.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
