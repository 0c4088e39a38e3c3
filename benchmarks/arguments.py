"""What bench_conv.py and bench_step.py have in common: options, and the loop over what is timed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rows import Row, append, table
from torch import nn

import ssprop_patch as ssp
from ssprop_patch._progress import Progress
from ssprop_patch.cli.options import TYPES, D, Parser, count, drop_rate

#: The layers that can have a sparse backward, by their names in small letters.
KINDS: dict[str, type[nn.Module]] = {name.lower(): getattr(nn, name) for name in TYPES}


def add_timing(parser: argparse.ArgumentParser) -> None:
    """Add what both take."""
    parser.add_argument("--drop-rate", type=drop_rate, default=0.8, metavar="D", help=D)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--channels-last", action="store_true", help="where the layer has it")
    parser.add_argument(
        "--measured-kernels",
        action="store_true",
        help="ssp.kernels.benchmark: the first pass chooses kernels",
    )
    parser.add_argument("--iterations", type=count, default=15, help="measurements of each side")
    parser.add_argument("--warmup", type=count, default=3, help="measurements before them")
    parser.add_argument("--output", type=Path, help="append the rows to this CSV")


def measure_all(
    parser: Parser,
    args: argparse.Namespace,
    things: Sequence[Any],
    measure: Callable[[Any, argparse.Namespace], list[Row]],
) -> list[Row]:
    """Measure each thing and append its rows to ``--output``; return all rows."""
    if args.output:
        try:
            table(args.output).check()
        except ValueError as error:
            parser.error(str(error))
    ssp.kernels.benchmark = args.measured_kernels
    rows: list[Row] = []
    with Progress("measured") as progress:
        for done, thing in enumerate(things):
            progress(done, len(things), f"now {thing.name}")
            found = measure(thing, args)
            if args.output:
                append(args.output, found)
            rows += found
    return rows
