"""Times single layers: the dense backward against the sparse one, in turns.

python benchmarks/bench_conv.py                                     # a layer of each kind, CPU
python benchmarks/bench_conv.py --layer conv2d:16x64x56x56:128:3:stride=2 linear:8x197x192:768
python benchmarks/bench_conv.py --device cuda --amp --channels-last

A layer is KIND:SHAPE:OUT[:KERNEL][:key=value,...]: the class in small letters, the input's shape
with batch and channels, the output channels, the kernel (3, or 3x5), and of stride, padding,
dilation, groups, bias (0 or 1; default 0) and dx (0: its input needs no gradient, as a network's
first layer's) what is not the default. Padding is by default half of the dilated kernel, and none
in a transposed convolution.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from arguments import KINDS, add_timing, measure_all
from rich.console import Console
from rich.table import Table
from rows import Row, Setting, compare
from torch import Tensor, nn

import ssprop_patch as ssp
from ssprop_patch._text import sizes
from ssprop_patch.cli.options import Parser, reader
from ssprop_patch.timing import alternate, time_layers, waiter

MODES = ("forward", "backward", "both")
# What networks are made of; each runs in some ten milliseconds on a small machine.
LAYERS = (
    "conv2d:16x64x32x32:64:3",
    "conv2d:16x128x28x28:128:3",
    "conv2d:16x256x14x14:256:3",
    "conv2d:16x512x7x7:512:3",
    "conv2d:16x64x32x32:256:1",
    "conv2d:16x256x32x32:64:1",
    "conv2d:16x512x7x7:2048:1",
    "conv2d:16x256x32x32:512:1:stride=2",
    "conv2d:16x3x128x128:64:7:stride=2,dx=0",
    "conv2d:16x96x32x32:96:3:groups=96",
    "conv2d:16x96x32x32:96:5:groups=96",
    "conv2d:16x96x32x32:96:7:groups=96",
    "conv2d:16x128x32x32:128:3:groups=32",
    "conv2d:8x480x1x1:20:1:bias=1",  # of squeeze and excitation
    "conv2d:8x112x10x10:32:1",
    "conv2d:8x48x10x10:48:3",
    "conv1d:16x64x1024:128:3",
    "conv3d:4x32x8x28x28:64:3",
    "conv3d:1x32x16x32x32:32:3",
    "convtranspose2d:8x128x16x16:64:2:stride=2",
    "linear:8x197x192:768:bias=1",
)
_CHANNELS_LAST = {
    nn.Conv2d: torch.channels_last,
    nn.ConvTranspose2d: torch.channels_last,
    nn.Conv3d: torch.channels_last_3d,
    nn.ConvTranspose3d: torch.channels_last_3d,
}
# As in ssprop_patch.timing.time_layers: so long is one measurement, of that many passes at most.
_BURST_SECONDS, _LONGEST_BURST = 2e-3, 50


# --- which layer ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSpec:
    """A layer and the shape of its input.

    Attributes:
        name: The text that was read, without the shape.
        cls: One of torch's layers.
        arguments: Of its constructor.
        shape: Of the input, (N, C_in, *spatial), or (*, in_features).
        dx: Whether the input needs a gradient.
    """

    name: str
    cls: type[nn.Module]
    arguments: Mapping[str, Any]
    shape: tuple[int, ...]
    dx: bool

    @classmethod
    def parse(cls, text: str) -> LayerSpec:
        """Read ``KIND:SHAPE:OUT[:KERNEL][:key=value,...]``, see the top of this file.

        Raises:
            ValueError: If the text is not of that form, or torch has no such layer.
        """
        try:
            spec = _parse(text)
            spec.build(device="meta")(torch.empty(spec.shape, device="meta"))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{text!r}: {error}") from error
        return spec

    def build(self, **where: Any) -> nn.Module:
        """Make the layer, in training mode; ``where`` are torch's device and dtype."""
        return self.cls(**self.arguments, **where).train()

    def kept(self, rate: float) -> float:
        """Return k / C, the part of the output channels that a sparse backward keeps."""
        layer = self.build(device="meta")
        found = ssp.summary(layer, input_size=self.shape, types=self.cls, drop_rate=rate)
        return found.layers[0].kept / found.layers[0].channels


