"""Convolutions with a sparse backward, for people who write their own layers.

The forward is exactly ``torch.nn.functional.conv*d``. In the backward only the output channels
with the largest gradient are propagated (ssProp, arXiv 2408.12561, section 3).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._validate import check_drop_rate
from .backward import ConvParams, sparse_backward
from .opaque import conv_backward as opaque_backward
from .selection import (
    ScoreFn,
    Selection,
    kept_channels,
    resolve_selection,
    selectable_channels,
)

__all__ = ["conv1d", "conv2d", "conv3d"]

Size = int | Sequence[int]


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    drop_rate: float = 0.0,
    selection: Selection = "l1",
) -> Tensor:
    """:func:`torch.nn.functional.conv1d` with a sparse backward; see :func:`conv2d`.

    Args:
        input: Shape (N, C_in, L) or (C_in, L).
        weight: Shape (C_out, C_in / groups, kernel).
    """
    return _conv(1, input, weight, bias, stride, padding, dilation, groups, drop_rate, selection)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    drop_rate: float = 0.0,
    selection: Selection = "l1",
) -> Tensor:
    """:func:`torch.nn.functional.conv2d` with a sparse backward.

    Args:
        input: Shape (N, C_in, H, W) or (C_in, H, W).
        weight: Shape (C_out, C_in / groups, kernel_h, kernel_w).
        bias: Shape (C_out,) or None.
        stride: As in :func:`torch.nn.functional.conv2d`.
        padding: As there: numbers, ``"same"`` or ``"valid"``.
        dilation: As there.
        groups: As there. With 1 < groups < C_out the same number of channels is kept in each
            group; with groups == C_out (depthwise) whole groups are kept.
        drop_rate: Fraction of the output channels whose gradient is dropped, in [0, 1). At 0 this
            *is* :func:`torch.nn.functional.conv2d`.
        selection: ``"l1"`` (the paper: mean of ``|dy|``), ``"l2"``, ``"random"`` (torch's default
            generator), or a callable that takes dy, shape (N, C_out, *spatial), and returns one
            score per channel, shape (C_out,).

    Returns:
        The output, bit-identical to :func:`torch.nn.functional.conv2d`.

    Raises:
        TypeError: If ``drop_rate`` is not a number, or the tensors are complex.
        ValueError: If ``drop_rate`` is outside [0, 1), or ``selection`` is unknown.
    """
    return _conv(2, input, weight, bias, stride, padding, dilation, groups, drop_rate, selection)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    drop_rate: float = 0.0,
    selection: Selection = "l1",
) -> Tensor:
    """:func:`torch.nn.functional.conv3d` with a sparse backward; see :func:`conv2d`.

    Args:
        input: Shape (N, C_in, D, H, W) or (C_in, D, H, W).
        weight: Shape (C_out, C_in / groups, kernel_d, kernel_h, kernel_w).
    """
    return _conv(3, input, weight, bias, stride, padding, dilation, groups, drop_rate, selection)


DENSE_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _conv(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: str | Size,
    dilation: Size,
    groups: int,
    drop_rate: float,
    selection: Selection,
) -> Tensor:
    rate = check_drop_rate(drop_rate)
    score_fn = resolve_selection(selection)
    dense = DENSE_CONV[dims]
    if weight.dim() != dims + 2 or groups < 1:  # it says what is wrong
        return dense(input, weight, bias, stride, padding, dilation, groups)
    channels = selectable_channels(weight.shape[0], groups)
    k = kept_channels(channels, rate)
    if k == channels or not needs_backward(input, weight, bias):
        return dense(input, weight, bias, stride, padding, dilation, groups)
    return sparse_conv(
        dims, input, weight, bias, stride, padding, dilation, groups, k=k, score_fn=score_fn
    )


def needs_backward(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd will ask this convolution for any gradient."""
    return torch.is_grad_enabled() and (
        input.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    )


