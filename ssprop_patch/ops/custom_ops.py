"""The sparse backward as one custom operator, for torch.compile.

The rate and the layer's settings reach it in two tensors, see
:mod:`ssprop_patch.schedule.settings`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.geometry import ConvParams
from ..core.operations import Grads
from ..core.selection import selectable_channels
from ..schedule.call_observer import CallObserver
from ..schedule.settings import settings_of
from . import backward
from .projection import output_basis


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


# Where this module is reloaded, operators of before stay good: graphs hold them.
_libraries: list[torch.library.Library] = globals().get("_libraries", [])
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
    rate: Tensor,
    token: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    settings = settings_of(token)
    params = ConvParams(
        tuple(stride), tuple(padding), tuple(dilation), groups, transposed, tuple(output_padding)
    )
    channels = selectable_channels(params.out_channels(w), groups)
    k = settings.kept(channels, float(rate))
    _observe_forward(settings.observer, x, w, dy)
    need_x, need_w, need_b = output_mask
    needed = (need_x, need_w, need_b)
    grads = backward.sparse_backward(dy, x, w, params, k, settings.rule, needed, settings.observer)
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
    rate: Tensor,
    token: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _shapes(x, w, dy.shape[1], output_mask)


def _linear_backward(
    dy: Tensor, x: Tensor, w: Tensor, rate: Tensor, token: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    settings = settings_of(token)
    k = settings.kept(w.shape[0], float(rate))
    _observe_forward(settings.observer, x, w, dy)
    need_x, need_w, need_b = output_mask
    needed = (need_x, need_w, need_b)
    grads = backward.linear_backward(dy, x, w, k, settings.rule, needed, settings.observer)
    dx = x if grads[0] is None else grads[0]  # contiguous, whatever the strides of x
    return _promised(grads, dx, w)


def _linear_backward_fake(
    dy: Tensor, x: Tensor, w: Tensor, rate: Tensor, token: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return _shapes(x.new_empty(x.shape) if output_mask[0] else x, w, w.shape[0], output_mask)


def _directions(dy: Tensor, token: Tensor, groups: int, k: int) -> Tensor:
    basis, _ = output_basis(dy, groups, k, settings_of(token).rule)
    # A copy, as the compiler may write into what it is given.
    return basis.clone(memory_format=torch.contiguous_format)


def _directions_fake(dy: Tensor, token: Tensor, groups: int, k: int) -> Tensor:
    dtype = torch.promote_types(dy.dtype, torch.float32)
    return dy.new_empty(groups, dy.shape[1] // groups, k, dtype=dtype)


def _observe_forward(observer: CallObserver | None, x: Tensor, w: Tensor, dy: Tensor) -> None:
    # Of a compiled layer only the backward is seen to run: it had one forward.
    if observer is not None:
        observer.forward(x, w, dy)


def _shapes(
    x: Tensor, w: Tensor, channels: int, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    # An operator cannot return None: what is not needed is an empty tensor.
    dx = torch.empty_like(x) if output_mask[0] else x.new_empty(0)
    dw = torch.empty_like(w) if output_mask[1] else w.new_empty(0)
    db = w.new_empty(channels) if output_mask[2] else w.new_empty(0)
    return dx, dw, db


def _promised(grads: Grads, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``grads`` with the shapes and strides that :func:`_shapes` tells the compiler."""
    like = (x, w, w.new_empty(0) if grads[2] is None else grads[2])
    dx, dw, db = (
        t.new_empty(0) if g is None else _restride(g, t) for g, t in zip(grads, like, strict=True)
    )
    return dx, dw, db


def _restride(grad: Tensor, like: Tensor) -> Tensor:
    return grad if grad.stride() == like.stride() else torch.empty_like(like).copy_(grad)


conv_backward = _define(
    "conv_backward(Tensor dy, Tensor x, Tensor w, int[] stride, int[] padding, int[] dilation, "
    "int groups, bool transposed, int[] output_padding, Tensor rate, Tensor token, "
    "bool[] output_mask) -> (Tensor, Tensor, Tensor)",
    _conv_backward,
    _conv_backward_fake,
)
directions = _define(
    "directions(Tensor dy, Tensor token, int groups, int k) -> Tensor",
    _directions,
    _directions_fake,
)
linear_backward = _define(
    "linear_backward(Tensor dy, Tensor x, Tensor w, Tensor rate, Tensor token, bool[] output_mask) "
    "-> (Tensor, Tensor, Tensor)",
    _linear_backward,
    _linear_backward_fake,
)
