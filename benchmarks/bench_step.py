"""Times a training step of whole networks: dense against the sparse backward, in turns.

python benchmarks/bench_step.py                                   # the table of the README, CPU
python benchmarks/bench_step.py --device cuda --amp --channels-last --network resnet50:256:224

Sides: ``dense`` is the network as it was, ``sparse`` the converted one at --drop-rate, ``rate0``
the converted one at rate 0 (what conversion itself costs). They take turns, in random order within
each iteration, so that neither a drift of the machine nor what ran before favours one. A step is
zero_grad, forward, loss, backward, SGD.
"""

from __future__ import annotations

import argparse
import copy
import csv
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import ssprop_patch as ssp
from ssprop_patch.timing import MODES, alternate, device_name, training_step

# name:batch:pixels, what a small machine trains in a second or so
NETWORKS = (
    "resnet18:16:128",
    "resnet50:8:160",
    "resnext50_32x4d:4:160",
    "densenet121:8:128",
    "convnext_atto:16:128",
    "regnety_004:8:160",
    "efficientnet_b0:8:160",
    "mobilenetv3_small_100:16:160",
)
FIELDS = ("name", "device", "dtype", "memory_format", "shape", "drop_rate", "side", "mode",
          "p20_ms", "p50_ms", "p80_ms", "share_of_dense", "limit", "iterations",
          "threads", "torch", "timm", "python")  # fmt: skip


def make_step(model: nn.Module, x: Tensor, y: Tensor, amp: bool) -> Callable[[], list[float]]:
    """Return a function that trains one step and returns the seconds of ``MODES``."""

    def loss() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            return nn.functional.cross_entropy(model(x), y)

    return training_step(loss, torch.optim.SGD(model.parameters(), lr=1e-4), x.device)


def measure(network: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """Return the CSV rows of one network."""
    name, batch, pixels = network.split(":")
    device = torch.device(args.device)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    torch.manual_seed(0)
    dense = timm.create_model(name).to(device, memory_format=layout).train()
    shape = (int(batch), 3, int(pixels), int(pixels))
    x = torch.randn(shape, device=device).contiguous(memory_format=layout)
    y = torch.randint(1000, shape[:1], device=device)
    sides = {"dense": dense}
    for side, rate in (("sparse", args.drop_rate), ("rate0", 0.0)):
        sides[side] = ssp.convert(
            copy.deepcopy(dense),
            rate,
            selection=args.selection,
            filter_fn=(lambda m, _: m.groups == 1) if args.skip_grouped else None,
        )
    flops = ssp.summary(sides["sparse"], input_size=shape)
    if args.compile:
        sides = {side: torch.compile(model) for side, model in sides.items()}
    steps = {side: make_step(model, x, y, args.amp) for side, model in sides.items()}
    quantiles = alternate(steps, args.iterations, args.warmup)
    # What the convolutions' FLOPs alone would allow, were all else free.
    limit = {"dense": 1.0, "sparse": 1 - flops.backward_saved, "rate0": 1.0}
    rows = []
    for side, q in quantiles.items():
        for i, mode in enumerate(MODES):
            p20, p50, p80 = (1e3 * seconds for seconds in q[i])
            rows.append({
                "name": name, "device": device_name(device),
                "dtype": "bfloat16 autocast" if args.amp else "float32",
                "memory_format": "channels_last" if args.channels_last else "contiguous",
                "shape": "x".join(map(str, shape)), "drop_rate": args.drop_rate,
                "side": side + " compiled" * args.compile + " groups=1" * args.skip_grouped,
                "mode": mode,
                "p20_ms": f"{p20:.3f}", "p50_ms": f"{p50:.3f}", "p80_ms": f"{p80:.3f}",
                "share_of_dense": f"{p50 / (1e3 * quantiles['dense'][i].p50):.4f}",
                "limit": f"{limit[side]:.4f}" if mode == "backward" else "",
                "iterations": args.iterations, "threads": torch.get_num_threads(),
                "torch": torch.__version__, "timm": timm.__version__,
                "python": platform.python_version(),
            })  # fmt: skip
    return rows


def show(rows: list[dict[str, object]], console: Console) -> None:
    """Print shares of dense, a line a network and memory format."""
    table = Table(title=f"share of dense, medians; {rows[0]['device']}, torch {torch.__version__}")
    for column in ("network", "input", "dense backward ms", "backward", "step", "limit (FLOPs)",
                   "backward, rate 0", "step, rate 0"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("network", "input") else "right")
    cells = {(r["name"], r["side"].split()[0], r["mode"]): r for r in rows}
    for name in dict.fromkeys(r["name"] for r in rows):
        dense, sparse = cells[name, "dense", "backward"], cells[name, "sparse", "backward"]
        shares = [cells[name, side, mode]["share_of_dense"]
                  for side in ("sparse", "rate0") for mode in ("backward", "step")]  # fmt: skip
        table.add_row(
            str(name), str(dense["shape"]), str(dense["p50_ms"]), *map(str, shares[:2]),
            str(sparse["limit"]), *map(str, shares[2:]),
        )  # fmt: skip
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", nargs="+", default=NETWORKS, metavar="NAME:BATCH:PIXELS")
    parser.add_argument("--drop-rate", type=float, default=0.8)
    parser.add_argument("--selection", default="l1", choices=("l1", "l2", "random"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--skip-grouped", action="store_true", help="leave groups > 1 dense")
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--output", type=Path, help="append the rows to this CSV")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    rows = []
    for network in track(args.network, "networks", console=console):
        rows += measure(network, args)
    show(rows, console)
    if args.output:
        new = not args.output.exists()
        with args.output.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
