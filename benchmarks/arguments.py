"""What the command lines of bench_conv.py, bench_step.py and plot.py take, and how it is read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from torch import nn

#: The layers that can have a sparse backward, by their names in small letters.
KINDS: dict[str, type[nn.Module]] = {
    cls.__name__.lower(): cls
    for cls in (
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.Linear,
    )
}


class Parser(argparse.ArgumentParser):
    """argparse's own, without the page of usage in front of the one line that matters."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> Any:
        """End the program with one line."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def reader(function: Callable[[str], Any]) -> Callable[[str], Any]:
    """Make the message of a ValueError argparse's own."""

    def read(text: str) -> Any:
        try:
            return function(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def drop_rate(text: str) -> float:
    """Read a number from 0 to below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:  # nan, too
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in [0, 1)")
    return value


def count(text: str) -> int:
    """Read a whole number above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= 1")
    return value
