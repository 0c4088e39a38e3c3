"""Where the time of a training step goes, by kind of work, dense and sparse; on the CPU.

python benchmarks/where.py                                        # four networks, l1
python benchmarks/where.py --selection l1 principal --remainder none coarse
python benchmarks/where.py --network resnet50:8:160 --channels-last --output where.csv

Each side trains steps in turns with the others, as in bench_step.py. Every other step runs under
torch's profiler, with marks around what that does not tell apart: dX and dW of a convolution, the
C functions, and the parts of a sparse backward. The kinds add up to the profiled step by
construction; the steps in between show how much longer than an ordinary one it took. If that is
more than 5 % for any side, the exit status is 1: the parts are not to be trusted then.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median, median_low
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's remarks on a missing GPU

import torch
from arguments import add_conversion, add_networks, add_timing, rules
from bench_step import make_sparse
from breakdown.kinds import BETWEEN, KINDS, OPTIMIZER, PART, Slot, split
from breakdown.marks import ask_for_stamps, marked
from networks import Network
from rows import Setting
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import ssprop_patch as ssp
from ssprop_patch._csv_table import CsvTable
from ssprop_patch._progress import Progress
from ssprop_patch._text import percent, sizes, table
from ssprop_patch.cli.options import Parser

NETWORKS = ("resnet50:8:160", "densenet121:8:128", "convnext_atto:16:128", "efficientnet_b0:8:160")
COLUMNS = (
    *("name", "device", "dtype", "memory_format", "shape", "drop_rate", "options"),
    *("side", "part", "kind", "ms", "share_of_step", "profiled_ms", "step_ms"),
    *("iterations", "threads", "torch", "timm", "python"),
)
#: By how much a profiled step may be longer, or shorter, than an ordinary one.
TOLERANCE = 0.05
# Principal directions are refreshed in each of the first passes; after these, in every twentieth.
_EARLY_PASSES = 13

Step = Callable[[], object]


class Found(NamedTuple):
    """Of one side.

    Attributes:
        kinds: Seconds of each kind of work in the profiled step of median length.
        step_s: Median seconds of a step that is not profiled.
        unknown: Seconds of the operations that have no kind, in that profiled step.
    """

    kinds: dict[Slot, float]
    step_s: float
    unknown: dict[str, float]

    @property
    def profiled_s(self) -> float:
        """Seconds of the profiled step, which the kinds add up to."""
        return sum(self.kinds.values())

    @property
    def off(self) -> float:
        """By which share of an ordinary step the kinds miss it."""
        return self.profiled_s / self.step_s - 1


def measure(network: Network, args: argparse.Namespace) -> dict[str, Found]:
    """Return where the time of each side goes."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    torch.manual_seed(0)
    dense = network.build().to(memory_format=layout).train()
    x = torch.randn(network.shape).contiguous(memory_format=layout)
    loss = network.loss(x)
    steps, warmup = {"dense": make_step(dense, x, loss)}, {"dense": args.warmup}
    for rule in rules(args):
        side = "+".join(filter(None, rule))
        model = make_sparse(copy.deepcopy(dense), args.drop_rate, args, *rule)
        steps[side] = make_step(model, x, loss)
        early = _EARLY_PASSES if rule[0] in ("principal", "ahead") else 0
        warmup[side] = max(args.warmup, early)
    return time_sides(steps, warmup, args.iterations)


