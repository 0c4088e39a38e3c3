"""``run``: a training script as it is, with the network that it builds converted."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..schedule import presets
from ..schedule.parse import PRESETS, parse_schedule
from ..schedule.schedules import BarSchedule, Schedule
from . import options
from .script import FACTORIES, ScriptOptions, run_script

_DESCRIPTION = """\
Run a training script as it is, with the network that it builds converted. Made for timm's train.py
and torchvision's references/*/train.py, of which not a line is changed: the first network that one
of the factories returns is converted before the script sees it, and the function that trains one
epoch tells the controller which epoch that is. So a resumed run goes on with the right drop rate,
with nothing to save. What stands after the script belongs to the script.
"""
_EPILOG = f"""\
Without --drop-rate and --schedule it is the paper's schedule, {presets.PAPER!r}.
In several processes: torchrun --nproc_per_node=2 -m ssprop_patch run path/to/train.py ...

examples:
  ssprop-patch run path/to/train.py --model resnet50 --epochs 90
  ssprop-patch run --drop-rate 0.7 --exclude conv_stem path/to/train.py --model efficientnet_b0
  ssprop-patch run --selection principal --remainder coarse path/to/train.py --model resnet50
  ssprop-patch run --schedule "LinearSchedule(0.0, 0.8, total=90)" path/to/train.py --epochs 90
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    options.add_rate(
        parser,
        "the paper's schedule at another rate, BarSchedule(D), sparse in every other epoch "
        "(default: 0.8)",
        "any schedule that counts epochs, as 'CosineSchedule(0.0, 0.8, total=90)', a number for a "
        f"constant drop rate, or {' or '.join(PRESETS)}",
        _of_epochs,
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="convolutions to leave dense, as for ssprop_patch.convert; may be repeated",
    )
    options.add_selection(parser)
    parser.add_argument(
        "--factory",
        action="append",
        metavar="MODULE.NAME",
        help="what the script calls to build its network; may be repeated "
        f"(default: {' and '.join(FACTORIES)})",
    )
    parser.add_argument(
        "--epoch-function",
        default="train_one_epoch",
        metavar="[MODULE.]NAME",
        help="what the script calls to train one epoch: a name in the script, or in a module that "
        "it imports (default: %(default)s)",
    )
    parser.add_argument(
        "--epoch-argument",
        default="epoch",
        metavar="NAME",
        help="that function's parameter for the number of the epoch (default: %(default)s)",
    )
    parser.add_argument("script", type=_file, metavar="SCRIPT", help="the training script")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments"
    )
    # What the script raises is shown as Python shows it.
    parser.set_defaults(run=run, traceback=True)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    schedule = args.schedule
    if schedule is None:
        schedule = presets.PAPER if args.drop_rate is None else BarSchedule(args.drop_rate)
    run_script(
        args.script,
        args.arguments,
        ScriptOptions(
            schedule,
            tuple(args.exclude),
            tuple(args.factory or ()),
            args.epoch_function,
            args.epoch_argument,
            **options.selection(args),
        ),
    )


@options.reader
def _of_epochs(text: str) -> Schedule:
    schedule = parse_schedule(text)
    if schedule.interval != "epoch":
        # It would start from 0 again where a run is resumed: the scripts' checkpoints do not hold
        # the count, and how many steps an epoch has, only they know.
        raise ValueError(f"{schedule!r}: a schedule here must count epochs")
    return schedule


@options.reader
def _file(text: str) -> str:
    if not Path(text).is_file():
        raise ValueError(f"there is no file {text!r}")
    return text
