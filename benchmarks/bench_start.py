"""Times the first backward of a process: what it costs more than later ones.

python benchmarks/bench_start.py                       # resnet18:8:64; about two minutes
python benchmarks/bench_start.py --network resnet50:8:160 --iterations 3

Each measurement is a process of its own, with a cache of compiled C functions of its own. ``cold``:
the cache is empty, so the C functions are compiled; ``warm``: another process has compiled them;
``dense``: a network that was not converted, whose first backward is slower than later ones, too.
They take turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from networks import Network
from rich.console import Console
from rich.table import Table

import ssprop_patch as ssp
from ssprop_patch.cli.options import D, Parser, count, drop_rate, reader

SIDES = ("dense", "cold", "warm")
_LATER = 5  # backward passes after the first


def one_process(network: Network, rate: float | None) -> list[float]:
    """Return the seconds of the backward passes of this process; ``rate`` None is dense."""
    import torch

    torch.manual_seed(0)
    model, x = network.build().train(), torch.randn(network.shape)
    if rate is not None:
        ssp.convert(model, rate)
    loss, seconds = network.loss(x), []
    for _ in range(1 + _LATER):
        value = loss(model(x))
        begin = time.perf_counter()
        value.backward()
        seconds.append(time.perf_counter() - begin)
    return seconds


def extra_seconds(network: Network, rate: float | None, cache: str) -> tuple[float, float]:
    """Return the median of later passes, and what the first takes more, of a new process."""
    text = f"{network.name}:{network.batch}:{network.pixels}"
    command = [sys.executable, __file__, "--network", text, "--child"]
    command += [] if rate is None else [f"--drop-rate={rate}"]
    environment = {**os.environ, "SSPROP_PATCH_CACHE": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, *later = json.loads(done.stdout)
    usual = statistics.median(later)
    return usual, first - usual


def measure(network: Network, rate: float, iterations: int) -> dict[str, list[tuple[float, float]]]:
    """Return what :func:`extra_seconds` does, of each side, once per iteration."""
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for _ in range(iterations):
        with tempfile.TemporaryDirectory() as cache:
            for side in SIDES:
                found[side].append(extra_seconds(network, None if side == "dense" else rate, cache))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--network",
        type=reader(Network.parse),
        default=Network.parse("resnet18:8:64"),
        metavar="NAME:BATCH:PIXELS",
    )
    parser.add_argument("--drop-rate", type=drop_rate, metavar="D", help=D)
    parser.add_argument("--iterations", type=count, default=5, help="processes of each side")
    parser.add_argument("--child", action="store_true", help="print the seconds of one process")
    args = parser.parse_args(arguments)
    if args.child:
        print(json.dumps(one_process(args.network, args.drop_rate)))
        return 0
    rate = 0.8 if args.drop_rate is None else args.drop_rate
    found = measure(args.network, rate, args.iterations)
    table = Table(title=f"seconds of a backward, medians; {args.network.name}, drop rate {rate:g}")
    for column in ("", "later ones", "the first, more", "lowest", "highest"):
        table.add_column(column, justify="right" if column else "left")
    for side, pairs in found.items():
        usual, extra = (list(numbers) for numbers in zip(*pairs, strict=True))
        shown = statistics.median(usual), statistics.median(extra), min(extra), max(extra)
        table.add_row(side, *(f"{number:.3f}" for number in shown))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
