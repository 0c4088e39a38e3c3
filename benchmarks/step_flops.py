"""What a sparse step costs on paper: FLOPs of a whole network's training step, as a share of dense.

python benchmarks/step_flops.py                        # prints what results/step_flops.csv holds
python benchmarks/step_flops.py --output FILE.csv

All convolutions, matrix products and attention count, forward and backward; the sparse step saves
what ``ssp.summary`` says of its convolutions. Nothing is timed or run: shapes decide.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch
from arguments import Parser
from bench_step import NETWORKS
from files import write_atomically
from networks import Network
from zoo.count import shares_without_data

import ssprop_patch as ssp

COLUMNS = ("network", "input", "drop_rate", "convolutions_of_step", "step_share")


def row(network: Network, drop_rate: float) -> dict[str, str]:
    """Return the CSV row of one network."""
    model = network.build().train()
    of_step = shares_without_data(model, (torch.empty(network.shape),)).step
    saved = ssp.summary(model, input_size=network.shape, drop_rate=drop_rate).total_saved
    values = (
        network.name,
        "x".join(map(str, network.shape)),
        f"{drop_rate:g}",
        f"{of_step:.4f}",
        f"{1 - of_step * saved:.4f}",
    )
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    """Print the rows, or write them."""
    parser = Parser(__doc__)
    parser.add_argument("--drop-rate", type=float, default=0.8)
    parser.add_argument("--output", type=Path, help="write this CSV file")
    args = parser.parse_args()
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row(Network.parse(spec), args.drop_rate) for spec in NETWORKS)
    if args.output is None:
        print(text.getvalue(), end="")
    else:
        write_atomically(args.output, text.getvalue())


if __name__ == "__main__":
    main()
