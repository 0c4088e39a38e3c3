"""Times how the saving grows with batch, resolution and width: one of them varied at a time.

python benchmarks/bench_growth.py --output benchmarks/results/bench_growth.csv    # some minutes
python benchmarks/bench_growth.py --panel batch resolution                        # in part
python benchmarks/bench_growth.py --draw benchmarks/results/bench_growth.csv   # the picture alone

Rows are those of bench_step.py, sides ``dense`` and ``sparse``. The table and the picture (beside
the CSV) show the sparse side as a share of dense, and its peak memory. What is slower than dense,
or takes more than 1.02 of its memory, is marked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import bench_step
from arguments import add_timing, measure_all
from growth_picture import PANELS, draw
from networks import Network
from rich.console import Console
from rich.table import Table
from rows import Row, read

from ssprop_patch._files import replacing
from ssprop_patch._text import sizes
from ssprop_patch.cli.options import Parser

#: Of dense: what a sparse step may take of time and of memory.
_SLOWER, _MORE_MEMORY = 1.0, 1.02


def measure(network: Network, args: argparse.Namespace) -> list[Row]:
    """Return the CSV rows of one network."""
    return bench_step.measure(network, args, {"sparse": (args.drop_rate, "l1", None)})


def networks(panels: Sequence[str]) -> list[Network]:
    """Return what these panels show, each network once."""
    texts = dict.fromkeys(text for name in panels for text in PANELS[name])
    return [Network.parse(text) for text in texts]


def table(rows: Sequence[Row], panels: Sequence[str]) -> Table:
    """Return shares of dense, a line a network; what is above its limit has a mark."""
    first = rows[0]
    shown = Table(
        title=f"share of dense, medians; drop rate {first.drop_rate:g}; {first.device}, "
        f"{first.threads} threads, torch {first.torch}"
    )
    names = ("", "network", "input", "dense backward ms", "backward", "step", "memory")
    for column in names:
        shown.add_column(column, justify="left" if column in names[:3] else "right")
    cells = {(r.name, r.shape, r.side, r.mode): r for r in rows}
    for panel in panels:
        for network in networks([panel]):
            at = network.name, sizes(network.shape)
            if (*at, "sparse", "step") not in cells:
                continue
            dense, backward = (cells[(*at, side, "backward")] for side in ("dense", "sparse"))
            step = cells[(*at, "sparse", "step")]
            memory = memory_share(step, cells[(*at, "dense", "step")])
            shown.add_row(
                panel,
                *at,
                f"{dense.p50_ms:.1f}",
                _marked(backward.share_of_dense, _SLOWER),
                _marked(step.share_of_dense, _SLOWER),
                "" if memory is None else _marked(memory, _MORE_MEMORY),
            )
    return shown


def memory_share(step: Row, dense: Row) -> float | None:
    """Return the peak memory of a step as a share of dense; None where it was not measured."""
    if step.peak_memory_mib is None or not dense.peak_memory_mib:
        return None
    return step.peak_memory_mib / dense.peak_memory_mib


def _marked(share: float, most: float) -> str:
    return f"{share:.3f}" + (" !" if share > most else "  ")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(description=__doc__)
    parser.add_argument("--panel", nargs="+", choices=PANELS, default=list(PANELS))
    parser.add_argument("--draw", type=Path, metavar="CSV", help="measure nothing")
    add_timing(parser)
    none = {"selection": ["l1"], "remainder": [None], "types": [], "align": 1}
    off = dict.fromkeys(("amp", "compile", "skip_grouped", "measured_plan"), False)
    parser.set_defaults(iterations=5, warmup=2, **none, **off)
    args = parser.parse_args(arguments)
    if args.draw is not None:
        try:
            rows = read(args.draw)
        except ValueError as error:
            parser.error(str(error))
        args.output = args.draw
    else:
        rows = measure_all(parser, args, networks(args.panel), measure)
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows, args.panel))
    if args.output is not None:
        with replacing(args.output.with_suffix(".png")) as beside:
            draw(rows).savefig(beside, format="png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
