"""What bench_conv.py, bench_step.py and where.py have in common: options, the loop over what is
timed."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from networks import UNET, Network
from rows import Row, append, table
from torch import nn

import ssprop_patch as ssp
from ssprop_patch._progress import Progress
from ssprop_patch.cli.options import SELECTIONS, TYPES, D, Parser, count, drop_rate, reader

#: The layers that can have a sparse backward, by their names in small letters.
KINDS: dict[str, type[nn.Module]] = {name.lower(): getattr(nn, name) for name in TYPES}


def add_networks(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """Add ``--network``."""
    parser.add_argument(
        "--network",
        type=reader(Network.parse),
        nargs="+",
        default=[Network.parse(text) for text in default],
        metavar="NAME:BATCH:PIXELS",
        help=f"of timm, {UNET}, or unet3d_WIDTH",
    )


def add_conversion(parser: argparse.ArgumentParser) -> None:
    """Add which layers become sparse, and by which rules."""
    parser.add_argument(
        "--types",
        type=str.lower,
        choices=KINDS,
        nargs="+",
        default=[],
        metavar="CLASS",
        help="convert these classes of layers, too: linear, "
        "convtranspose2d, ...; a linear classifier stays dense",
    )
    parser.add_argument("--selection", nargs="+", default=["l1"], choices=SELECTIONS)
    parser.add_argument(
        "--remainder",
        nargs="+",
        type=lambda text: None if text == "none" else text,
        default=[None],
        choices=(None, "coarse"),
        metavar="{none,coarse}",
    )
    parser.add_argument(
        "--align", type=count, default=1, help="round the number of kept channels up to a multiple"
    )
    parser.add_argument("--skip-grouped", action="store_true", help="leave groups > 1 dense")


def rules(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Return the pairs of selection and remainder; channels are chosen ahead with one only."""
    pairs = itertools.product(args.selection, args.remainder)
    return [pair for pair in pairs if pair != ("ahead", None) or len(args.remainder) == 1]


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
