"""Tests of the benchmarks, which import each other from their own folder, as scripts do."""

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


def rows_in(folder: Path, name: str = "runs.csv") -> list[dict[str, str]]:
    """The rows of a CSV, all as text."""
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))
