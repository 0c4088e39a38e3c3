"""The sparse backward as one opaque operator, for torch.compile.

A compiled graph holds an integer handle instead of the drop rate. The operator looks the handle
up when it runs, so that a rate that changes needs neither a new graph nor a guard.
"""

from __future__ import annotations

import itertools
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .backward import ConvParams, sparse_backward
from .selection import ScoreFn, kept_channels, selectable_channels


class RateSource(Protocol):
    """What a handle stands for."""

    @property
    def drop_rate(self) -> float: ...
    @property
    def score_fn(self) -> ScoreFn: ...


_sources: WeakValueDictionary[int, RateSource] = WeakValueDictionary()
_count = itertools.count()


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


_lib = torch.library.Library("ssprop_patch", "DEF")
_lib.define(
    "conv_backward(Tensor dy, Tensor x, Tensor w, int[] stride, int[] padding, int[] dilation, "
    "int groups, int handle, bool[] mask) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _impl(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    handle: int,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    policy = source(handle)
    params = ConvParams(tuple(stride), tuple(padding), tuple(dilation), groups)
    k = kept_channels(selectable_channels(w.shape[0], groups), policy.drop_rate)
    grads = sparse_backward(dy, x, w, params, k, policy.score_fn, tuple(mask))
    like = (x, w, w.new_empty(0) if grads[2] is None else grads[2])
    return tuple(
        t.new_empty(0) if g is None else _restride(g, t) for g, t in zip(grads, like, strict=True)
    )


def _fake(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    handle: int,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    # An operator cannot return None: what is not needed is an empty tensor.
    dx = torch.empty_like(x) if mask[0] else x.new_empty(0)
    dw = torch.empty_like(w) if mask[1] else w.new_empty(0)
    db = w.new_empty(w.shape[0]) if mask[2] else w.new_empty(0)
    return dx, dw, db


def _restride(grad: Tensor, like: Tensor) -> Tensor:
    """Return ``grad`` with the strides that :func:`_fake` promised the compiler."""
    return grad if grad.stride() == like.stride() else torch.empty_like(like).copy_(grad)


_lib.impl("conv_backward", _impl, "CompositeExplicitAutograd")
torch.library.register_fake("ssprop_patch::conv_backward", _fake, lib=_lib)

conv_backward = torch.ops.ssprop_patch.conv_backward
