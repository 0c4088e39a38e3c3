"""How results leave a command: tables, JSON, CSV and pictures."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .._files import replacing
from .errors import CommandError, one_line


def print_json(value: Any) -> None:
    """Print ``value`` as JSON."""
    print(json.dumps(value, indent=2))


def print_csv(rows: Iterable[Mapping[str, Any]], fields: Sequence[str]) -> None:
    """Print rows as CSV; what a row does not have stays empty."""
    writer = csv.DictWriter(sys.stdout, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return rows as columns, the first ``left`` aligned to the left, with a rule below row 0."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def shape(sizes: Iterable[int]) -> str:
    """Return ``8x3x224x224``."""
    return "x".join(map(str, sizes))


def plot(draw: Callable[[ModuleType], Any], path: Path) -> None:
    """Write the figure that ``draw(ssprop_patch.plots)`` returns.

    Raises:
        CommandError: If matplotlib is not installed, or the file cannot be written.
    """
    try:
        from .. import plots

        figure = draw(plots)
    except ImportError as error:
        if "matplotlib" not in str(error):
            raise
        raise CommandError('--plot needs matplotlib: pip install "ssprop_patch[plot]"') from error
    if not path.suffix:  # as matplotlib names it
        path = path.with_name(f"{path.name}.png")
    try:
        with replacing(path) as beside:
            figure.savefig(beside, bbox_inches="tight", format=path.suffix[1:])
    except (OSError, ValueError) as error:  # no such folder; no such format
        raise CommandError(f"--plot {path}: {one_line(error)}") from error
    print(f"wrote {path}")
