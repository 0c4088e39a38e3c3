"""Compiles the C functions where they run, as torch.compile does with what it generates.

The processor of the machine decides which instructions are used, so nothing is shipped compiled.
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

# Neither of the last two changes a result: they let loops be vectorised that call fabs.
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")

# OpenMP's threads are those of torch, whose library of that name is loaded already.
_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_PASSES = {
    "channel_sums": (_POINTER, *[_INT64] * 3, _INT, _INT, _POINTER, _POINTER, _INT),
    "largest": (_POINTER, *[_INT64] * 3, _POINTER, _POINTER),
    "largest_channels": (_POINTER, *[_INT64] * 3, _INT, _INT, *[_INT64] * 2, *[_POINTER] * 2, _INT),
    "take_channels": (_POINTER, _POINTER, *[_INT64] * 3, _POINTER, _INT),
    "put_rows": (_POINTER, _POINTER, *[_INT64] * 3, _POINTER, _INT),
    "put_sums": (_POINTER, _INT64, _POINTER, *[_INT64] * 3, _POINTER, _INT),
    "rows_backward": (*[_POINTER] * 4, *[_INT64] * 4, *[_POINTER] * 3, _INT),
    "norm_sums": (*[_POINTER] * 6, *[_INT64] * 3, *[_INT] * 3, *[_POINTER] * 3, _INT),
    "norm_input_grad": (*[_POINTER] * 9, *[_INT64] * 4, _INT, _INT, _POINTER, _POINTER, _INT),
}  # fmt: skip
_CONV = {
    "conv_dx": (*[_POINTER] * 5, _INT),
    "conv_dw": (*[_POINTER] * 5, _INT),
    "conv_db": (*[_POINTER] * 4,),
    "conv_backward": (*[_POINTER] * 4, _INT, *[_INT64] * 2, *[_POINTER] * 4, _INT),
}
# Files and functions. Of those that can fail tensors.check understands what they return.
_LIBRARIES = {
    "passes": (("channels.c", "norm.c", "rows.c"), _PASSES),
    "conv": (("conv.c", "channels.c", "rows.c", "whole.c"), _CONV),
}


@functools.cache
def library(number: str, name: str = "passes") -> ctypes.CDLL | None:
    """Return the compiled functions for ``"float"`` or ``"double"``, or None where there are none.

    Args:
        number: What they compute with.
        name: ``"passes"`` over memory, or ``"conv"``, the backward of convolutions.

    The environment variable ``SSPROP_PATCH_CFLAGS`` holds further flags for the compiler, such as
    ``-fsanitize=address,undefined``. There are none without a C compiler (``$CC``, gcc or cc), on
    systems other than Linux (whose torch has other threads than OpenMP's), and where the
    environment variable ``SSPROP_PATCH_NATIVE`` is 0. A compiler that fails is warned of, once.
    """
    compiler = find_compiler()
    if compiler is None:
        return None
    files, signatures = _LIBRARIES[name]
    try:
        with tempfile.TemporaryDirectory(prefix="ssprop_patch") as folder:
            target = Path(folder, f"{name}.so")
            flags = [*_FLAGS, *shlex.split(os.environ.get("SSPROP_PATCH_CFLAGS", ""))]
            command = [*compiler, *flags, f"-DT={number}", "-shared", "-fPIC"]
            subprocess.run(
                [*command, *(str(Path(__file__).with_name(f)) for f in files), "-o", str(target)],
                check=True, capture_output=True, text=True, timeout=120,
            )  # fmt: skip
            found = ctypes.CDLL(str(target))  # what is loaded stays when the file is gone
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or "").strip().splitlines()
        warnings.warn(
            f"could not compile ssprop_patch's C functions ({said[0] if said else error}): torch's "
            "own operations are used, which are slower; SSPROP_PATCH_NATIVE=0 does not try",
            stacklevel=2,
        )
        return None
    for function_name, signature in signatures.items():
        function = getattr(found, function_name)
        function.argtypes, function.restype = signature, _INT
    return found


def find_compiler() -> list[str] | None:
    """Return the command of the C compiler, or None; nothing is compiled."""
    if sys.platform != "linux" or os.environ.get("SSPROP_PATCH_NATIVE") == "0":
        return None
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    found = shutil.which("gcc") or shutil.which("cc")
    return None if found is None else [found]
