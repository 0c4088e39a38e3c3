"""What several commands take, and how each text is read. Torch is not imported with it."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._validate import check_drop_rate
from ..schedule.parse import parse_schedule
from ..schedule.schedules import Schedule

if TYPE_CHECKING:
    from torch import nn

MODELS = "timm:NAME, torchvision:NAME or PATH.py:FUNCTION"
SELECTIONS = ("l1", "l2", "random", "principal", "ahead")
REMAINDERS = ("none", "coarse")
#: The layers of torch that can have a sparse backward, and those that get one by default.
TYPES = (
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Linear",
)
DEFAULT_TYPES = TYPES[:3]
#: What a help text says of a drop rate.
D = "D is the drop rate, the share of the output channels whose gradient is dropped, 0 <= D < 1"


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


def number(
    kind: type[int] | type[float], low: float, below: float = math.inf, *, above: bool = False
) -> Callable[[str], Any]:
    """Return what reads a number, low <= it < below (with ``above``: low < it)."""

    @reader
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < below or (above and value == low):
            what = "an integer" if kind is int else "a number"
            most = "" if below == math.inf else f" and < {below:g}"
            raise ValueError(f"{text!r} is not {what} {'>' if above else '>='} {low:g}{most}")
        return value

    return read


count = number(int, 1)


@reader
def sizes(text: str) -> list[int]:
    """Read ``8``, or a whole shape as the tables print it, ``8x3x224x224`` or ``8×3×224×224``."""
    words = re.split("[x×]", text)
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(
            f"{text!r} is neither an integer >= 1 nor a shape such as 8x3x224x224; MODEL goes "
            "before --input-size"
        )
    return [int(word) for word in words]


class _AddShapes(argparse.Action):
    """Adds to the list of shapes: ``8 3 224 224`` is one, and ``8x3x224x224`` is one, too."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        whole = {len(part) > 1 for part in values}
        if len(whole) > 1:
            parser.error(f"{option_string}: write either 8 3 224 224 or 8x3x224x224")
        shapes = values if whole == {True} else [[n for part in values for n in part]]
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *shapes])


def add_rate(
    parser: Any, drop_rate_help: str, schedule_help: str, read: Callable[[str], Any] = schedule
) -> None:
    """``--drop-rate`` or ``--schedule``, and not both."""
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--drop-rate", type=drop_rate, metavar="D", help=f"{drop_rate_help}; {D}")
    rate.add_argument("--schedule", type=read, metavar="TEXT", help=schedule_help)


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL, its input and what of it is converted."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"{MODELS}: a function without arguments that returns an nn.Module",
    )
    parser.add_argument(
        "--input-size",
        type=sizes,
        nargs="+",
        action=_AddShapes,
        required=True,
        metavar="N",
        help="shape of the input, batch included: 8 3 224 224 or 8x3x224x224; again for a second "
        "input",
    )
    parser.add_argument(
        "--types",
        nargs="+",
        choices=TYPES,
        default=list(DEFAULT_TYPES),
        metavar="CLASS",
        help=f"classes of layers to convert, of {', '.join(TYPES)} (default: the three "
        "convolutions)",
    )


def add_selection(parser: Any) -> None:
    """``--selection`` and ``--remainder``, as ``convert`` takes them."""
    parser.add_argument(
        "--selection",
        choices=SELECTIONS,
        default="l1",
        help="what of the gradient goes back: the channels that score highest by l1 (the paper, "
        "the default) or l2, random ones, the gradient's principal directions, or channels chosen "
        "ahead, by earlier gradients (needs --remainder coarse)",
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


def add_format(
    parser: argparse.ArgumentParser, *, csv: bool = True, plot: str | None = None
) -> None:
    """``--json``, ``--csv`` and, if ``plot`` says what it shows, ``--plot``."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print JSON")
    if csv:
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
    from torch import nn

    return tuple(getattr(nn, name) for name in args.types)
