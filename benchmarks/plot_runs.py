"""Draws again what train_classifier.py wrote, without training: accuracy against FLOPs and seconds.

python benchmarks/plot_runs.py benchmarks/results/digits_runs.csv \\
    benchmarks/results/digits_history.csv -o benchmarks/results/digits.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from classifier import plot

from ssprop_patch.cli.options import Parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("runs", type=Path, help="runs.csv")
    add("history", type=Path, help="history.csv of the same runs")
    add("-o", "--output", type=Path, default=Path("results.png"), metavar="PICTURE")
    args = parser.parse_args(arguments)
    try:
        plot.draw(args.output, args.runs, args.history)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{args.runs}, {args.history}: {error}")
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
