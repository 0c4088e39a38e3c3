"""``measure``: what the sparse backward is worth on this machine, layer by layer and in all."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from .._progress import Progress
from .._text import sizes
from ..metering import energy
from ..ops import autotune
from ..timing import device_name, joules_per_step, time_layers, time_steps
from . import options, output, times
from .errors import CommandError, UsageError, one_line
from .models import load_model

_DESCRIPTION = """\
Time a model on this machine, dense and sparse in turns: each layer alone (forward and backward, on
inputs of the shapes it gets in the model), and whole training steps. Shown are medians and, in
JSON and CSV, the 20th and 80th percentiles too.
"""
_EPILOG = """\
The sparse side has the same drop rate in every step: with a schedule such as BarSchedule(0.8) a
training gains as much in the sparse epochs and nothing in the dense ones. Let nothing else run.
The number of threads is torch's (OMP_NUM_THREADS=4 ssprop-patch measure ...).

examples:
  ssprop-patch measure timm:resnet50 --input-size 8x3x160x160
  ssprop-patch measure torchvision:resnet50 --input-size 256x3x224x224 --device cuda \\
      --channels-last --amp bf16
  ssprop-patch measure my_nets.py:build --input-size 32x3x64x64 --iterations 50 --csv > times.csv
"""
_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    options.add_model(parser)
    parser.add_argument(
        "--drop-rate",
        type=options.drop_rate,
        default=0.8,
        metavar="D",
        help=f"of the sparse side (default: %(default)s); {options.D}",
    )
    parser.add_argument(
        "--iterations",
        type=options.count,
        default=15,
        metavar="N",
        help="measurements of each side (default: %(default)s)",
    )
    parser.add_argument(
        "--channels-last",
        action="store_true",
        help="model and input in the channels_last memory format",
    )
    options.add_selection(parser)
    parser.add_argument("--amp", choices=_AMP, help="autocast to bfloat16 or float16")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    options.add_format(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    device = _device(args.device)
    torch.manual_seed(0)
    model, inputs = _prepare(load_model(args.model), args, device)
    common: dict[str, Any] = {
        "types": options.types(args),
        "autocast": _AMP.get(args.amp),
        **options.selection(args),
    }
    timed = {**common, "iterations": args.iterations}
    try:
        with Progress("timing layers") as progress:
            layers = time_layers(model, inputs, args.drop_rate, **timed, progress=progress)
        if not layers:
            raise CommandError("no layer that a conversion would take ran in training mode")
        with Progress("timing whole steps") as progress:
            steps = time_steps(model, inputs, args.drop_rate, **timed, progress=progress)
        counter, reason = energy.find_counter()
        joules = {}
        if counter is not None:
            with Progress("measuring energy") as progress:
                joules = joules_per_step(
                    counter, model, inputs, args.drop_rate, **common, progress=progress
                )
    except (RuntimeError, ValueError) as error:  # the model's own; out of memory
        raise CommandError(one_line(error)) from error
    setting = _setting(args, device)
    if args.json:
        output.print_json(
            {
                **setting,
                "layers": [layer.to_dict() for layer in layers],
                "steps": [
                    {
                        "mode": s.mode,
                        "dense_s": s.dense_s._asdict(),
                        "sparse_s": s.sparse_s._asdict(),
                        "share": s.share,
                    }
                    for s in steps
                ],
                "joules_per_step": joules or None,
                "joules_not_measured_because": reason or None,
            }
        )
    elif args.csv:
        rows = [{**row, **setting} for row in times.csv_rows(layers, steps, joules)]
        output.print_csv(rows, [*times.FIELDS, *setting])
    else:
        native = setting.pop("native")
        print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in setting.items()))
        print(f"native: {native}\n")
        print(times.text(layers, steps, joules, reason))


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except Exception as error:  # of another type for each backend
        raise UsageError(f"--device {text}: {one_line(error, 200)}") from error
    return device


def _prepare(
    model: nn.Module, args: argparse.Namespace, device: torch.device
) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = [torch.randn(size, dtype=dtype, device=device) for size in args.input_size]
    model = model.to(device).train()
    if args.channels_last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for t in [*model.parameters(), *model.buffers()]:
            if t.dim() in formats:
                t.data = t.data.contiguous(memory_format=formats[t.dim()])
        inputs = [
            x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))
            for x in inputs
        ]
    return model, tuple(inputs)


def _setting(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    return {
        "model": args.model,
        "input_size": " and ".join(map(sizes, args.input_size)),
        "drop_rate": args.drop_rate,
        "selection": args.selection,
        "remainder": args.remainder,
        "memory_format": "channels_last" if args.channels_last else "contiguous",
        "amp": args.amp or "off",
        "iterations": args.iterations,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "native": _native(device),
    }


def _native(device: torch.device) -> str:
    """Say whether the package's own kernels took part: they are half of what is measured."""
    name = "Triton kernels" if device.type == "cuda" else "C functions"
    return f"{name} {autotune.backends()[name]}"
