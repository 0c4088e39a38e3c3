"""The sparse backward as one opaque operator, for torch.compile.

A compiled graph holds an integer handle instead of the drop rate. The operator looks the handle
up when it runs, so that a rate that changes needs neither a new graph nor a guard.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from . import backward
from .backward import Record
from .kept import ConvParams, Grads
from .selection import ScoreFn, selectable_channels


class RateSource(Protocol):
    """What a handle stands for."""

    def kept(self, channels: int) -> int: ...
    @property
    def score_fn(self) -> ScoreFn: ...
    @property
    def record(self) -> Record | None: ...


# Where this module is reloaded, handles and operators of before stay good: graphs hold them.
_before = dict(globals())
_sources: WeakValueDictionary[int, RateSource] = _before.get("_sources", WeakValueDictionary())
_count = _before.get("_count", itertools.count())


def register(policy: RateSource) -> int:
    """Return a handle to ``policy``; valid in this process, as long as ``policy`` lives."""
    handle = next(_count)
    _sources[handle] = policy
    return handle


def source(handle: int) -> RateSource:
    """Return what ``handle`` stands for.

    Raises:
        RuntimeError: If it is gone: its layers were reverted, or converted again.
    """
    found = _sources.get(handle)
    if found is None:
        raise RuntimeError(
            "a compiled backward ran after its layers were reverted or converted again; run "
            "forward and backward under the same conversion"
        )
    return found


def _new_library() -> torch.library.Library:
    """Return a library with a name of its own: another import of the package may have the first."""
    for number in range(1, 10_000):
        name = "ssprop_patch" if number == 1 else f"ssprop_patch_{number}"
        try:
            return torch.library.Library(name, "DEF")
        except RuntimeError as error:
            if "single TORCH_LIBRARY" not in str(error):
                raise
    raise RuntimeError("ssprop_patch was imported too often in one process")


_libraries: list[torch.library.Library] = _before.get("_libraries", [])
_lib = _new_library()
_libraries.append(_lib)


# - cudagraph_unsafe: a CUDA graph would replay the rate that it was recorded with.
# - needs_fixed_stride_order: Inductor lays convolutions out in channels_last, and the backward
#   takes what it is given. By default it gets copies in the format of eager mode, which cost more
#   than is saved.
# (The first of these tags is not in torch 2.6.)
_TAGS = tuple(
    getattr(torch.Tag, name)
    for name in ("pt2_compliant_tag", "cudagraph_unsafe", "needs_fixed_stride_order")
    if hasattr(torch.Tag, name)
)


def _define(schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an operator and return it."""
    name = schema.partition("(")[0]
    _lib.define(schema, tags=_TAGS)
    _lib.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_lib.ns}::{name}", fake, lib=_lib)
    return getattr(getattr(torch.ops, _lib.ns), name)


def _conv_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
    output_padding: list[int],
    handle: int,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    policy = source(handle)
    params = ConvParams(
        tuple(stride), tuple(padding), tuple(dilation), groups, transposed, tuple(output_padding)
    )
    channels = selectable_channels(params.out_channels(w), groups)
    k = policy.kept(channels)
    _record_forward(policy.record, x, w, dy)
    grads = backward.sparse_backward(
        dy, x, w, params, k, policy.score_fn, tuple(mask), policy.record
    )
    return _promised(grads, x, w)


def _conv_backward_fake(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
    output_padding: list[int],
    handle: int,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _shapes(x, w, dy.shape[1], mask)


def _linear_backward(
    dy: Tensor, x: Tensor, w: Tensor, handle: int, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    policy = source(handle)
    k = policy.kept(w.shape[0])
    _record_forward(policy.record, x, w, dy)
    grads = backward.linear_backward(dy, x, w, k, policy.score_fn, tuple(mask), policy.record)
    dx = x if grads[0] is None else grads[0]  # contiguous, whatever the strides of x
    return _promised(grads, dx, w)


def _linear_backward_fake(
    dy: Tensor, x: Tensor, w: Tensor, handle: int, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return _shapes(x.new_empty(x.shape) if mask[0] else x, w, w.shape[0], mask)


def _record_forward(record: Record | None, x: Tensor, w: Tensor, dy: Tensor) -> None:
    # Of a compiled layer only the backward is seen to run: it had one forward.
    if record is not None:
        record.forward(x, w, dy)


def _shapes(
    x: Tensor, w: Tensor, channels: int, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    # An operator cannot return None: what is not needed is an empty tensor.
    dx = torch.empty_like(x) if mask[0] else x.new_empty(0)
    dw = torch.empty_like(w) if mask[1] else w.new_empty(0)
    db = w.new_empty(channels) if mask[2] else w.new_empty(0)
    return dx, dw, db


def _promised(grads: Grads, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``grads`` with the shapes and strides that :func:`_shapes` tells the compiler."""
    like = (x, w, w.new_empty(0) if grads[2] is None else grads[2])
    return tuple(
        t.new_empty(0) if g is None else _restride(g, t) for g, t in zip(grads, like, strict=True)
    )


def _restride(grad: Tensor, like: Tensor) -> Tensor:
    return grad if grad.stride() == like.stride() else torch.empty_like(like).copy_(grad)


conv_backward = _define(
    "conv_backward(Tensor dy, Tensor x, Tensor w, int[] stride, int[] padding, int[] dilation, "
    "int groups, bool transposed, int[] output_padding, int handle, bool[] mask) "
    "-> (Tensor, Tensor, Tensor)",
    _conv_backward,
    _conv_backward_fake,
)
linear_backward = _define(
    "linear_backward(Tensor dy, Tensor x, Tensor w, int handle, bool[] mask) "
    "-> (Tensor, Tensor, Tensor)",
    _linear_backward,
    _linear_backward_fake,
)
