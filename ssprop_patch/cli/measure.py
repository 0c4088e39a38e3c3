"""``measure``: what the sparse backward is worth on this machine, layer by layer and in all."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..metering import energy
from ..timing import LayerTime, StepTime, device_name, joules_per_step, time_layers, time_steps
from . import options, output
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
  ssprop-patch measure timm:resnet50 --input-size 8 3 160 160
  ssprop-patch measure torchvision:resnet50 --input-size 256 3 224 224 --device cuda \\
      --channels-last --amp bf16
  ssprop-patch measure my_nets.py:build --input-size 32 3 64 64 --iterations 50 --csv > times.csv
"""
_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FIELDS = (
    "kind",
    "name",
    "class",
    "calls",
    "input_shape",
    "weight_shape",
    "output_shape",
    "kernel",
    "dense_p20",
    "dense_p50",
    "dense_p80",
    "sparse_p20",
    "sparse_p50",
    "sparse_p80",
    "unit",
    "share_of_dense",
    "pays",
)


def add_parser(commands: Any) -> None:
    """Add the command's options."""
    parser = commands.add_parser(
        "measure",
        help="milliseconds (and joules) of each layer and of whole steps",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    options.add_model(parser)
    parser.add_argument(
        "--drop-rate",
        type=options.drop_rate,
        default=0.8,
        metavar="D",
        help="of the sparse side (default: %(default)s)",
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
        layers = time_layers(model, inputs, args.drop_rate, **timed, progress=_progress)
        if not layers:
            raise CommandError("no layer that a conversion would take ran in training mode")
        steps = time_steps(model, inputs, args.drop_rate, **timed)
        counter, reason = energy.find_counter()
        joules = {}
        if counter is not None:
            joules = joules_per_step(counter, model, inputs, args.drop_rate, **common)
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
        rows = [{**row, **setting} for row in _csv_rows(layers, steps, joules)]
        output.print_csv(rows, [*_FIELDS, *setting])
    else:
        print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in setting.items()))
        print()
        print(_text(layers, steps, joules, reason))


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
        "input_size": " and ".join(map(output.shape, args.input_size)),
        "drop_rate": args.drop_rate,
        "selection": args.selection,
        "remainder": args.remainder,
        "memory_format": "channels_last" if args.channels_last else "contiguous",
        "amp": args.amp or "off",
        "iterations": args.iterations,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\rtiming layer {done} of {total}", end=end, file=sys.stderr, flush=True)


def _text(
    layers: list[LayerTime], steps: list[StepTime], joules: dict[str, float], reason: str
) -> str:
    rows = [
        (
            "layer",
            "class",
            "input",
            "weight",
            "calls",
            "kernel",
            "dense ms",
            "sparse ms",
            "share",
            "pays",
        )
    ]
    rows += [
        (
            t.name or "(model)",
            t.cls,
            output.shape(t.input_shape),
            output.shape(t.weight_shape),
            str(t.calls),
            t.kernel,
            f"{t.dense_ms.p50:.3f}",
            f"{t.sparse_ms.p50:.3f}",
            f"{t.share:.2f}",
            "yes" if t.pays else "no",
        )
        for t in layers
    ]
    dense = sum(t.calls * t.dense_ms.p50 for t in layers)
    sparse = sum(t.calls * t.sparse_ms.p50 for t in layers)
    lines = [
        output.table(rows, left=4),
        "",
        f"layers alone: {dense:.1f} ms dense, {sparse:.1f} ms sparse ({sparse / dense:.2f}); the "
        f"sparse backward pays in {sum(t.pays for t in layers)} of {len(layers)}",
        "",
    ]
    whole = [("whole step", "dense s", "sparse s", "share")]
    whole += [
        (s.mode, f"{s.dense_s.p50:.4f}", f"{s.sparse_s.p50:.4f}", f"{s.share:.2f}") for s in steps
    ]
    lines += [output.table(whole), ""]
    if joules:
        share = f" ({joules['sparse'] / joules['dense']:.2f})" if joules["dense"] else ""
        lines.append(
            f"energy: {joules['dense']:.2f} J a step dense, {joules['sparse']:.2f} J sparse{share}"
        )
    else:
        lines.append(f"energy: not measured: {reason}")
    return "\n".join(lines)


def _csv_rows(
    layers: list[LayerTime], steps: list[StepTime], joules: dict[str, float]
) -> Iterator[dict[str, Any]]:
    for t in layers:
        shapes = {
            name: output.shape(getattr(t, name))
            for name in ("input_shape", "weight_shape", "output_shape")
        }
        yield {
            "kind": "layer",
            "name": t.name,
            "class": t.cls,
            "calls": t.calls,
            **shapes,
            "kernel": t.kernel,
            **_sides(t.dense_ms, t.sparse_ms),
            "unit": "ms",
            "share_of_dense": t.share,
            "pays": t.pays,
        }
    for s in steps:
        yield {
            "kind": "step",
            "name": s.mode,
            **_sides(s.dense_s, s.sparse_s),
            "unit": "s",
            "share_of_dense": s.share,
        }
    if joules:
        yield {
            "kind": "step",
            "name": "energy",
            "dense_p50": joules["dense"],
            "sparse_p50": joules["sparse"],
            "unit": "J",
            "share_of_dense": joules["sparse"] / (joules["dense"] or 1),
        }


def _sides(dense: Any, sparse: Any) -> dict[str, float]:
    return {
        f"{side}_{name}": value
        for side, q in (("dense", dense), ("sparse", sparse))
        for name, value in q._asdict().items()
    }
