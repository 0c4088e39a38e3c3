"""Where the scalars of a meter go: TensorBoard, a CSV file, or any function."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from .._csv_table import CsvTable
from .._files import whole_rows, write_whole
from ..flops.totals import Flops
from .layer_record import LayerTotals

Scalars = dict[str, float]


class Metered(Protocol):
    """What is written of a :class:`ssprop_patch.Meter`."""

    steps: int
    resumed: bool

    @property
    def drop_rate(self) -> float:
        """Of the latest step."""

    @property
    def converted_totals(self) -> LayerTotals:
        """Of the converted layers."""

    @property
    def network(self) -> Flops | None:
        """Of the whole network; None if that is not known."""

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
        append: Whether to add to the log that a CSV file holds; None: at the first row, if the run
            is resumed by then.
    """

    def __init__(
        self, target: Target, every: int, layers: Sequence[str], append: bool | None
    ) -> None:
        self._every, self._layers = every, layers
        totals = ("drop_rate", "backward_saved", "total_saved", "flops", "layers_saved")
        names = [f"ssprop/{name}" for name in (*totals, *(f"kept/{layer}" for layer in layers))]
        self._file: CsvFile | None = None
        if isinstance(target, (str, os.PathLike)):
            self._file = CsvFile(Path(target), ("step", *names), append)
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
            if self._file is not None:
                self._file.begin(append=meter.resumed)
            self._write(self._scalars(meter), meter.steps)

    def _scalars(self, meter: Metered) -> Scalars:
        scalars: Scalars = {"ssprop/drop_rate": meter.drop_rate}
        network = meter.network
        if network is not None:
            scalars |= {
                "ssprop/backward_saved": network.backward_saved,
                "ssprop/total_saved": network.total_saved,
                "ssprop/flops": network.forward + network.backward,
            }
        scalars["ssprop/layers_saved"] = meter.converted_totals.backward_saved
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
        path: A log of a meter, an empty file, or none yet.
        columns: Its header.
        append: Whether to add to the rows of the file, or to put others in their place; None:
            :meth:`begin` says so.

    Raises:
        ValueError: If the file is no log of a meter, or is to be added to and has other columns.
    """

    def __init__(self, path: Path, columns: Sequence[str], append: bool | None = True) -> None:
        self._path, self._table, self._begun = path, CsvTable(path, columns), False
        self._check(bool(append))
        # Without a buffer, whose content would come out after a failure.
        self._file = path.open("ab", buffering=0)
        if append is not None:
            self.begin(append)

    def begin(self, append: bool) -> None:
        """Make the file ready for the first row; nothing, if it is already."""
        if self._begun:
            return
        self._check(append)
        if not append:
            self._file.truncate(0)
        self._file.close()
        self._file = self._table.open()
        self._begun = True

    def _check(self, append: bool) -> None:
        """Raise an error if the file is no log, or cannot be added to."""
        text = self._path.read_bytes() if self._path.exists() else b""
        columns = [*self._table.columns]
        header = next(csv.reader(whole_rows(text).decode().splitlines()), None)
        if header is None:  # nothing, or what a killed process left
            is_log = is_same = ",".join(columns).encode().startswith(text.rstrip(b"\r\n"))
        else:
            is_log, is_same = header[:2] == columns[:2], header == columns
        if not is_log:
            raise ValueError(f"{self._path} is there already and is no log of a Meter")
        if append and not is_same:
            raise ValueError(
                f"{self._path} has other columns and cannot be added to: log to another file, or "
                "give append=False to put this log in its place"
            )

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Add a row; what is not among ``scalars`` stays empty.

        Raises:
            OSError: If it cannot be written, as on a full disk; nothing of it is in the file then.
        """
        line = self._table.line({"step": step, **scalars})
        write_whole(self._file.fileno(), line.encode())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
