"""``env``: what a bug report needs to say of the machine and of what is installed."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

import ssprop_patch

from .._device import device_name
from .._text import aligned, counted
from ..metering.energy import find_counter
from ..ops import autotune
from ..ops.native.build import find_compiler, why_no_compiler
from ..ops.native.cache import find_folder
from . import options, output
from .errors import one_line

_DESCRIPTION = """\
Show versions, the processor, which backends are on and why others are not: to be pasted into a bug
report. Compiles the C functions if that has not been done, which takes a few seconds.
"""
_EPILOG = """\
examples:
  ssprop-patch env
  ssprop-patch env --json > env.json
  SSPROP_PATCH_NATIVE=0 ssprop-patch env
"""
_LIBRARIES = (
    "torchvision",
    "triton",
    "timm",
    "lightning",
    "pytorch-lightning",
    "transformers",
    "accelerate",
    "numpy",
    "matplotlib",
    "zeus",
    "rich",
)
#: Of a processor's instructions those that kernels are chosen by, of x86 and of ARM.
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve", "bf16")
_VARIABLES = ("CC", "CUDA_VISIBLE_DEVICES", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
_RAPL = Path("/sys/class/powercap")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    options.add_format(parser, csv=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    found = {name: _said(say) for name, say in _LINES.items()}
    if args.json:
        output.print_json(found)
    else:
        print("\n".join(aligned([(f"{name}:", text) for name, text in found.items()])))


def _said(say: Callable[[], str]) -> str:
    """Return what ``say`` does; what fails is said, too, as the machine at hand may be broken."""
    try:
        text = say()
    except Exception as error:
        text = f"unknown: {type(error).__name__}: {one_line(error, 200)}"
    home = os.path.expanduser("~")  # who somebody is, is none of a bug report's business
    return text.replace(home, "~") if len(home) > 1 else text


def _package() -> str:
    return f"{ssprop_patch.__version__}, {Path(ssprop_patch.__file__).parent}"


def _python() -> str:
    return f"{platform.python_version()}, {platform.platform()}"


def _torch() -> str:
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if getattr(torch.version, "hip", None):
        built = f"ROCm {torch.version.hip}"
    return f"{torch.__version__}, built with {built}, {counted(torch.get_num_threads(), 'thread')}"


def _processor() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{device_name(torch.device('cpu'))}, {platform.machine()}, {counted(cores or 1, 'core')}"
    )


def _instructions() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return "not known on this system"
    lines = info.read_text(errors="replace").splitlines()
    line = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    flags = set(line.partition(":")[2].split())
    return " ".join(flag for flag in _FLAGS if flag in flags) or "none of " + " ".join(_FLAGS)


def _compiler() -> str:
    command = find_compiler()
    if command is None:
        return f"none: {why_no_compiler()}"
    try:
        said = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, ValueError) as error:
        return f"{' '.join(command)}: {one_line(error, 200)}"
    version = (said.stdout + said.stderr).strip().partition("\n")[0]
    return f"{' '.join(command)}: {version or 'says no version'}"


def _backend(name: str) -> Callable[[], str]:
    return lambda: autotune.backends()[name]


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "none"
    devices = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        devices.append(f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}")
    return "; ".join(devices)


def _energy() -> str:
    counter, reason = find_counter()
    if counter is None:
        return f"none: {reason.removeprefix('no energy counter: ')}; {_rapl()}"
    counter.begin()
    return ", ".join(counter.end())


def _rapl() -> str:
    """Say what there is of the counters of Intel's and AMD's processors."""
    counters = list(_RAPL.glob("intel-rapl:*/energy_uj"))
    if not counters:
        return f"no RAPL counters in {_RAPL}"
    readable = sum(os.access(path, os.R_OK) for path in counters)
    return f"RAPL: {readable} of {len(counters)} counters may be read"


def _cache() -> str:
    folder = find_folder()
    if folder is None:
        switched_off = os.environ.get("SSPROP_PATCH_CACHE") in ("", "0")
        why = "SSPROP_PATCH_CACHE is 0" if switched_off else "no folder that only this user writes"
        return f"none: {why}"
    sizes = [path.stat().st_size for path in folder.glob("*.so")]
    libraries = f"{len(sizes)} {'library' if len(sizes) == 1 else 'libraries'}"
    return f"{folder}, {libraries}, {sum(sizes) / 1e6:.1f} MB"


def _variables() -> str:
    names = sorted(n for n in os.environ if n.startswith("SSPROP_PATCH_") or n in _VARIABLES)
    return " ".join(f"{name}={os.environ[name]}" for name in names) or "none set"


def _libraries() -> str:
    found = []
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found) or "none"


_LINES: dict[str, Callable[[], str]] = {
    "ssprop_patch": _package,
    "python": _python,
    "torch": _torch,
    "processor": _processor,
    "instructions": _instructions,
    "C compiler": _compiler,
    "C functions": _backend("C functions"),
    "Triton kernels": _backend("Triton kernels"),
    "CUDA devices": _cuda,
    "energy counters": _energy,
    "cache": _cache,
    "environment": _variables,
    "libraries": _libraries,
}
