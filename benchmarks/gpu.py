"""The GPU in one call: are the kernels right, what do sparse steps cost, against which bars.

python benchmarks/gpu.py                                          # eight minutes on an H100
python benchmarks/gpu.py --minutes 20 --output results/gpu.csv
python benchmarks/gpu.py --network resnet50:256:224 --no-compile

It needs torch, timm for all networks but the U-Net, and nothing else. First every Triton kernel,
and layers and a network with them, are compared with plain torch; a wrong one makes the exit status
1, and the kernels are then not timed. Then networks train in bfloat16 autocast and channels_last:
first each network's eager sides and the compiled dense one in turns, then the compiled sparse
sides, one comparison after the other. Rows are written as they are had. When the minutes are over
it stops where it is and prints the table.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from arguments import add_networks
from gpu_run.kernels import checks, why_not
from gpu_run.measure import RULES, Run
from gpu_run.report import BARS, COLUMNS, show
from networks import SEGMENTATION
from rows import version

import ssprop_patch as ssp
from ssprop_patch._csv_table import CsvTable
from ssprop_patch.cli.options import D, Parser, count, drop_rate

NETWORKS = ("resnet50:256:224", "convnext_tiny:128:224", "efficientnet_b0:256:224", "unet:32:256")


def environment(device: torch.device) -> str:
    """Return what this runs on, in a line."""
    found = [f"ssprop_patch {ssp.__version__}", f"torch {torch.__version__}"]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        free, total = torch.cuda.mem_get_info(device)
        found += [
            f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})",
            f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free",
            f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
        ]
    else:
        found.append(f"{device.type}: figures of it say nothing of a GPU")
    found += [f"{name} {version(name) or 'missing'}" for name in ("triton", "timm")]
    return "; ".join(found)


def check_kernels(device: torch.device) -> bool:
    """Print how each comparison came out; return whether all are right."""
    reason = why_not(device)
    if reason:
        print(f"Triton kernels: not checked, {reason}")
    wrong, number = 0, 0
    for check in checks(device):
        number += 1
        wrong += not check.is_right
        words = (str(w).removeprefix("torch.") for w in (check.dtype, check.memory_format))
        verdict = "ok" if check.is_right else "WRONG"
        print(
            f"{verdict:5}  {check.name}, {', '.join(words)}: {check.error:.2g} of what is allowed"
        )
    print(f"{number - wrong} of {number} comparisons are right\n", flush=True)
    return not wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = Parser(description=__doc__)
    has_timm = find_spec("timm") is not None
    add_networks(parser, [n for n in NETWORKS if has_timm or n.startswith(f"{SEGMENTATION}:")])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--drop-rate", type=drop_rate, default=0.8, metavar="D", help=D)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after so many")
    parser.add_argument("--iterations", type=count, default=15, help="measurements of each side")
    parser.add_argument("--energy-seconds", type=float, default=1.0, help="of each side")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--output", type=Path, help="append the rows to this CSV")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu goes through everything, small")
    if args.output is not None:
        try:
            CsvTable(args.output, COLUMNS).check()
        except ValueError as error:
            parser.error(str(error))
    start = time.monotonic()
    print(environment(device), flush=True)
    are_right = check_kernels(device)
    left = 60 * args.minutes - (time.monotonic() - start)
    run = Run(args, left, kernels=are_right and device.type == "cuda" and not why_not(device))
    is_done = run.measure()
    print(show(run.rows))
    print(BARS)
    if not is_done:
        print("The time was up before everything was measured.")
    for line in run.failed:
        print(f"FAILED {line}")
    return 0 if are_right and not run.failed else 1


if __name__ == "__main__":
    sys.exit(main())