def sparse_conv(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    k: int = 0,
    score_fn: ScoreFn | None = None,
    handle: int | None = None,
) -> Tensor:
    """Convolve; in the backward keep ``k`` channels, or what ``handle`` says when it runs.

    Args:
        dims: Spatial dimensions, 1 to 3.
        k: Channels to keep of each choice.
        score_fn: Scores the channels.
        handle: Instead of ``k`` and ``score_fn``: a registered source of both, see
            :mod:`ssprop_patch.opaque`. For torch.compile, which would make one graph per ``k``.

    Raises:
        TypeError: If the tensors are complex.
        RuntimeError: Inside a torch.func transform.
    """
    if weight.dtype.is_complex:
        raise TypeError(
            f"the sparse backward takes real tensors, got {weight.dtype}; use drop_rate=0, or "
            "exclude the layer"
        )
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "the sparse backward does not work inside torch.func transforms (grad, vmap, jvp, "
            "...): wrap the call in ssprop_patch.dense(model), use model.eval(), or drop_rate=0"
        )
    device_type = input.device.type
    if _is_autocasting(device_type):
        # Cast what autocast would, but outside the Function, so that autograd casts back.
        dtype = torch.get_autocast_dtype(device_type)
        input, weight = _cast(input, dtype, device_type), _cast(weight, dtype, device_type)
        bias = None if bias is None else _cast(bias, dtype, device_type)
    unbatched = input.dim() == dims + 1
    if unbatched:
        input = input.unsqueeze(0)
    stride, dilation = _ntuple(stride, dims), _ntuple(dilation, dims)
    if isinstance(padding, str):
        input, padding = _resolve_padding(padding, input, weight, stride, dilation)
    params = ConvParams(stride, _ntuple(padding, dims), dilation, groups)
    if handle is None:
        out = _SparseConv.apply(input, weight, bias, params, k, score_fn)
    else:
        out = _OpaqueSparseConv.apply(input, weight, bias, *params, handle)
    return out.squeeze(0) if unbatched else out


def _is_autocasting(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # meta: an error


def _cast(t: Tensor, dtype: torch.dtype, device_type: str) -> Tensor:
    eligible = t.is_floating_point() and t.dtype != torch.float64 and t.device.type == device_type
    return t.to(dtype) if eligible else t


def _ntuple(value: Size, n: int) -> tuple[int, ...]:
    if isinstance(value, (tuple, list)):
        return tuple(value) if len(value) == n else tuple(value) * n
    return (operator.index(value),) * n


def _resolve_padding(
    padding: str, input: Tensor, weight: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """Return input and padding numbers that do what torch's padding string does."""
    if padding == "valid":
        return input, (0,) * len(stride)
    if padding != "same":
        raise ValueError(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
    if any(s != 1 for s in stride):
        raise ValueError("padding='same' is not supported for strided convolutions")
    total = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    if any(n % 2 for n in total):  # torch puts the odd one behind
        input = F.pad(input, [n for odd in reversed(total) for n in (0, odd % 2)])
    return input, tuple(n // 2 for n in total)


def _convolution(x: Tensor, w: Tensor, b: Tensor | None, p: ConvParams) -> Tensor:
    zeros = (0,) * len(p.stride)
    return torch.convolution(x, w, b, p.stride, p.padding, p.dilation, False, zeros, p.groups)


class _SparseConv(torch.autograd.Function):
    """The rate is fixed in the forward, so that no later change tears one layer's pass apart."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        params: ConvParams,
        k: int,
        score_fn: ScoreFn,
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.config = params, k, score_fn
        return _convolution(x, w, b, params)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        params, k, score_fn = ctx.config
        mask = tuple(ctx.needs_input_grad[:3])
        if _is_autocasting(dy.device.type):  # the dense backward ignores autocast too
            with torch.autocast(dy.device.type, enabled=False):
                grads = sparse_backward(dy, x, w, params, k, score_fn, mask)
        else:
            grads = sparse_backward(dy, x, w, params, k, score_fn, mask)
        return *grads, None, None, None


class _OpaqueSparseConv(torch.autograd.Function):
    """For torch.compile: an opaque operator asks for the rate when the backward runs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        handle: int,
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.config = stride, padding, dilation, groups, handle
        return _convolution(x, w, b, ConvParams(stride, padding, dilation, groups))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        dx, dw, db = opaque_backward(dy, x, w, *ctx.config, [need_x, need_w, need_b])
        return (
            dx if need_x else None,
            dw if need_w else None,
            db if need_b else None,
            None, None, None, None, None,
        )  # fmt: skip
