"""Compiles the C functions where they run, as torch.compile does with what it generates.

The processor of the machine decides which instructions are used, so nothing is shipped compiled.
What was compiled is kept, see :mod:`.cache`; of processes that start together one compiles, and the
others wait for it (:mod:`.lock`).

Who asks for the functions waits for the compiler, unless ``SSPROP_PATCH_NATIVE`` is ``background``:
then torch's own operations run until it is done. That is not the default, as it makes the run in
which it happens differ in rounding from every other run with the same seed, by how fast the
compiler was. Under ``torch.use_deterministic_algorithms`` it waits, too.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .cache import CacheEntry, find_entry
from .cell_shape import CellShape
from .conv_shape import ConvShape
from .lock import one_at_a_time

_log = logging.getLogger(__name__)

# Neither of the last two changes a result: they let loops be vectorised that call fabs.
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
_SECONDS = 120
_PATIENCE = 120  # for another process that compiles

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
    "sum_taps": (_POINTER, _POINTER, *[_INT64] * 4, _INT, _POINTER, _POINTER, _INT),
    "put_taps": (_POINTER, _POINTER, *[_INT64] * 4, _INT, _POINTER, _POINTER, _INT),
    "rows_backward": (*[_POINTER] * 4, *[_INT64] * 4, *[_POINTER] * 3, _INT),
    "norm_sums": (*[_POINTER] * 6, *[_INT64] * 3, *[_INT] * 3, _CELLS, *[_POINTER] * 4, _INT),
    "two_norm": (*[_POINTER] * 10, *[_INT64] * 3, _CELLS, _INT, _INT, *[_POINTER] * 6, _INT),
    "positive_cells": (_POINTER, *[_INT64] * 2, _CELLS, _INT, *[_POINTER] * 3, _INT),
    "two_relu": (*[_POINTER] * 6, *[_INT64] * 3, _CELLS, _INT, *[_POINTER] * 3, _INT),
    "norm_input_grad": (*[_POINTER] * 9, *[_INT64] * 4, _INT, _INT, _POINTER, _POINTER, _INT),
}
_CONV = {
    "conv_dx": (*[_POINTER] * 3, _SHAPE, _POINTER, _INT),
    "conv_dw": (*[_POINTER] * 3, _SHAPE, _POINTER, _INT),
    "conv_db": (*[_POINTER] * 2, _SHAPE, _POINTER),
    "conv_backward": (*[_POINTER] * 3, _SHAPE, _INT, *[_INT64] * 2, *[_POINTER] * 4, _INT),
}
_FURTHER = ("cells.c", "taps.c", "rows.c", "two_resolutions.c", "two_side_by_side.c")
# Files and functions. What those return that can fail, tensors.check understands.
_LIBRARIES: dict[str, tuple[tuple[str, ...], dict[str, tuple[Any, ...]]]] = {
    "passes": (("channel_ops.c", "batch_norm.c", *_FURTHER), _PASSES),
    "conv": (("conv.c", "conv_backward.c", "channel_ops.c", "rows.c"), _CONV),
}


# What library() returns from now on, and what compiles meanwhile.
_settled: dict[tuple[str, str], Any] = {}
_compiling: dict[tuple[str, str], threading.Thread] = {}


def library(number: str, name: str = "passes") -> Any:
    """Return the compiled functions for ``"float"`` or ``"double"``, or None where there are none.

    Args:
        number: What they compute with.
        name: ``"passes"`` over memory, or ``"conv"``, the backward of convolutions.

    The environment variable ``SSPROP_PATCH_CFLAGS`` holds further flags for the compiler, such as
    ``-fsanitize=address,undefined``. :func:`why_unavailable` lists when there are no functions. A
    compiler that fails is warned of, once.
    """
    try:
        return _settled[number, name]
    except KeyError:
        return _settle(number, name)


def _settle(number: str, name: str) -> Any:
    if _may_go_on() and _is_compiling(number, name):
        return None
    found, failure = _build(number, name)
    if failure is not None:
        warnings.warn(
            f"could not compile ssprop_patch's C functions ({failure}): torch's own operations "
            "are used, which are slower; SSPROP_PATCH_NATIVE=0 does not try",
            stacklevel=3,
        )
    _settled[number, name] = found
    return found


def _may_go_on() -> bool:
    asked = os.environ.get("SSPROP_PATCH_NATIVE") == "background"
    return asked and not torch.are_deterministic_algorithms_enabled()


def _is_compiling(number: str, name: str) -> bool:
    """Whether a library is being compiled in the background, which this begins if need be."""
    if (number, name) not in _compiling:
        # What is kept is there at once, and all later runs are alike.
        thread = threading.Thread(target=_build, args=(number, name), name="ssprop_patch compiles")
        _compiling[number, name] = thread
        if find_compiler() is None or _is_kept(number, name):
            return False
        thread.start()
    return _compiling[number, name].is_alive()


def are_compiling() -> bool:
    """Whether there will be C functions that are not there yet (``background``)."""
    return any(thread.is_alive() for thread in _compiling.values())


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
    try:
        found = _load_or_compile(number, name, compiler)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return None, _first_line(error)
    for function_name, signature in _LIBRARIES[name][1].items():
        function = getattr(found, function_name)
        function.argtypes, function.restype = signature, _INT
    return found, None


class _Job(NamedTuple):
    """One library that may have to be compiled."""

    name: str
    command: list[str]  # but for the target
    entry: CacheEntry | None

    @classmethod
    def of(cls, number: str, name: str, compiler: list[str]) -> _Job:
        sources, files = Path(__file__).with_name("csrc"), _LIBRARIES[name][0]
        given = shlex.split(os.environ.get("SSPROP_PATCH_CFLAGS", ""))
        flags = [*_FLAGS, *given, f"-DT={number}", "-shared", "-fPIC"]
        name = f"{name}-{number}"
        entry = find_entry(name, compiler, [*flags, *files], sources)
        return cls(name, [*compiler, *flags, *(str(sources / file) for file in files)], entry)

    def load(self) -> ctypes.CDLL | None:
        """Return the library if it is kept."""
        return None if self.entry is None else self.entry.load()

    def compile(self, folder: str) -> ctypes.CDLL:
        """Compile, keep and load it."""
        target = Path(folder, f"{self.name}.so")
        subprocess.run(
            [*self.command, "-o", str(target)],
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
        if self.entry is not None:
            self.entry.store(target)
        # What is loaded stays when the file is gone.
        return self.load() or ctypes.CDLL(str(target))


def _is_kept(number: str, name: str) -> bool:
    compiler = find_compiler()
    try:
        return compiler is not None and _Job.of(number, name, compiler).load() is not None
    except (OSError, ValueError):  # which compiling says
        return False


def _load_or_compile(number: str, name: str, compiler: list[str]) -> ctypes.CDLL:
    job = _Job.of(number, name, compiler)
    found = job.load()
    if found is not None:
        return found
    folder = None if job.entry is None else job.entry.folder
    with one_at_a_time(folder, _PATIENCE) as alone:
        found = job.load()  # another process may have compiled it meanwhile
        if found is not None:
            return found
        if alone or os.environ.get("LOCAL_RANK", "0") == "0":
            _announce(compiler[0], folder)
        # The others are needed soon, as a rule, and there is more than one core.
        others = [_Job.of(number, other, compiler) for other in _LIBRARIES if other != name]
        jobs = [job, *(other for other in others if folder is not None and other.load() is None)]
        with (
            tempfile.TemporaryDirectory(prefix="ssprop_patch", ignore_cleanup_errors=True) as work,
            ThreadPoolExecutor(len(jobs)) as pool,
        ):
            asked_for, *_ = [pool.submit(each.compile, work) for each in jobs]
            return asked_for.result()


@functools.cache
def _announce(compiler: str, folder: Path | None) -> None:
    """Say, once, what the pause is."""
    how_often = f"once; they are kept in {folder}"
    if folder is None:
        how_often = "in every process, as there is no folder to keep them in (SSPROP_PATCH_CACHE)"
    _log.warning(
        "ssprop_patch compiles its C functions for this processor with %s, which takes some "
        "seconds: %s",
        compiler,
        how_often,
    )


def _first_line(error: Exception) -> str:
    """Return what a compiler that failed says first of an error, or what can be said of it."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it took more than {_SECONDS} seconds"
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = [line.strip() for line in error.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line]
    return (errors or lines or [f"{error.cmd[0]}: exit status {error.returncode}"])[0]
