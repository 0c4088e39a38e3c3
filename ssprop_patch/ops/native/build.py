"""Compiles the C functions where they run, as torch.compile does with what it generates.

The processor of the machine decides which instructions are used, so nothing is shipped compiled.
What was compiled is kept, see :mod:`.cache`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from .cache import find_entry
from .cell_shape import CellShape
from .conv_shape import ConvShape

# Neither of the last two changes a result: they let loops be vectorised that call fabs.
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
_SECONDS = 120

# OpenMP's threads are those of torch, whose library of that name is loaded already.
_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SHAPE, _CELLS = ctypes.POINTER(ConvShape), ctypes.POINTER(CellShape)
# The parameters that csrc/ssprop.h declares.
_PASSES = {
    "channel_sums": (_POINTER, *[_INT64] * 3, _INT, _INT, _POINTER, _POINTER, _INT),
    "topk_indices": (_POINTER, *[_INT64] * 3, _POINTER, _POINTER),
    "topk_channels": (_POINTER, *[_INT64] * 3, _INT, _INT, *[_INT64] * 2, *[_POINTER] * 2, _INT),
    "take_channels": (_POINTER, _POINTER, *[_INT64] * 3, _POINTER, _INT),
    "put_rows": (_POINTER, _POINTER, *[_INT64] * 3, _POINTER, _INT),
    "put_sums": (_POINTER, _INT64, _POINTER, *[_INT64] * 3, _POINTER, _INT),
    "sum_cells": (_POINTER, _CELLS, *[_POINTER] * 2, _INT),
    "add_cells": (_POINTER, _CELLS, _POINTER, _INT),
    "rows_backward": (*[_POINTER] * 4, *[_INT64] * 4, *[_POINTER] * 3, _INT),
    "norm_sums": (*[_POINTER] * 6, *[_INT64] * 3, *[_INT] * 3, _CELLS, *[_POINTER] * 4, _INT),
    "norm_input_grad": (*[_POINTER] * 9, *[_INT64] * 4, _INT, _INT, _POINTER, _POINTER, _INT),
}
_CONV = {
    "conv_dx": (*[_POINTER] * 3, _SHAPE, _POINTER, _INT),
    "conv_dw": (*[_POINTER] * 3, _SHAPE, _POINTER, _INT),
    "conv_db": (*[_POINTER] * 2, _SHAPE, _POINTER),
    "conv_backward": (*[_POINTER] * 3, _SHAPE, _INT, *[_INT64] * 2, *[_POINTER] * 4, _INT),
}
# Files and functions. What those return that can fail, tensors.check understands.
_LIBRARIES: dict[str, tuple[tuple[str, ...], dict[str, tuple[Any, ...]]]] = {
    "passes": (("channel_ops.c", "batch_norm.c", "cells.c", "rows.c"), _PASSES),
    "conv": (("conv.c", "conv_backward.c", "channel_ops.c", "rows.c"), _CONV),
}


@functools.cache
def library(number: str, name: str = "passes") -> Any:
    """Return the compiled functions for ``"float"`` or ``"double"``, or None where there are none.

    Args:
        number: What they compute with.
        name: ``"passes"`` over memory, or ``"conv"``, the backward of convolutions.

    The environment variable ``SSPROP_PATCH_CFLAGS`` holds further flags for the compiler, such as
    ``-fsanitize=address,undefined``. :func:`why_unavailable` lists when there are no functions. A
    compiler that fails is warned of, once.
    """
    found, failure = _build(number, name)
    if failure is not None:
        warnings.warn(
            f"could not compile ssprop_patch's C functions ({failure}): torch's own operations "
            "are used, which are slower; SSPROP_PATCH_NATIVE=0 does not try",
            stacklevel=2,
        )
    return found


def find_compiler() -> list[str] | None:
    """Return the command of the C compiler, or None; nothing is compiled."""
    return _command() if _why_off() is None else None


def why_unavailable() -> str | None:
    """Return why there are no C functions, in a sentence; None if they work.

    They are compiled to find out, unless they have been.
    """
    reason = why_no_compiler()
    if reason is None:
        failure = _build("float", "passes")[1]
        reason = None if failure is None else f"the compiler failed: {failure}"
    return reason


def why_no_compiler() -> str | None:
    """Return why :func:`find_compiler` finds none; None if it finds one."""
    reason = _why_off()
    if reason is None and _command() is None:
        reason = "no C compiler was found ($CC, gcc, cc)"
    return reason


def _why_off() -> str | None:
    if os.environ.get("SSPROP_PATCH_NATIVE") == "0":
        return "SSPROP_PATCH_NATIVE is 0"
    if sys.platform != "linux":
        return "not Linux (their threads are torch's only there)"
    return None


def _command() -> list[str] | None:
    given = os.environ.get("CC", "")
    if given.strip():
        try:
            return shlex.split(given)
        except ValueError:
            return [given]  # which is not there, as calling it will say
    found = shutil.which("gcc") or shutil.which("cc")
    return None if found is None else [found]


@functools.cache
def _build(number: str, name: str) -> tuple[ctypes.CDLL | None, str | None]:
    """Return the functions, or None and how the compiler failed, if there is one."""
    compiler = find_compiler()
    if compiler is None:
        return None, None
    files, signatures = _LIBRARIES[name]
    try:
        found = _load_or_compile(f"{name}-{number}", compiler, files, f"-DT={number}")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return None, _first_line(error)
    for function_name, signature in signatures.items():
        function = getattr(found, function_name)
        function.argtypes, function.restype = signature, _INT
    return found, None


def _load_or_compile(
    name: str, compiler: list[str], files: tuple[str, ...], type_flag: str
) -> ctypes.CDLL:
    sources = Path(__file__).with_name("csrc")
    given = shlex.split(os.environ.get("SSPROP_PATCH_CFLAGS", ""))
    flags = [*_FLAGS, *given, type_flag, "-shared", "-fPIC"]
    entry = find_entry(name, compiler, [*flags, *files], sources)
    found = None if entry is None else entry.load()
    if found is not None:
        return found
    with tempfile.TemporaryDirectory(prefix="ssprop_patch", ignore_cleanup_errors=True) as folder:
        target = Path(folder, f"{name}.so")
        subprocess.run(
            [*compiler, *flags, *(str(sources / file) for file in files), "-o", str(target)],
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
        if entry is not None:
            entry.store(target)
            found = entry.load()
        # What is loaded stays when the file is gone.
        return ctypes.CDLL(str(target)) if found is None else found


def _first_line(error: Exception) -> str:
    """Return what a compiler that failed says first of an error, or what can be said of it."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it took more than {_SECONDS} seconds"
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = [line.strip() for line in error.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line]
    return (errors or lines or [f"{error.cmd[0]}: exit status {error.returncode}"])[0]
