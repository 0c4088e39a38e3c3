"""The command line: ``python -m ssprop_patch`` and ``ssprop-patch``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .cli import options
from .cli.errors import FAILED, INTERRUPTED, OK, CommandError, one_line

_PROG = "ssprop-patch"
_DESCRIPTION = """\
Sparse backward passes (ssProp, arXiv 2408.12561) for the convolutional network you already have:
what a conversion would do to a model, what it would save on paper and on this machine, and
training scripts run with their network converted.
"""
_EPILOG = """\
examples:
  ssprop-patch report timm:resnet50 --input-size 8x3x224x224 --drop-rate 0.8
  ssprop-patch measure timm:resnet18 --input-size 16x3x128x128
  ssprop-patch run path/to/train.py --model resnet50
  ssprop-patch schedule paper --epochs 10
  ssprop-patch env

exit codes: 0 done, 1 something failed, 2 the command line is wrong, 130 interrupted
"""
#: Each is a module of the folder cli, imported when it is asked for: some import torch.
COMMANDS = {
    "report": "what would be patched and saved, layer by layer",
    "measure": "milliseconds (and joules) of each layer and of whole steps",
    "run": "a training script as it is, with the network that it builds converted",
    "schedule": "the drop rates of a schedule",
    "env": "versions, processor and what is switched on: for a bug report",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: the process's); return the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    command = next((word for word in words if not word.startswith("-")), None)
    args = parser_of(command).parse_args(words)
    try:
        args.run(args)
        sys.stdout.flush()
        return OK
    except (Exception, KeyboardInterrupt) as error:
        if args.traceback:
            raise
        return _end(error)


def parser_of(command: str | None) -> options.Parser:
    """Return the parser, which knows the options of one command."""
    parser = options.Parser(prog=_PROG, description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"ssprop_patch {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        subparser = commands.add_parser(name, help=text)
        if name == command:
            import_module(f".cli.{name}", __package__).add_options(subparser)
            if subparser.get_default("traceback") is None:
                subparser.add_argument(
                    "--traceback", action="store_true", help="show the whole traceback of an error"
                )
    return parser


def _end(error: BaseException) -> int:
    """Say in one line what ended a command; return the exit code."""
    if isinstance(error, BrokenPipeError):
        # The reader has what it wanted (| head). Python would complain once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    if isinstance(error, KeyboardInterrupt):
        return _complain("interrupted", INTERRUPTED)
    if isinstance(error, CommandError):
        return _complain(f"error: {one_line(error)}", error.code)
    # What the package says of its arguments needs no name of a class in front.
    name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return _complain(f"error: {name}{one_line(error)}", FAILED)


def _complain(line: str, code: int) -> int:
    print(f"{_PROG}: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