def _parse(text: str) -> LayerSpec:
    kind, *parts = text.strip().lower().split(":")
    if kind not in KINDS:
        raise ValueError(f"the kind must be one of {', '.join(KINDS)}, not {kind!r}")
    spatial = 0 if kind == "linear" else int(kind[-2])
    pairs = parts.pop().split(",") if parts and "=" in parts[-1] else []
    names = ("SHAPE", "OUT", "KERNEL")[: 3 if spatial else 2]
    if len(parts) != len(names):
        raise ValueError(f"expected {':'.join((kind, *names))}, and key=value,... after it")
    shape = _numbers(parts[0], "the shape")
    if len(shape) != spatial + 2 if spatial else len(shape) < 2:
        least = f"{spatial + 2}" if spatial else "2 or more"
        raise ValueError(f"the shape must have {least} dimensions, batch and channels included")
    (out,) = _numbers(parts[1], "OUT", 1)
    if out == 1:
        raise ValueError("of one output channel there is nothing to choose")
    options = dict(pair.partition("=")[::2] for pair in pairs)
    flags = {
        key: _flag(options.pop(key, default), key) for key, default in (("bias", "0"), ("dx", "1"))
    }
    if spatial:
        arguments = {
            "in_channels": shape[1],
            "out_channels": out,
            **_geometry(parts[2], options, spatial, "transpose" in kind),
        }
    else:
        arguments = {"in_features": shape[-1], "out_features": out}
    if options:
        known = "stride, padding, dilation, groups, bias, dx" if spatial else "bias, dx"
        raise ValueError(f"{', '.join(options)}: the keys are {known}")
    name = ":".join([kind, *parts[1:], *[",".join(pairs)] * bool(pairs)])
    return LayerSpec(name, KINDS[kind], arguments | {"bias": flags["bias"]}, shape, flags["dx"])


