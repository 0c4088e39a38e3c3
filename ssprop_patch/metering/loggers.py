"""Where the scalars of a meter go: TensorBoard, a CSV file, or any function."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from .._files import lacks_header, whole_rows, write_whole
from .layer_record import LayerTotals

Scalars = dict[str, float]


class Metered(Protocol):
    """What is written of a :class:`ssprop_patch.Meter`."""

    steps: int

    @property
    def drop_rate(self) -> float:
        """Of the latest step."""

    @property
    def totals(self) -> LayerTotals:
        """Of all layers."""

    @property
    def kept(self) -> Mapping[str, tuple[int, int]]:
        """Kept and all output channels of each layer."""


class ScalarWriter(Protocol):
    """TensorBoard's ``SummaryWriter``, and what is like it."""

    def add_scalar(self, name: str, value: float, step: int) -> Any:
        """Write one value."""


Target = ScalarWriter | str | os.PathLike | Callable[[Scalars, int], Any]


class Logger:
    """Writes the scalars that :meth:`ssprop_patch.Meter.log_to` names.

    Args:
        target: Where to.
        every: Optimizer steps.
        layers: Names of the layers of which to write the kept channels.
    """

    def __init__(self, target: Target, every: int, layers: Sequence[str]) -> None:
        self._every, self._layers = every, layers
        totals = ("drop_rate", "backward_saved", "total_saved", "flops")
        names = [f"ssprop/{name}" for name in (*totals, *(f"kept/{layer}" for layer in layers))]
        self._file: CsvFile | None = None
        if isinstance(target, (str, os.PathLike)):
            self._file = CsvFile(Path(target), ("step", *names))
            self._write: Callable[[Scalars, int], Any] = self._file.write
        elif callable(getattr(target, "add_scalar", None)):
            self._write = _add_scalars(cast(ScalarWriter, target))
        elif callable(target):
            self._write = target
        else:
            raise TypeError(
                "a target is the path of a CSV file, something with add_scalar(name, value, step), "
                f"or a function of (scalars, step); got {target!r}"
            )

    def __call__(self, meter: Metered) -> None:
        """Write, if it is time."""
        if meter.steps % self._every == 0:
            self._write(self._scalars(meter), meter.steps)

    def _scalars(self, meter: Metered) -> Scalars:
        done = meter.totals
        scalars: Scalars = {
            "ssprop/drop_rate": meter.drop_rate,
            "ssprop/backward_saved": done.backward_saved,
            "ssprop/total_saved": done.total_saved,
            "ssprop/flops": done.forward_flops + done.backward_flops,
        }
        kept = meter.kept if self._layers else {}
        for name in self._layers:
            if name in kept:
                scalars[f"ssprop/kept/{name}"] = kept[name][0]
        return scalars

    def close(self) -> None:
        """Nothing more will be written."""
        if self._file is not None:
            self._file.close()


def _add_scalars(writer: ScalarWriter) -> Callable[[Scalars, int], None]:
    def write(scalars: Scalars, step: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    return write


class CsvFile:
    """A table that is added to row by row, by one process after another.

    Each row is in the file once it is written, whole. A row that a killed process left unfinished
    is cut off. A run resumed from an older checkpoint writes some steps again: the later row
    counts.

    Args:
        path: A file of these columns, an empty one, or none yet.
        columns: Its header.

    Raises:
        ValueError: If the file has other columns.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._columns = columns
        text = path.read_bytes() if path.exists() else b""
        whole = whole_rows(text)
        header = next(csv.reader(whole.decode().splitlines()), None)
        is_ours = lacks_header(text, _line(columns)) if header is None else header == list(columns)
        if not is_ours:
            raise ValueError(f"{path} is there already and has other columns: log to another file")
        # Without a buffer, whose content would come out after a failure.
        self._file = path.open("ab", buffering=0)
        if len(whole) < len(text):
            self._file.truncate(len(whole))
        if header is None:
            write_whole(self._file.fileno(), _line(columns).encode())

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Add a row; what is not among ``scalars`` stays empty.

        Raises:
            OSError: If it cannot be written, as on a full disk; nothing of it is in the file then.
        """
        row = {"step": step, **scalars}
        line = _line([row.get(name, "") for name in self._columns])
        write_whole(self._file.fileno(), line.encode())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(values: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text).writerow(values)
    return text.getvalue()
