"""Marks in a profile what torch's profiler does not tell apart: put on from outside, and taken off.

The package itself has no marks: what is timed without them is what users run. Private names are
used here on purpose; one that is gone is an error when the marks are put on.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import sys
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C._profiler import _RecordFunctionFast as Range  # a microsecond, not ten

from ssprop_patch.ops import algorithms
from ssprop_patch.ops.native.build import library

from .kinds import (
    CHOOSING,
    COARSE,
    DIRECTIONS,
    GATHERING,
    INPUT,
    MARK,
    NORM,
    PROJECTING,
    ROWS,
    STAMPED,
    WEIGHT,
    WHOLE,
)

#: Functions and methods of the package, without ``ssprop_patch.``, by what they do.
PYTHON_FUNCTIONS: dict[str, tuple[str, ...]] = {
    CHOOSING: ("ops.channel_scores.select_channels",),
    GATHERING: (
        "ops.channel_ops.take_channels",
        "ops.channel_ops.put_channels",
        "ops.channel_ops.put_rows",
        "ops.channel_ops.put_sums",
        "ops.channel_gradients.KeptChannels.spread_db",
    ),
    WEIGHT: ("ops.pointwise.matmul_dw", "ops.whole_gradient._sum_of_channels"),
    INPUT: ("ops.pointwise.matmul_dx", "ops.algorithms._forward_dx"),
    NORM: (
        "ops.channel_ops.norm_sums",
        "ops.channel_ops.norm_input_grad",
        "ops.lazy_grad.gradients.NormGradient._form",
    ),
    PROJECTING: (
        "ops.projection.mix",
        "ops.projection.project_weight",
        "ops.projection.lift_weight",
        "ops.projection._turn",
    ),
    DIRECTIONS: (
        "ops.projection.output_basis",
        "ops.projection.input_bases",
        "ops.projection.refresh_input_bases",
    ),
    COARSE: (
        "core.coarse.CoarseTwin.__init__",
        "core.coarse.CoarseTwin.pool_output",
        "core.coarse.CoarseTwin.backward",
        "core.coarse.CoarseTwin.spread_taps",
        "ops.coarse_twin.FastTwin.add",
        "ops.coarse_twin.FastTwin.add_others",
        "ops.two_resolutions._dx",
    ),
}
#: The C functions, which the profiler does not see.
C_FUNCTIONS = {
    "channel_sums": CHOOSING,
    "topk_indices": CHOOSING,
    "topk_channels": CHOOSING,
    "take_channels": GATHERING,
    "put_rows": GATHERING,
    "put_sums": GATHERING,
    "sum_cells": COARSE,
    "add_cells": COARSE,
    "sum_taps": COARSE,
    "put_taps": COARSE,
    "rows_backward": ROWS,
    "norm_sums": NORM,
    "two_norm": NORM,
    "two_relu": NORM,
    "positive_cells": COARSE,
    "norm_input_grad": NORM,
    "conv_dx": INPUT,
    "conv_dw": WEIGHT,
    "conv_db": WEIGHT,
    "conv_backward": WHOLE.removeprefix(MARK),
}
_FLAG, _STAMPS = "-DSTAMPS", "conv_backward_ns"


def ask_for_stamps() -> None:
    """Have the C functions say how long the parts of conv_backward took.

    Before any of them is used: they are compiled, and kept, apart from the ordinary ones.
    """
    flags = os.environ.get("SSPROP_PATCH_CFLAGS", "")
    if _FLAG not in flags.split():
        os.environ["SSPROP_PATCH_CFLAGS"] = f"{flags} {_FLAG}".strip()


@contextlib.contextmanager
def marked() -> Iterator[list[tuple[int, ...]]]:
    """Put the marks on; yield the stamps of each call of conv_backward, which are added to it."""
    stamps: list[tuple[int, ...]] = []
    with contextlib.ExitStack() as stack:
        for kind, paths in PYTHON_FUNCTIONS.items():
            for path in paths:
                _mark_python(stack, path, kind)
        _mark_c(stack, stamps)
        stack.enter_context(_two_gradients())
        yield stamps


def _mark_python(stack: contextlib.ExitStack, path: str, kind: str) -> None:
    home, name = _find(path)
    function = vars(home)[name]
    replaced = _ranged(function, f"{MARK}{kind}")
    # Where it was imported to, too.
    for module in [m for n, m in sys.modules.items() if n.partition(".")[0] == "ssprop_patch"]:
        for other, value in list(vars(module).items()):
            if value is function:
                stack.enter_context(unittest.mock.patch.object(module, other, replaced))
    if isinstance(home, type):
        stack.enter_context(unittest.mock.patch.object(home, name, replaced))
    for table in (algorithms.DX, algorithms.DW):
        of_it = {other: replaced for other, value in table.items() if value is function}
        stack.enter_context(unittest.mock.patch.dict(table, of_it))


def _find(path: str) -> tuple[Any, str]:
    """Return the module or class that defines a function, and the function's name.

    Raises:
        AttributeError: If there is none.
    """
    *words, name = path.split(".")
    inner = [words.pop()] if words[-1][0].isupper() else []
    home: Any = importlib.import_module(".".join(["ssprop_patch", *words]))
    for word in inner:
        home = getattr(home, word)
    if name not in vars(home):
        raise AttributeError(f"ssprop_patch has no {path} any more: see PYTHON_FUNCTIONS")
    return home, name


def _ranged(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with Range(name):
            return function(*args, **kwargs)

    return call


def _mark_c(stack: contextlib.ExitStack, stamps: list[tuple[int, ...]]) -> None:
    for part in ("passes", "conv"):
        found = library("float", part)
        for name, kind in C_FUNCTIONS.items() if found is not None else ():
            function = vars(found).get(name)
            if function is None:  # of the other library
                continue
            call = _timed(function, f"{MARK}{kind}", None)
            if name == "conv_backward":
                call = _timed(function, WHOLE, _stamps_of(found, stamps))
            stack.enter_context(unittest.mock.patch.object(found, name, call))


def _timed(
    function: Callable[..., int], name: str, after: Callable[[], None] | None
) -> Callable[..., int]:
    def call(*args: Any) -> int:
        with Range(name):
            done = function(*args)
        if after is not None:
            after()
        return done

    return call


def _stamps_of(found: ctypes.CDLL, stamps: list[tuple[int, ...]]) -> Callable[[], None] | None:
    try:
        ns = (ctypes.c_int64 * len(STAMPED)).in_dll(found, _STAMPS)
    except ValueError:  # compiled without
        return None
    return lambda: stamps.append(tuple(ns))


@contextlib.contextmanager
def _two_gradients() -> Iterator[None]:
    """Have torch's backward of a convolution on the CPU compute dX and dW in two calls.

    They are two calls inside, too, with the same results; so each gets a range of its own.
    """
    backward = torch.ops.aten.convolution_backward.default
    kernel = torch._C.DispatchKey.CompositeExplicitAutograd

    def call(*args: Any) -> tuple[Any, Any, Any]:
        *args, (need_x, need_w, need_b) = args
        dx = dw = db = None
        if need_x:
            with Range(f"{MARK}{INPUT}"):
                dx = backward._op_dk(kernel, *args, [True, False, False])[0]
        if need_w or need_b:
            with Range(f"{MARK}{WEIGHT}"):
                _, dw, db = backward._op_dk(kernel, *args, [False, need_w, need_b])
        return dx, dw, db

    registered = torch.library.Library("aten", "IMPL")
    registered.impl("convolution_backward", call, "CPU")
    try:
        yield
    finally:
        registered._destroy()