def make_step(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Step:
    """Return a function that trains one step, whose parts a profile shows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        with record_function(f"{PART}{BETWEEN}"):
            with record_function(f"{PART}optimizer"):
                optimizer.zero_grad()
            with record_function(f"{PART}forward"):
                value = loss(model(x))
            with record_function(f"{PART}backward"):
                value.backward()
            with record_function(f"{PART}optimizer"):
                optimizer.step()

    return step


def time_sides(
    steps: Mapping[str, Step], warmup: Mapping[str, int], iterations: int
) -> dict[str, Found]:
    """Time and profile each side, in random order within each iteration."""
    plain: dict[str, list[float]] = {side: [] for side in steps}
    profiled: dict[str, list[tuple[dict[Slot, float], dict[str, float]]]]
    profiled = {side: [] for side in steps}
    for side, step in steps.items():
        for _ in range(warmup[side]):
            step()
        profiled_step(step)  # the first profile of a process takes longer
    order = random.Random(0)
    for _ in range(iterations):
        for side in order.sample(list(steps), len(steps)):
            start = time.perf_counter()
            steps[side]()
            plain[side].append(time.perf_counter() - start)
            profiled[side].append(profiled_step(steps[side]))
    found = {}
    for side in steps:
        totals = [sum(kinds.values()) for kinds, _ in profiled[side]]
        # One step, as medians of the kinds would not add up.
        kinds, unknown = profiled[side][totals.index(median_low(totals))]
        found[side] = Found(kinds, median(plain[side]), unknown)
    return found


def profiled_step(step: Step) -> tuple[dict[Slot, float], dict[str, float]]:
    """Run a step under the profiler; return the seconds of each kind, and of what has none."""
    with marked() as stamps, profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    events = found.events()
    whole = next(event for event in events if event.name == f"{PART}{BETWEEN}")
    inside = [event for event in events if event.thread == whole.thread]
    inside.sort(key=lambda event: event.time_range.start)
    unknown: dict[str, float] = {}
    return split((e for e in inside if _is_within(e, whole)), stamps, unknown), unknown


def _is_within(event: Any, whole: Any) -> bool:
    start, end = whole.time_range.start, whole.time_range.end
    return start <= event.time_range.start and event.time_range.end <= end


def make_rows(
    network: Network, args: argparse.Namespace, found: Mapping[str, Found]
) -> list[dict[str, Any]]:
    """Return the CSV rows of one network: one for each kind of work in each part of a step."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    options = ["groups=1"] * args.skip_grouped + [f"align={args.align}"] * (args.align > 1)
    options += [f"types={','.join(args.types)}"] * bool(args.types)
    options += ["kernels=measured"] * args.measured_kernels
    setting = Setting.here(
        torch.device("cpu"),
        name=network.name,
        shape=network.shape,
        dtype=torch.float32,
        amp=False,
        memory_format=layout,
        drop_rate=args.drop_rate,
        selection="",
        options=" ".join(options),
        iterations=args.iterations,
    )
    rows = []
    for side, one in found.items():
        for slot, seconds in sorted(one.kinds.items(), key=lambda item: _place(item[0])):
            row = {
                **asdict(setting),
                "side": side,
                "part": slot.part,
                "kind": slot.kind,
                "ms": f"{1e3 * seconds:.4f}",
                "share_of_step": f"{seconds / one.profiled_s:.5f}",
                "profiled_ms": f"{1e3 * one.profiled_s:.4f}",
                "step_ms": f"{1e3 * one.step_s:.4f}",
            }
            rows.append({name: row[name] for name in COLUMNS})
    return rows


def show(network: Network, found: Mapping[str, Found]) -> str:
    """Return a table: milliseconds of each kind of work, and as a share of the side's own step."""
    slots = sorted({slot for one in found.values() for slot in one.kinds}, key=_place)
    cells = [["milliseconds, of the step", *found]]
    for slot in slots:
        parts = [one.kinds.get(slot, 0.0) for one in found.values()]
        if any(f"{1e3 * s:.1f}" != "0.0" for s in parts):
            label = slot.kind if slot.kind == OPTIMIZER else f"{slot.kind}, {slot.part}"
            shares = zip(parts, found.values(), strict=True)
            cells.append([label, *(_ms(s, s / one.profiled_s) for s, one in shares)])
    cells.append(["not profiled", *(_ms(one.step_s, None) for one in found.values())])
    cells.append(["sum of the kinds", *(_ms(one.profiled_s, None) for one in found.values())])
    title = f"{network.name}, {sizes(network.shape)}"
    return f"{title}\n{table(cells, 'lr', total=True)}"


def describe(found: Mapping[str, Found]) -> str:
    """Return how well the kinds add up, and which operations have none."""
    worst = max((one.off for one in found.values()), key=abs)
    unknown = {name: s for one in found.values() for name, s in one.unknown.items()}
    longest = sorted(unknown, key=lambda name: -unknown[name])[:5]
    names = f" Unattributed: {', '.join(longest)}." if longest else ""
    return f"The sums are off by at most {100 * worst:+.1f} %.{names}"


def _place(slot: Slot) -> tuple[int, int]:
    return KINDS.index(slot.kind), {"forward": 0, "backward": 1}.get(slot.part, 2)


def _ms(seconds: float, share: float | None) -> str:
    return f"{1e3 * seconds:.1f}" + ("" if share is None else f" {percent(share):>7}")


def misses(network: Network, found: Mapping[str, Found]) -> list[str]:
    """Return a sentence for each side whose kinds do not add up to an ordinary step."""
    return [
        f"{network.name}, {side}: the kinds add up to {1e3 * one.profiled_s:.1f} ms, an ordinary "
        f"step takes {1e3 * one.step_s:.1f} ms ({100 * one.off:+.1f} %): measure it again on a "
        "machine that does nothing else"
        for side, one in found.items()
        if abs(one.off) > TOLERANCE
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = Parser(description=__doc__)
    add_networks(parser, NETWORKS)
    add_conversion(parser)
    add_timing(parser)
    parser.set_defaults(iterations=5)
    args = parser.parse_args(arguments)
    if args.device != "cpu":
        parser.error("--device: this is for the CPU, on a GPU see gpu.py")
    output: Path | None = args.output
    if output is not None:
        try:
            CsvTable(output, COLUMNS).check()
        except ValueError as error:
            parser.error(str(error))
    ask_for_stamps()
    ssp.kernels.benchmark = args.measured_kernels
    missed = []
    with Progress("measured") as progress:
        for done, network in enumerate(args.network):
            progress(done, len(args.network), f"now {network.name}")
            found = measure(network, args)
            if output is not None:
                CsvTable(output, COLUMNS).append(make_rows(network, args, found))
            print(f"{show(network, found)}\n{describe(found)}\n", flush=True)
            missed += misses(network, found)
    for line in missed:
        print(line, file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
