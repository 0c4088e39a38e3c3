"""A CSV file that is whole at any moment: added to row by row, or replaced at once."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from ._files import whole_rows, write_atomically, write_whole

Row = Mapping[str, Any]


class CsvTable:
    """A CSV file of certain columns.

    Rows are added whole, by one process after another: what a killed one left of its last row is
    cut off before the next is written, and on a full disk nothing of a row is written.

    Args:
        path: A file of these columns, an empty one, or none yet.
        columns: Its header.
        added: Columns that a file of an older version may lack, with what then stands for them.
    """

    def __init__(
        self, path: str | os.PathLike[str], columns: Sequence[str], added: Row | None = None
    ) -> None:
        self.path, self.columns, self.added = Path(path), tuple(columns), dict(added or {})

    def read(self) -> list[dict[str, str]]:
        """Return the rows, all as text, without one that was left unfinished.

        Raises:
            ValueError: If the file has other columns.
        """
        content = self._content()
        self._check(content)
        text = io.StringIO(whole_rows(content).decode(), newline="")
        return [{**self.added, **row} for row in csv.DictReader(text)]

    def check(self) -> None:
        """Raise now, not after hours of measurements, if nothing can be added.

        Raises:
            ValueError: If the file has other columns, or its folder is missing.
        """
        if not self.path.parent.is_dir():
            raise ValueError(f"{self.path}: there is no folder {self.path.parent}")
        self._check(self._content())

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows, and put them on the disk; what a row does not have stays empty.

        Raises:
            ValueError: If the file has other columns.
            OSError: If they cannot be written; nothing of them is in the file then.
        """
        content = "".join(map(self.line, rows)).encode()
        with self.open() as file:
            write_whole(file.fileno(), content)
            os.fsync(file.fileno())

    def open(self) -> FileIO:
        """Return the file, begun or mended, without a buffer, to write lines at its end.

        Raises:
            ValueError: If the file has other columns.
        """
        content = self._content()
        self._check(content)
        whole = whole_rows(content)
        if whole and self._header(whole) != [*self.columns]:
            self.replace(self.read())  # of an older version
            whole = content = self._content()
        # Without a buffer, whose content would come out after a failure.
        file = self.path.open("ab", buffering=0)
        if len(whole) < len(content):
            file.truncate(len(whole))
        if not whole:
            write_whole(file.fileno(), _line(self.columns).encode())
        return file

    def line(self, row: Row) -> str:
        """Return a row as a line of the file."""
        return _line(row.get(name, "") for name in self.columns)

    def replace(self, rows: Iterable[Row]) -> None:
        """Let the file hold these rows and no others, at once."""
        write_atomically(self.path, "".join(csv_lines(rows, self.columns)))

    def _content(self) -> bytes:
        return self.path.read_bytes() if self.path.exists() else b""

    def _check(self, content: bytes) -> None:
        whole = whole_rows(content)
        if not whole and _line(self.columns).encode().startswith(content.rstrip(b"\r\n")):
            return  # a process was killed while it began the file
        found = self._header(whole or content)
        if found == [n for n in self.columns if n in found or n not in self.added]:
            return
        missing = [name for name in self.columns if name not in found and name not in self.added]
        unknown = [name for name in found if name not in self.columns]
        which = [f"without {', '.join(missing)}"] * bool(missing)
        which += [f"with {', '.join(unknown)}"] * bool(unknown)
        raise ValueError(
            f"{self.path} has other columns than are written now "
            f"({'; '.join(which) or 'in another order'}): name another file, or move this one away"
        )

    def _header(self, content: bytes) -> list[str]:
        return next(csv.reader(io.StringIO(content.decode(), newline="")), [])


def csv_lines(rows: Iterable[Row], columns: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a CSV, the header first; what a row does not have stays empty."""
    yield _line(columns)
    for row in rows:
        yield _line(row.get(name, "") for name in columns)


def _line(values: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
