"""How results leave a command: tables, JSON, CSV and pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .._csv_table import csv_lines
from .errors import CommandError, one_line


def print_json(value: Any) -> None:
    """Print ``value`` as JSON."""
    print(json.dumps(value, indent=2))


def print_csv(rows: Iterable[Mapping[str, Any]], fields: Sequence[str]) -> None:
    """Print rows as CSV; what a row does not have stays empty."""
    sys.stdout.writelines(csv_lines(rows, fields))


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
        plots.style.write(figure, path)
    except (OSError, ValueError) as error:  # no such folder; no such format
        raise CommandError(f"--plot {path}: {one_line(error)}") from error
    print(f"wrote {path}")
