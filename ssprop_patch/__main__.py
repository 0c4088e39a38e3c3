"""The command line: ``python -m ssprop_patch`` and ``ssprop-patch``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from . import __version__
from .cli import measure, options, report, schedule
from .cli.errors import FAILED, INTERRUPTED, OK, CommandError, one_line

_PROG = "ssprop-patch"
_DESCRIPTION = """\
Sparse backward passes (ssProp, arXiv 2408.12561) for the convolutional network you already have:
what a conversion would do to a model, what it would save on paper and on this machine.
"""
_EPILOG = """\
examples:
  ssprop-patch report timm:resnet50 --input-size 8 3 224 224 --drop-rate 0.8
  ssprop-patch measure timm:resnet18 --input-size 16 3 128 128
  ssprop-patch schedule "BarSchedule(0.8, period=2)" --epochs 10

exit codes: 0 done, 1 something failed, 2 the command line is wrong, 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: the process's); return the exit code."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
        sys.stdout.flush()
        return OK
    except BrokenPipeError:
        # The reader has what it wanted (| head). Python would complain once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except CommandError as error:
        if args.traceback:
            raise
        return _complain(f"error: {one_line(error)}", error.code)
    except Exception as error:
        if args.traceback:
            raise
        # What the package says of its arguments needs no name of a class in front.
        name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return _complain(f"error: {name}{one_line(error)}", FAILED)


def _parser() -> options.Parser:
    parser = options.Parser(prog=_PROG, description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"ssprop_patch {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (report, measure, schedule):
        command.add_parser(commands)
    for command_parser in commands.choices.values():
        command_parser.add_argument(
            "--traceback", action="store_true", help="show the whole traceback of an error"
        )
    return parser


def _complain(line: str, code: int) -> int:
    print(f"{_PROG}: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