def _geometry(
    kernel: str, options: dict[str, str], spatial: int, transposed: bool
) -> dict[str, Any]:
    """Take what is a convolution's out of ``options``."""
    lengths = _numbers(kernel, "KERNEL", spatial)
    dilation = _numbers(options.pop("dilation", "1"), "dilation", spatial)
    half = [0 if transposed else d * (k - 1) // 2 for k, d in zip(lengths, dilation, strict=True)]
    padding = options.pop("padding", sizes(half))
    (groups,) = _numbers(options.pop("groups", "1"), "groups", 1)
    return {
        "kernel_size": lengths,
        "dilation": dilation,
        "groups": groups,
        "stride": _numbers(options.pop("stride", "1"), "stride", spatial),
        "padding": _numbers(padding, "padding", spatial, least=0),
    }


def _numbers(text: str, what: str, length: int | None = None, least: int = 1) -> tuple[int, ...]:
    """Read ``3x5``; one number stands for ``length`` of them."""
    words = text.split("x")
    if not all(word.isdecimal() and int(word) >= least for word in words):
        raise ValueError(f"{what} must be integers >= {least} with x between them, not {text!r}")
    numbers = tuple(map(int, words))
    if length is not None and len(numbers) == 1:
        numbers *= length
    if length is not None and len(numbers) != length:
        wanted = f"{length} numbers or one" if length > 1 else "one number"
        raise ValueError(f"{what} must be {wanted}, not {text!r}")
    return numbers


def _flag(text: str, what: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(f"{what} must be 0 or 1, not {text!r}")
    return text == "1"


# --- how long it takes ------------------------------------------------------------------------


def measure(spec: LayerSpec, args: argparse.Namespace) -> list[Row]:
    """Return the CSV rows of one layer."""
    torch.manual_seed(0)
    where = {"device": torch.device(args.device), "dtype": getattr(torch, args.dtype)}
    autocast = torch.bfloat16 if args.amp else None
    layout = _CHANNELS_LAST.get(spec.cls) if args.channels_last else None
    layout = layout or torch.contiguous_format
    dense = spec.build(**where).to(memory_format=layout)
    x = torch.randn(spec.shape, **where).contiguous(memory_format=layout).requires_grad_(spec.dx)
    sparse = ssp.convert(
        copy.deepcopy(dense), args.drop_rate, types=spec.cls, selection=args.selection
    )
    times = {"dense": passes(dense, x, autocast), "sparse": passes(sparse, x, autocast)}
    for run in times.values():  # the first time kernels are chosen and memory is taken
        run(1)
    once = min(sum(run(1)[:2]) for run in times.values())
    burst = min(max(1, int(_BURST_SECONDS / once)), _LONGEST_BURST)
    seconds = alternate(
        {side: lambda run=run: run(burst) for side, run in times.items()},
        args.iterations,
        args.warmup,
    )
    setting = Setting.here(
        x.device,
        name=spec.name,
        shape=spec.shape,
        dtype=where["dtype"],
        amp=args.amp,
        memory_format=layout,
        drop_rate=args.drop_rate,
        selection=args.selection,
        options="kernels=measured" * args.measured_kernels,
        iterations=args.iterations,
    )
    # What chooses the kernel says so to time_layers, which reports it.
    kernel = time_layers(dense, x, args.drop_rate, types=spec.cls, autocast=autocast, iterations=1)[
        0
    ].kernel
    kept = {"dense": 1.0, "sparse": spec.kept(args.drop_rate)}
    return compare(setting, MODES, seconds, kept, kernels={"sparse": kernel})


def passes(
    layer: nn.Module, x: Tensor, autocast: torch.dtype | None
) -> Callable[[int], list[float]]:
    """Return a function that runs a layer so many times, and returns the seconds of ``MODES``.

    The gradient of the output is the same in every pass. Each backward has a forward of its own,
    whose time is not in the backward's. A CPU is timed pass by pass, and the median taken, which
    leaves out interruptions; other devices get all passes at once, so that their queue stays
    filled, as in a training.
    """
    wait = waiter(x.device)
    wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]

    def forward() -> Tensor:
        # Not enabled=False: some devices have no autocast at all.
        half = torch.autocast(x.device.type, autocast) if autocast else contextlib.nullcontext()
        with half:
            return layer(x)

    dy = torch.randn_like(forward())

    def backward(y: Tensor) -> None:
        torch.autograd.grad(y, wanted, dy)

    def now() -> float:
        wait()
        return time.perf_counter()

    def seconds(times: int) -> list[float]:
        start = now()
        ys = [forward() for _ in range(times)]
        middle = now()
        for y in ys:
            backward(y)
        end = now()
        for _ in range(times):
            backward(forward())
        both = now() - end
        return [s / times for s in (middle - start, end - middle, both)]

    def run(times: int) -> list[float]:
        if x.device.type != "cpu":
            return seconds(times)
        taken = [seconds(1) for _ in range(times)]
        return [statistics.median(column) for column in zip(*taken, strict=True)]

    return run


# --- the command line -------------------------------------------------------------------------


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the backward of each layer, and what it makes of both passes."""
    table = Table(title=f"backward, medians; {rows[0].device}, torch {torch.__version__}")
    for column in ("layer", "input", "kernel"):
        table.add_column(column, overflow="fold")
    for column in ("dense ms", "sparse ms", "share of dense", "limit (k/C)", "share of both"):
        table.add_column(column, justify="right")
    cells = {(r.name, r.shape, r.side, r.mode): r for r in rows}
    for name, shape in dict.fromkeys((r.name, r.shape) for r in rows):
        dense = cells[name, shape, "dense", "backward"]
        sparse = cells[name, shape, "sparse", "backward"]
        both = cells[name, shape, "sparse", "both"]
        table.add_row(
            name,
            shape,
            sparse.kernel,
            f"{dense.p50_ms:.3f}",
            f"{sparse.p50_ms:.3f}",
            f"{sparse.share_of_dense:.3f}",
            f"{sparse.limit:.3f}",
            f"{both.share_of_dense:.3f}",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--layer",
        type=reader(LayerSpec.parse),
        nargs="+",
        metavar="SPEC",
        default=[LayerSpec.parse(text) for text in LAYERS],
    )
    parser.add_argument("--selection", default="l1", choices=("l1", "l2", "random"))
    number = parser.add_mutually_exclusive_group()
    number.add_argument(
        "--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16")
    )
    number.add_argument("--amp", action="store_true", help="float32 under bfloat16 autocast")
    add_timing(parser)
    args = parser.parse_args(arguments)
    rows = measure_all(parser, args, args.layer, measure)
    console = Console(width=None if sys.stdout.isatty() else 140)
    show(rows, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
