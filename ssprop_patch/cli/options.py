"""What several commands take, and how each text is read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from .._validate import check_drop_rate
from ..patching.eligibility import DEFAULT_TYPES
from ..patching.layer_kinds import LAYERS
from ..schedule.parse import parse_schedule
from ..schedule.schedules import Schedule
from .models import KINDS

SELECTIONS = ("l1", "l2", "random", "principal")
REMAINDERS = ("none", "coarse")
TYPES = {cls.__name__: cls for cls in LAYERS}


class Parser(argparse.ArgumentParser):
    """argparse's own, without the page of usage in front of the one line that matters."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def reader(function: Callable[[str], Any]) -> Callable[[str], Any]:
    """Make the message of a ValueError argparse's own."""

    def read(text: str) -> Any:
        try:
            return function(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


@reader
def drop_rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    return check_drop_rate(value)


@reader
def schedule(text: str) -> Schedule:
    return parse_schedule(text)


@reader
def count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise ValueError(f"{text!r} is not an integer >= 1")
    return value


@reader
def size(text: str) -> int:
    try:
        return count(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{error}; MODEL goes before --input-size") from error


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL, its input and what of it is converted."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"{KINDS}: a function without arguments that returns an nn.Module",
    )
    parser.add_argument(
        "--input-size",
        type=size,
        nargs="+",
        action="append",
        required=True,
        metavar="N",
        help="shape of the input, batch included: 8 3 224 224; again for a second input",
    )
    parser.add_argument(
        "--types",
        nargs="+",
        choices=TYPES,
        default=[t.__name__ for t in DEFAULT_TYPES],
        metavar="CLASS",
        help=f"classes of layers to convert, of {', '.join(TYPES)} (default: the three "
        "convolutions)",
    )


def add_selection(parser: argparse.ArgumentParser) -> None:
    """``--selection`` and ``--remainder``, as ``convert`` takes them."""
    parser.add_argument(
        "--selection",
        choices=SELECTIONS,
        default="l1",
        help="what of the gradient goes back: the channels that score highest by l1 (the paper, "
        "the default) or l2, random ones, or the gradient's principal directions",
    )
    parser.add_argument(
        "--remainder",
        choices=REMAINDERS,
        default="none",
        help="what becomes of the rest: it is dropped (none, the default), or goes back averaged "
        "over blocks of positions (coarse)",
    )


def selection(args: argparse.Namespace) -> dict[str, Any]:
    """Return what ``--selection`` and ``--remainder`` mean, as arguments of ``convert``."""
    remainder = None if args.remainder == "none" else args.remainder
    return {"selection": args.selection, "remainder": remainder}


def add_format(parser: argparse.ArgumentParser, *, plot: str | None = None) -> None:
    """``--json``, ``--csv`` and, if ``plot`` says what it shows, ``--plot``."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print JSON")
    group.add_argument("--csv", action="store_true", help="print CSV")
    if plot is not None:
        group.add_argument(
            "--plot",
            type=Path,
            metavar="FILE",
            help=f"write a picture of {plot} (.png, .svg, .pdf); needs matplotlib",
        )


def types(args: argparse.Namespace) -> tuple[type[nn.Module], ...]:
    """Return the classes that ``--types`` names."""
    return tuple(TYPES[name] for name in args.types)
