"""Times a training step of whole networks: dense against the sparse backward, in turns.

python benchmarks/bench_step.py                                   # the table of the README, CPU
python benchmarks/bench_step.py --network vit_tiny_patch16_224:8:224 --types linear
python benchmarks/bench_step.py --device cuda --amp --channels-last --network resnet50:256:224
python benchmarks/bench_step.py --network unet2d_cifar10:4:32     # the U-Net of DDPM (diffusers)
python benchmarks/bench_step.py --network unet3d_16:1:48           # a U-Net of 16 and more channels
python benchmarks/bench_step.py --selection l1 principal --remainder none coarse

Sides: ``dense`` is the network as it was, ``sparse`` the converted one at --drop-rate, ``rate0``
the converted one at rate 0 (what conversion itself costs), ``plan`` the one with those layers
converted that a measured plan chooses (--measured-plan; of a compiled network it is measured
compiled). With several of --selection or --remainder there is a side for each pair of them in place
of these, such as ``principal+coarse``. They take turns, in random order within each iteration, so
that neither a drift of the machine nor what ran before favours one. A step is zero_grad, forward,
loss, backward, SGD.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import sys
from collections.abc import Callable, Sequence

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's remarks on a missing GPU

import torch
from arguments import KINDS, add_conversion, add_networks, add_timing, measure_all, rules
from networks import Network, classifiers
from rich.console import Console
from rich.table import Table
from rows import Row, Setting, compare
from torch import Tensor, nn

import ssprop_patch as ssp
from ssprop_patch.cli.options import Parser
from ssprop_patch.timing import MODES, alternate, training_step

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
    "vit_tiny_patch16_224:8:224",
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # what is converted if no types are named


#: Rate, selection and remainder of converted networks, by the names of their sides.
Sides = dict[str, tuple[float, str, str | None]]


def measure(
    network: Network, args: argparse.Namespace, converted: Sides | None = None
) -> list[Row]:
    """Return the CSV rows of one network; ``converted`` instead of the sides that ``args`` name."""
    device = torch.device(args.device)
    last = torch.channels_last_3d if len(network.shape) == 5 else torch.channels_last
    layout = last if args.channels_last else torch.contiguous_format
    torch.manual_seed(0)
    dense = network.build().to(device, memory_format=layout).train()
    x = torch.randn(network.shape, device=device).contiguous(memory_format=layout)
    loss = network.loss(x)
    sides = {"dense": dense}
    for side, (rate, selection, remainder) in (converted or sparse_sides(args)).items():
        sides[side] = make_sparse(dense, rate, args, selection, remainder)
    if args.measured_plan:
        rule = args.selection[0], args.remainder[0]
        sides["plan"] = make_sparse(dense, args.drop_rate, args, *rule, measured_on=x)
    torch._dynamo.reset()  # what a plan compiled: there is a limit to the graphs of one network
    # What the convolutions' FLOPs alone would allow, were all else free.
    left = {side: flops_left(model, network.shape, args) for side, model in sides.items()}
    if args.compile:
        sides = {side: torch.compile(model) for side, model in sides.items()}
    steps = {side: make_step(model, x, loss, args.amp) for side, model in sides.items()}
    seconds = alternate(steps, args.iterations, args.warmup)
    peaks = {side: peak_memory(steps[side], model, device) for side, model in sides.items()}
    options = ["compiled"] * args.compile + ["groups=1"] * args.skip_grouped
    options += [f"types={','.join(args.types)}"] * bool(args.types)
    options += ["kernels=measured"] * args.measured_kernels
    options += [f"align={args.align}"] * (args.align > 1)
    remainders = [name for name in args.remainder if name is not None]
    options += [f"remainder={','.join(remainders)}"] * bool(remainders)
    setting = Setting.here(
        device,
        name=network.name,
        shape=network.shape,
        dtype=torch.float32,
        amp=args.amp,
        memory_format=layout,
        drop_rate=args.drop_rate,
        selection=" ".join(args.selection),
        options=" ".join(options),
        iterations=args.iterations,
    )
    return compare(setting, MODES, seconds, left, peaks=peaks)


def has_rules(args: argparse.Namespace) -> bool:
    """Whether several rules are compared, instead of one at two rates."""
    return len(args.selection) * len(args.remainder) > 1


def sparse_sides(args: argparse.Namespace) -> Sides:
    """Return rate, selection and remainder of each converted side."""
    pairs = rules(args)
    if not has_rules(args):
        return {"sparse": (args.drop_rate, *pairs[0]), "rate0": (0.0, *pairs[0])}
    return {"+".join(filter(None, pair)): (args.drop_rate, *pair) for pair in pairs}


def make_sparse(
    dense: nn.Module,
    rate: float,
    args: argparse.Namespace,
    selection: str = "l1",
    remainder: str | None = None,
    measured_on: Tensor | None = None,
) -> nn.Module:
    """Return a converted copy of ``dense``.

    With ``measured_on``, an input, those layers that a plan measured on it chooses, maybe none.
    """
    model = copy.deepcopy(dense)
    pays: Callable[[nn.Module, str], bool] | None = None
    if measured_on is not None:
        as_timed = torch.compile(model) if args.compile else model
        with torch.autocast(measured_on.device.type, torch.bfloat16, enabled=args.amp):
            pays = ssp.plan(
                as_timed,
                inputs=measured_on,
                types=_types(args),
                drop_rate=rate,
                measure=True,
                align=args.align,
                progress=False,  # there is one bar already
            ).pays
    heads = classifiers(model)

    def chosen(layer: nn.Module, name: str) -> bool:
        # A linear classifier stays dense, as the README has it: its channels are the classes.
        if isinstance(layer, nn.Linear) and any(layer is head for head in heads):
            return False
        if args.skip_grouped and getattr(layer, "groups", 1) > 1:
            return False
        return pays is None or pays(layer, name)

    return ssp.convert(
        model,
        rate,
        types=_types(args),
        selection=selection,
        remainder=remainder,
        filter_fn=chosen,
        strict=pays is None,
        align=args.align,
    )


def flops_left(model: nn.Module, shape: Sequence[int], args: argparse.Namespace) -> float:
    """Return the part of the backward FLOPs of the layers of ``--types`` that a side leaves."""
    if not ssp.is_converted(model):
        return 1.0
    found = ssp.summary(model, input_size=shape, types=_types(args))
    layers = [(row.dense_backward, row.sparse_backward) for row in found.layers]
    dense, sparse = map(sum, zip(*layers, strict=True))
    return sparse / dense


def make_step(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], amp: bool
) -> Callable[[], list[float]]:
    """Return a function that trains one step and returns the seconds of ``MODES``."""

    def forward() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            return loss(model(x))

    return training_step(forward, torch.optim.SGD(model.parameters(), lr=1e-4), x.device)


def peak_memory(step: Callable[[], object], model: nn.Module, device: torch.device) -> float | None:
    """Return the MiB that a step takes on top of what is there before; None but on CPU and CUDA.

    Of torch's own memory: what libraries take for themselves (oneDNN, cuDNN) is not in it.
    """
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if device.type != "cpu":
        return None
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    # One event for each allocation, and with a negative size for each release.
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in events), initial=0)) / 2**20


def _types(args: argparse.Namespace) -> tuple[type[nn.Module], ...]:
    return tuple(dict.fromkeys((*CONVOLUTIONS, *(KINDS[kind] for kind in args.types))))


def show(rows: Sequence[Row], console: Console) -> None:
    """Print shares of dense, a line a network."""
    table = Table(title=f"share of dense, medians; {rows[0].device}, torch {torch.__version__}")
    plan, memory = (any(r.side == "plan" for r in rows), any(r.peak_memory_mib for r in rows))
    table.add_column("network")
    table.add_column("input")
    columns = [
        "dense backward ms",
        "backward",
        "step",
        "limit (FLOPs)",
        "backward, rate 0",
        "step, rate 0",
    ]
    columns += ["backward, plan", "step, plan"] * plan + ["memory"] * memory
    for column in columns:
        table.add_column(column, justify="right")
    cells = {(r.name, r.shape, r.side, r.mode): r for r in rows}
    for at in dict.fromkeys((r.name, r.shape) for r in rows):

        def shares(side: str, at: tuple[str, str] = at) -> list[str]:
            return [
                f"{cells[(*at, side, mode)].share_of_dense:.4f}" for mode in ("backward", "step")
            ]

        dense, limit = cells[(*at, "dense", "backward")], cells[(*at, "sparse", "backward")].limit
        line = [f"{dense.p50_ms:.3f}", *shares("sparse"), f"{limit:.4f}", *shares("rate0")]
        line += shares("plan") if plan else []
        if memory:
            sparse, whole = (
                cells[(*at, side, "step")].peak_memory_mib for side in ("sparse", "dense")
            )
            line.append(f"{sparse / whole:.4f}")
        table.add_row(*at, *line)
    console.print(table)


def show_rules(rows: Sequence[Row], console: Console) -> None:
    """Print backward and step of each rule as shares of dense, a line a network."""
    first = rows[0]
    table = Table(
        title=f"backward / step, share of dense, medians; drop rate {first.drop_rate:g}, "
        f"{first.memory_format}; {first.device}, torch {torch.__version__}"
    )
    sides = [side for side in dict.fromkeys(r.side for r in rows) if side != "dense"]
    for column in ("network", "input", *sides):
        table.add_column(column, justify="right" if column in sides else "left")
    shares = {(r.name, r.shape, r.side, r.mode): r.share_of_dense for r in rows}
    for at in dict.fromkeys((r.name, r.shape) for r in rows):
        cells = [
            " / ".join(f"{shares[(*at, side, mode)]:.3f}" for mode in ("backward", "step"))
            for side in sides
        ]
        table.add_row(*at, *cells)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(description=__doc__)
    add_networks(parser, NETWORKS)
    add_conversion(parser)
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--measured-plan",
        action="store_true",
        help="add the side plan: the layers that a plan chooses",
    )
    add_timing(parser)
    args = parser.parse_args(arguments)
    if has_rules(args) and args.measured_plan:
        parser.error("--measured-plan is for one --selection and one --remainder")
    rows = measure_all(parser, args, args.network, measure)
    console = Console(width=None if sys.stdout.isatty() else 140)
    (show_rules if has_rules(args) else show)(rows, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
