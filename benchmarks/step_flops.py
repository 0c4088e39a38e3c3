"""What a sparse step costs on paper: FLOPs of a whole network's training step, as a share of dense.

python benchmarks/step_flops.py                        # prints what results/step_flops.csv holds
python benchmarks/step_flops.py --output FILE.csv

All convolutions, matrix products and attention count, forward and backward, as ``ssp.summary``
counts them. Nothing is timed or run: shapes decide.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench_step import NETWORKS
from networks import Network

import ssprop_patch as ssp
from ssprop_patch._csv_table import CsvTable, csv_lines
from ssprop_patch._progress import Progress
from ssprop_patch._text import sizes
from ssprop_patch.cli.options import D, Parser, drop_rate

COLUMNS = ("network", "input", "drop_rate", "convolutions_of_step", "step_share")


def row(network: Network, drop_rate: float) -> dict[str, str]:
    """Return the CSV row of one network."""
    model = network.build().train()
    found = ssp.summary(model, input_size=network.shape, drop_rate=drop_rate)
    converted, whole = found.converted, found.totals
    of_step = (converted.forward + converted.dense_backward) / (
        whole.forward + whole.dense_backward
    )
    values = (
        network.name,
        sizes(network.shape),
        f"{drop_rate:g}",
        f"{of_step:.4f}",
        f"{1 - found.total_saved:.4f}",
    )
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    """Print the rows, or write them."""
    parser = Parser(description=__doc__)
    parser.add_argument("--drop-rate", type=drop_rate, default=0.8, metavar="D", help=D)
    parser.add_argument("--output", type=Path, help="write this CSV file")
    args = parser.parse_args()
    rows = []
    with Progress("networks") as progress:
        for done, spec in enumerate(NETWORKS):
            progress(done, len(NETWORKS), spec)
            rows.append(row(Network.parse(spec), args.drop_rate))
    if args.output is None:
        sys.stdout.writelines(csv_lines(rows, COLUMNS))
    else:
        CsvTable(args.output, COLUMNS).replace(rows)


if __name__ == "__main__":
    main()
