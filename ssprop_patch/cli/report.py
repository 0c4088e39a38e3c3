"""``report``: what a conversion would patch, what that would save on paper, what stays dense."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from .._text import counted, percent, sizes, table
from ..flops.count import summary
from ..flops.shares import with_shares
from ..flops.summary import Summary
from ..patching.dry_run import dry_run
from ..patching.plan import Plan, PlanRow
from ..schedule import presets
from . import options, output
from .errors import UsageError
from .models import load_model

_DESCRIPTION = """\
Show what a conversion would do to a model: the layers that get a sparse backward, the FLOPs that
saves in each of them and in the whole network, and the layers that stay dense, and why.
"""
_EPILOG = f"""\
Without --drop-rate and --schedule the paper's schedule counts, {presets.PAPER!r}.
FLOPs are what the gradient needs; "ssprop-patch measure" says what that is worth on this machine.

examples:
  ssprop-patch report timm:resnet50 --input-size 8x3x224x224
  ssprop-patch report torchvision:resnet18 --input-size 64x3x224x224 --drop-rate 0.8 --csv
  ssprop-patch report my_nets.py:build --input-size 32x3x64x64 \\
      --schedule "CosineSchedule(0, 0.8, total=30)" --epochs 30
  ssprop-patch report timm:resnet50 --input-size 8x3x224x224 --drop-rate 0.8 \\
      --selection principal --remainder coarse
  ssprop-patch report timm:convnext_atto --input-size 16x3x224x224 --types Conv2d Linear \\
      --plot convnext.png
"""
# The paper's, at which a plan says what directions a layer gets where no rate is given.
_PLANNED = 0.8
_FIELDS = (
    "name",
    "class",
    "action",
    "reason",
    "calls",
    "input_shape",
    "weight_shape",
    "output_shape",
    "kept",
    "channels",
    "drop_rate",
    "forward",
    "dense_backward",
    "sparse_backward",
    "saved",
    "share",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    options.add_model(parser)
    options.add_rate(
        parser,
        "count with this constant rate",
        'count the mean over, for example, "BarSchedule(0.8)", or paper',
    )
    parser.add_argument(
        "--epochs", type=options.count, metavar="N", help="how many the schedule is averaged over"
    )
    parser.add_argument(
        "--steps-per-epoch",
        type=options.count,
        metavar="N",
        help="for a schedule that counts optimizer steps",
    )
    parser.add_argument(
        "--align",
        type=options.count,
        default=1,
        metavar="N",
        help="round the number of kept channels up to a multiple of N",
    )
    options.add_selection(parser)
    options.add_format(parser, plot="the FLOPs of each layer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    _check(args)
    model, classes = load_model(args.model), options.types(args)
    how = options.selection(args)
    rate = _PLANNED if args.drop_rate is None else args.drop_rate
    planned = dry_run(model, types=classes, **how, drop_rate=rate, align=args.align)
    size = args.input_size if len(args.input_size) > 1 else args.input_size[0]
    planned = with_shares(planned, model, size, None)
    counted = summary(
        model,
        input_size=size,
        types=classes,
        drop_rate=args.drop_rate,
        schedule=args.schedule,
        epochs=args.epochs,
        steps_per_epoch=args.steps_per_epoch,
        align=args.align,
        **how,
    )
    if args.json:
        output.print_json(
            {
                "model": args.model,
                "input_size": args.input_size,
                "plan": [_plan_row(row) for row in (*planned, *planned.others)],
                "summary": counted.to_dict(),
            }
        )
    elif args.csv:
        output.print_csv(_csv_rows(planned, counted), _FIELDS)
    elif args.plot is not None:
        output.plot(lambda plots: plots.flops_per_layer(counted), args.plot)
    else:
        parameters = sum(p.numel() for p in model.parameters())
        shown = " and ".join(map(sizes, args.input_size))
        print(f"{args.model}: {parameters / 1e6:.2f} M parameters, input {shown}\n")
        print(_plan_text(planned))
        print()
        print(_dense_text(planned), end="")
        print(counted)


def _check(args: argparse.Namespace) -> None:
    """Say in the words of the command line what :func:`summary` would say in its own."""
    schedule = args.schedule
    if schedule is None or schedule.is_constant:
        return
    if args.epochs is None:
        raise UsageError(f"--schedule {schedule!r}: give --epochs, how many to average over")
    if schedule.interval == "step" and args.steps_per_epoch is None:
        raise UsageError(f"--schedule {schedule!r} counts optimizer steps: give --steps-per-epoch")


def _plan_row(row: PlanRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "class": row.cls.__name__,
        "action": row.action,
        "reason": row.reason,
        "share": row.share,
    }


def _plan_text(planned: Plan) -> str:
    """Return how many layers are converted, of which kinds, and what they hold of the FLOPs."""
    kinds = Counter((row.cls.__name__, row.reason) for row in planned.converted)
    dense = len(planned) - len(planned.converted) + len(planned.others)
    lines = [
        f"{counted(len(planned) + len(planned.others), 'layer')}: "
        f"{len(planned.converted)} to convert, {dense} left dense"
    ]
    lines += [f"  {n} {cls}: {reason}" for (cls, reason), n in kinds.items()]
    if planned.has_shares:
        lines.append(planned.where_the_flops_are())
    if planned.suggested_types:
        names = " ".join(cls.__name__ for cls in planned.suggested_types)
        lines.append(f"--types {names} converts the layers that hold more of them")
    return "\n".join(lines)


def _dense_text(planned: Plan) -> str:
    """Return a row for each layer that is not converted, others of a kind in one; or nothing."""
    groups = [(row.shown_name, [row]) for row in planned if row.action != "convert"]
    kinds: dict[tuple[str, str], list[PlanRow]] = {}
    for row in planned.others:
        kinds.setdefault((row.cls.__name__, row.reason), []).append(row)
    for same in kinds.values():
        groups.append((f"{len(same)} layers" if len(same) > 1 else same[0].shown_name, same))
    cells = [("stays dense", "class", "FLOPs", "why")]
    for name, same in groups:
        share = percent(sum(row.share or 0.0 for row in same)) if planned.has_shares else ""
        cells.append((name, same[0].cls.__name__, share, same[0].reason))
    return table(cells) + "\n\n" if groups else ""


def _csv_rows(planned: Plan, counted: Summary) -> Iterator[dict[str, Any]]:
    """Yield the counted layers, as often as they have shapes, and then those without a count.

    The last row is everything else that the network computes: with it the columns add up.
    """
    rows = {row.name: row for row in (*planned, *planned.others)}
    for layer in counted.layers:
        shapes = {
            name: sizes(getattr(layer, name))
            for name in ("input_shape", "weight_shape", "output_shape")
        }
        values = {**asdict(layer), **shapes, "saved": layer.saved}
        yield {k: v for k, v in {**values, **_plan_row(rows[layer.name])}.items() if k in _FIELDS}
    counted_names = {layer.name for layer in counted.layers}
    for row in rows.values():
        if row.name not in counted_names:
            yield _plan_row(row)
    if counted.others is not None:
        yield {
            "name": "(everything else)",
            "forward": counted.others.forward,
            "dense_backward": counted.others.dense_backward,
            "sparse_backward": counted.others.backward,
        }
