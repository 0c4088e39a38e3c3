"""Thousands of random calls, against the ordinary build and against one with sanitizers."""

import os
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest

from ssprop_patch.ops.native import build

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C compiler")
CASES, AT_A_TIME = 3000, 250
PLAIN = 1000  # the cases of a plain run; the others are slow


@needs_compiler
@pytest.mark.parametrize(
    "first",
    [
        pytest.param(first, marks=() if first < PLAIN else pytest.mark.slow)
        for first in range(0, CASES, AT_A_TIME)
    ],
)
def test_random_cases(first):
    counts = fuzz.run(first, first + AT_A_TIME)
    assert sum(counts.values()) == AT_A_TIME
    assert counts["convolution in C"] >= AT_A_TIME // 10  # it is them that this is about


# --- with sanitizers --------------------------------------------------------------------------


READS_BEHIND_THE_END = """
import torch
print("loaded", flush=True)
from ssprop_patch.ops.native.build import library
scores, work, index = torch.zeros(8), torch.zeros(80), torch.zeros(80, dtype=torch.int64)
library = library("float")
print("called", flush=True)
library.topk_indices(scores.data_ptr(), 1, 80, 1, work.data_ptr(), index.data_ptr())
"""


@pytest.fixture(scope="module")
def sanitized():
    """The environment of a process whose C functions are compiled with sanitizers, and a run."""
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("there is no C compiler")
    # The runtime has to be loaded first, and before it looks for the exceptions of C++.
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    said = [
        subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    missing = [name for name, path in zip(names, said, strict=True) if not os.path.isabs(path)]
    if missing:
        pytest.skip(f"the compiler has no {', '.join(missing)}")
    folder = Path(fuzz.__file__).parents[2]
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{said[0]} {said[2]}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's are many
        "SSPROP_PATCH_CFLAGS": "-O0 -g -fsanitize=address,undefined -fno-sanitize-recover=all",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
    }
    done = _run(environment, "-c", READS_BEHIND_THE_END)
    if "loaded" not in done.stdout:
        pytest.skip(f"torch does not load with AddressSanitizer: {done.stderr[-500:]}")
    return environment, done


def _run(environment, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("cases", [80, pytest.param(400, marks=pytest.mark.slow)])
def test_random_cases_with_sanitizers(sanitized, cases):
    environment, _ = sanitized
    done = _run(environment, fuzz.__file__, "0", str(cases))
    assert done.returncode == 0, done.stderr[-5000:]
    assert "could not compile" not in done.stderr, done.stderr
    assert "convolution in C" in done.stdout and f"{cases} cases" in done.stdout


def test_the_sanitizers_see_a_read_behind_the_end(sanitized):
    _, done = sanitized
    assert "called" in done.stdout and done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
