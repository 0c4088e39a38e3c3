"""``schedule``: the drop rates of a schedule, and their average."""

from __future__ import annotations

import argparse

from .._text import counted, table
from ..schedule.schedules import Schedule
from . import options, output
from .errors import UsageError

_DESCRIPTION = "Show the drop rates of a schedule over a training, and their average."
_EPILOG = """\
A schedule is written as in Python, but read, never run: ConstantSchedule, BarSchedule,
LinearSchedule, CosineSchedule, StepSchedule, SequentialSchedule, a number, or the name of a preset,
paper or steady.

examples:
  ssprop-patch schedule paper --epochs 10
  ssprop-patch schedule "BarSchedule(0.8, period=2)" --epochs 10
  ssprop-patch schedule "CosineSchedule(0, 0.8, total=5000, interval='step')" \\
      --epochs 10 --steps-per-epoch 500 --plot cosine.png
  ssprop-patch schedule "SequentialSchedule([ConstantSchedule(0), BarSchedule(0.8)], [5])" \\
      --epochs 20 --csv > rates.csv
"""
_BAR = 40  # characters that a drop rate of 1 would be long


def add_options(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument(
        "schedule",
        metavar="SCHEDULE",
        type=options.schedule,
        help='for example "BarSchedule(0.8, period=2)", paper or steady',
    )
    parser.add_argument("--epochs", type=options.count, required=True, metavar="N")
    parser.add_argument(
        "--steps-per-epoch",
        type=options.count,
        metavar="N",
        help="optimizer steps, for a schedule that counts them",
    )
    options.add_format(parser, plot="the drop rate over the epochs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    schedule, steps = args.schedule, args.steps_per_epoch
    by_step = schedule.interval == "step"
    if by_step and steps is None:
        raise UsageError(f"{schedule!r} counts optimizer steps: give --steps-per-epoch")
    if args.plot is not None:
        draw = {"steps_per_epoch": steps} if by_step else {}
        output.plot(lambda plots: plots.schedule(schedule, args.epochs, **draw), args.plot)
        return
    per_epoch = steps if by_step else 1
    rates = [schedule(t) for t in range(args.epochs * per_epoch)]
    average = schedule.average(len(rates))
    if args.json:
        output.print_json(
            {
                "schedule": repr(schedule),
                "interval": schedule.interval,
                "epochs": args.epochs,
                "steps_per_epoch": steps,
                "average": average,
                "drop_rates": rates,
            }
        )
    elif args.csv:
        rows = [{"t": t, "epoch": t // per_epoch, "drop_rate": r} for t, r in enumerate(rates)]
        output.print_csv(rows, ["t", "epoch", "drop_rate"])
    else:
        print(_table(schedule, rates, args.epochs, per_epoch))
        of = counted(args.epochs, "epoch")
        of += f" of {counted(steps, 'step')}" if by_step else ""
        print(f"{schedule!r}: average drop rate {average:.4g} over {of}")


def _table(schedule: Schedule, rates: list[float], epochs: int, per_epoch: int) -> str:
    """Return a row an epoch; where the rate changes within one, its mean and its range."""
    if schedule.interval == "epoch":
        rows: list[tuple[str, ...]] = [("epoch", "drop rate", "")]
        rows += [(str(e), f"{r:.4g}", "#" * round(_BAR * r)) for e, r in enumerate(rates)]
        return table(rows, "rrl")
    rows = [("epoch", "mean", "lowest", "highest", "")]
    for epoch in range(epochs):
        part = rates[epoch * per_epoch : (epoch + 1) * per_epoch]
        mean = sum(part) / per_epoch
        numbers = (f"{n:.4g}" for n in (mean, min(part), max(part)))
        rows.append((str(epoch), *numbers, "#" * round(_BAR * mean)))
    return table(rows, "rrrrl")
