"""Check trainings by other libraries: ``python benchmarks/run_compatibility.py fastai``.

Each trains a small network plain, converted at rate 0, converted at 0.5, and with the gradients of
its dropped channels masked; rows go to ``benchmarks/results/compatibility.csv``. Which libraries:
see ``docs/other-libraries.md``. They are not installed with this project.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.metadata
from pathlib import Path

import torch

LIBRARIES = ("deepspeed", "fastai", "ultralytics")
FILE = Path(__file__).parent / "results" / "compatibility.csv"
HEAD = ("library", "version", "torch", "check", "result")


def main() -> None:
    """Run the checks of the libraries named, and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    others = []
    if FILE.exists():
        with FILE.open(newline="") as file:
            others = [tuple(row) for row in csv.reader(file)][1:]
    others = [row for row in others if row[0] != library]
    new = FILE.with_suffix(".new")
    with new.open("w", newline="") as file:
        rows = sorted([*others, *rows], key=_library)
        csv.writer(file, lineterminator="\n").writerows([HEAD, *rows])
    new.replace(FILE)


def _library(row: tuple[str, ...]) -> str:
    return row[0]


if __name__ == "__main__":
    main()
