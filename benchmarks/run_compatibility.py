"""Check trainings by other libraries: ``python benchmarks/run_compatibility.py fastai``.

Each trains a small network plain, converted at rate 0, converted at 0.5, and with the gradients of
its dropped channels masked; rows go to ``benchmarks/results/compatibility.csv``. Which libraries:
see ``docs/other-libraries.md``. They are not installed with this project.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path

import torch

from ssprop_patch._csv_table import CsvTable
from ssprop_patch.cli.options import Parser

LIBRARIES = ("deepspeed", "fastai", "ultralytics")
FILE = Path(__file__).parent / "results" / "compatibility.csv"
HEAD = ("library", "version", "torch", "check", "result")


def main() -> None:
    """Run the checks of the libraries named, and write their rows."""
    parser = Parser(description=__doc__)
    parser.add_argument("libraries", nargs="+", choices=LIBRARIES)
    torch.set_num_threads(1)
    for library in parser.parse_args().libraries:
        checks = importlib.import_module(f"compatibility.with_{library}").checks
        version = importlib.metadata.version(library)
        rows = []
        for check, result in checks():
            rows.append((library, version, torch.__version__.partition("+")[0], check, result))
            print(f"{library} {version} | {check} | {result}", flush=True)
        _write(library, rows)


def _write(library: str, rows: list[tuple[str, ...]]) -> None:
    """Replace a library's rows in the file."""
    table = CsvTable(FILE, HEAD)
    others = [row for row in table.read() if row["library"] != library]
    new = [dict(zip(HEAD, row, strict=True)) for row in rows]
    table.replace(sorted([*others, *new], key=lambda row: row["library"]))


if __name__ == "__main__":
    main()
