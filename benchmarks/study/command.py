"""The command line of ``run_study.py``."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from classifier.options import UserError
from rich.console import Console
from rich.table import Table

from ssprop_patch._files import write_atomically
from ssprop_patch.cli.options import Parser, count


def options(description: str, arguments: list[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = Parser(prog="run_study.py", description=description)
    add = parser.add_argument
    add("study", type=Path, help="the TOML file that says which runs there are")
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="of runs.csv, the table, the picture and the state of unfinished runs (default: "
        "runs/STUDY); what is finished there is not trained again",
    )
    add(
        "--data-dir",
        type=Path,
        metavar="PATH",
        help="torchvision's folder (default: data), or a folder or tar archive with "
        "train/CLASS/*.jpg and test/CLASS/*.jpg",
    )
    add(
        "--cache-dir",
        type=Path,
        metavar="PATH",
        help="where decoded images are kept (default: cache in the output folder)",
    )
    add("--download", action="store_true", help="let torchvision download the data")
    add(
        "--device",
        nargs="+",
        default=["cpu"],
        metavar="DEVICE",
        help="cpu (default), cuda:0 cuda:1, ...: each gets --jobs processes",
    )
    add(
        "--jobs",
        type=count,
        default=1,
        metavar="N",
        help="processes on each device, which share the runs (default: 1)",
    )
    add(
        "--threads",
        type=count,
        metavar="N",
        help="of each process (default: 1 if there are several, else torch's)",
    )
    add("--stop-after", type=float, metavar="MINUTES", help="begin no run after so long")
    add(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="where to write the table, the picture and a runs.csv with this study's rows alone "
        "(default: table and picture into the output folder)",
    )
    add("--list", action="store_true", help="only list the runs, and which are finished")
    add("--table", action="store_true", help="only print the tables of what is finished")
    add("--plot", action="store_true", help="only draw the picture of what is finished")
    add("--traceback", action="store_true", help="show the whole traceback of an error")
    return parser.parse_args(arguments)


def main(description: str, arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = options(description, arguments)
    try:
        return _main(args)
    except KeyboardInterrupt:
        given = sys.argv[1:] if arguments is None else arguments
        again = shlex.join(["python", sys.argv[0], *given])
        print(f"interrupted; the same command continues: {again}", file=sys.stderr)
        return 130
    except UserError as error:
        if args.traceback:
            raise
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        return 2


def _main(args: argparse.Namespace) -> int:
    # Imported here, so that --help does not wait for torch.
    from study import grid, workers

    study = grid.read(args.study)
    minutes = float("inf") if args.stop_after is None else args.stop_after
    place = workers.Place(
        folder=args.output or Path("runs") / study.name,
        data_dir=args.data_dir,
        cache_dir=args.cache_dir,
        download=args.download,
        deadline=time.time() + 60 * minutes,
    )
    console = Console(width=None if sys.stdout.isatty() else 200)
    if args.list:
        console.print(_listed(study, place))
        return 0
    failed = 0
    if not (args.table or args.plot):
        _check(study)
        failed = workers.share_out(study, place, args.device, args.jobs, args.threads)
    _report(
        study,
        place,
        console,
        args.results,
        tables=args.table or not args.plot,
        picture=args.plot or not args.table,
    )
    return 1 if failed else 0


def _check(study) -> None:
    """Refuse a network that does not exist before hours are spent on others."""
    from classifier import models

    for name in dict.fromkeys(run.network for run in study.runs):
        models.resolve(name)


def _listed(study, place) -> Table:
    from study import labels

    done = place.rows.ids()
    count = sum(run.id in done for run in study.runs)
    table = Table(title=f"{study.name}: {count} of {len(study.runs)} runs finished")
    for name in ("id", "method", "conditions", "seed", "state"):
        table.add_column(name, overflow="fold")
    for run in study.runs:
        state = "finished" if run.id in done else "-"
        if state == "-" and place.checkpoint(run).exists():
            state = "begun"
        table.add_row(run.id, labels.method(run), labels.condition(run), str(run.seed), state)
    return table


def _report(
    study, place, console: Console, results: Path | None, *, tables: bool, picture: bool
) -> None:
    """Print and write what the finished runs of this study show."""
    from study import groups, plot, table
    from study.rows import Rows

    rows = {row["id"]: row for row in place.rows.read()}
    # In the study's order, whatever the order in which they finished.
    own = [rows[run.id] for run in study.runs if run.id in rows]
    found = groups.conditions(own)
    if not found:
        raise UserError(f"no run of this study is finished in {place.folder}")
    folder, written = results or place.folder, []
    folder.mkdir(parents=True, exist_ok=True)
    if results is not None and results.resolve() != place.folder.resolve():
        Rows(folder / "runs.csv", place.rows.fields, place.rows.added).replace(own)
        written.append("runs.csv")
    if tables:
        for condition in found:
            console.print(table.build(condition))
        console.print(table.LEGEND)
        write_atomically(folder / "table.md", table.markdown(found, study.name))
        written.append("table.md")
    if picture:
        plot.draw(folder / "study.png", found, study.name)
        written.append("study.png")
    for name in written:
        console.print(f"wrote {folder / name}", highlight=False, soft_wrap=True)
