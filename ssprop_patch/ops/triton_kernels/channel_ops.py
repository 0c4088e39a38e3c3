"""The passes: what is checked, allocated and launched for each."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import (
    accumulation_dtype,
    check_vectors,
    checked_layout,
    empty_of_channels,
    lying_like,
    tiling_of,
)

# Elements of a tile: a sum of each stays in registers, or three.
_SUMS_TILE, _NORM_SUMS_TILE, _COPY_TILE = 4096, 2048, 2048
# Programs on each multiprocessor. Each of a reduction adds a row to the buffer of partial sums; of
# the others more even out the end.
_SUMS_PROGRAMS, _COPY_PROGRAMS = 8, 16


def channel_sums(dy: Tensor, order: int) -> Tensor:
    """Return the sum of ``|dy|`` (order 1) or ``dy * dy`` (order 2) of each channel.

    Args:
        dy: (N, C, *spatial), or (rows, C).
        order: 1 or 2.

    Returns:
        (C,), float32, or float64 for float64.

    Raises:
        ValueError: If ``order`` is another number, or ``dy`` of another dtype or layout.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 (sum of |dy|) or 2 (sum of dy * dy), got {order!r}")
    layout = checked_layout(dy, "dy")
    if dy.numel() == 0:
        return dy.new_zeros(layout.channels, dtype=accumulation_dtype(dy))
    tiling = tiling_of(layout, layout.channels, _SUMS_TILE)
    splits = tiling.splits(dy.device, _SUMS_PROGRAMS)
    partial = dy.new_empty((splits, layout.channels), dtype=accumulation_dtype(dy))
    from . import kernels

    with torch.cuda.device_of(dy):
        kernels.channel_sums[tiling.blocks_c, splits](
            dy,
            partial,
            layout.channels,
            layout.positions,
            tiling.blocks_s,
            tiling.tiles,
            ORDER=order,
            **tiling.constants,
        )
        return partial.sum(0)


def take_channels(t: Tensor, index: Tensor) -> Tensor:
    """Return ``t[:, index]`` in ``t``'s own memory format.

    Args:
        t: (N, C, *spatial), or (rows, C).
        index: (k,), integers in [0, C) in any order, on ``t``'s device; not checked, since that
            would wait for the device.

    Raises:
        ValueError: If ``t`` is of another dtype or layout.
    """
    layout = checked_layout(t, "t")
    out = empty_of_channels(t, index.numel())
    if out.numel() == 0:
        return out
    tiling = tiling_of(layout, index.numel(), _COPY_TILE)
    from . import kernels

    with torch.cuda.device_of(t):
        kernels.take_channels[tiling.blocks_c, tiling.splits(t.device, _COPY_PROGRAMS)](
            t,
            index.contiguous(),
            out,
            layout.channels,
            index.numel(),
            layout.positions,
            tiling.blocks_s,
            tiling.tiles,
            **tiling.constants,
        )
    return out


def norm_sums(
    dz: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, relu_out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of dz, dz * xhat and dz * dz of each channel, ``xhat = (y - mean) * invstd``.

    The first two are the gradients of a batch norm's bias and weight; with the third, the squares
    of its input's gradient follow in closed form.

    Args:
        dz: Gradient of the norm's output, (N, C, *spatial) or (rows, C); of the output of the ReLU
            after it if ``relu_out`` is given. Copied first if it lies otherwise than ``y``.
        y: Input of the norm, of the same shape.
        mean: Of the batch, (C,).
        invstd: 1 / standard deviation of the batch, (C,).
        relu_out: Output of the ReLU, of the same shape; where it is <= 0, ``dz`` counts as 0.

    Returns:
        Three of shape (C,), float32, or float64 for float64.

    Raises:
        ValueError: If ``y`` is of another dtype or layout, or the shapes do not fit.
    """
    layout = checked_layout(y, "y")
    dz, relu_out = lying_like(dz, y, "dz"), lying_like(relu_out, y, "relu_out")
    check_vectors(layout.channels, mean=mean, invstd=invstd)
    dtype = accumulation_dtype(dz, y)
    if y.numel() == 0:
        dz_sum, dz_xhat_sum, dz2_sum = y.new_zeros((3, layout.channels), dtype=dtype).unbind()
        return dz_sum, dz_xhat_sum, dz2_sum
    tiling = tiling_of(layout, layout.channels, _NORM_SUMS_TILE)
    splits = tiling.splits(y.device, _SUMS_PROGRAMS)
    partial = y.new_empty((3, splits, layout.channels), dtype=dtype)
    from . import kernels

    with torch.cuda.device_of(y):
        kernels.norm_sums[tiling.blocks_c, splits](
            dz,
            relu_out,
            y,
            mean.contiguous(),
            invstd.contiguous(),
            partial,
            layout.channels,
            layout.positions,
            tiling.blocks_s,
            tiling.tiles,
            **tiling.constants,
        )
        dz_sum, dz_xhat_sum, dz2_sum = partial.sum(1).unbind()
    return dz_sum, dz_xhat_sum, dz2_sum


def norm_grad_sums(
    dz: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    relu_out: Tensor | None = None,
) -> Tensor:
    """Return the sum of ``|dy|`` of each channel, dy that of :func:`norm_input_grad` of weight 1.

    Args:
        dz, y, mean, invstd, relu_out: As for :func:`norm_sums`.
        sum_dz, sum_dz_xhat: (C,), from :func:`norm_sums`.

    Returns:
        (C,), float32, or float64 for float64.

    Raises:
        ValueError: If ``y`` is of another dtype or layout, or the shapes do not fit.
    """
    layout = checked_layout(y, "y")
    dz, relu_out = lying_like(dz, y, "dz"), lying_like(relu_out, y, "relu_out")
    vectors = {"mean": mean, "invstd": invstd, "sum_dz": sum_dz, "sum_dz_xhat": sum_dz_xhat}
    check_vectors(layout.channels, **vectors)
    dtype = accumulation_dtype(dz, y)
    if y.numel() == 0:
        return y.new_zeros(layout.channels, dtype=dtype)
    tiling = tiling_of(layout, layout.channels, _NORM_SUMS_TILE)
    splits = tiling.splits(y.device, _SUMS_PROGRAMS)
    partial = y.new_empty((splits, layout.channels), dtype=dtype)
    from . import kernels

    with torch.cuda.device_of(y):
        kernels.norm_grad_sums[tiling.blocks_c, splits](
            dz,
            relu_out,
            y,
            *(v.contiguous() for v in vectors.values()),
            partial,
            layout.channels,
            layout.positions,
            tiling.blocks_s,
            tiling.tiles,
            layout.batches * layout.positions,
            **tiling.constants,
        )
        return partial.sum(0)


def norm_input_grad(
    dz: Tensor,
    y: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    index: Tensor,
    relu_out: Tensor | None = None,
) -> Tensor:
    """Return the gradient of a training batch norm's input, of the channels ``index`` only.

    ``dy = weight * invstd * (dz - sum_dz / n - xhat * sum_dz_xhat / n)`` for n positions a channel.

    Args:
        dz, y, mean, invstd, relu_out: As for :func:`norm_sums`.
        weight: Of the norm, (C,); None counts as ones.
        sum_dz, sum_dz_xhat: (C,), from :func:`norm_sums`.
        index: As for :func:`take_channels`.

    Returns:
        (N, k, *spatial) or (rows, k), in ``y``'s dtype and memory format.

    Raises:
        ValueError: If ``y`` is of another dtype or layout, or the shapes do not fit.
    """
    layout = checked_layout(y, "y")
    dz, relu_out = lying_like(dz, y, "dz"), lying_like(relu_out, y, "relu_out")
    vectors = {"mean": mean, "invstd": invstd, "sum_dz": sum_dz, "sum_dz_xhat": sum_dz_xhat}
    check_vectors(layout.channels, weight=weight, **vectors)
    out = empty_of_channels(y, index.numel())
    if out.numel() == 0:
        return out
    tiling = tiling_of(layout, index.numel(), _COPY_TILE)
    from . import kernels

    with torch.cuda.device_of(y):
        kernels.norm_input_grad[tiling.blocks_c, tiling.splits(y.device, _COPY_PROGRAMS)](
            dz,
            relu_out,
            y,
            None if weight is None else weight.contiguous(),
            *(v.contiguous() for v in vectors.values()),
            index.contiguous(),
            out,
            layout.channels,
            index.numel(),
            layout.positions,
            tiling.blocks_s,
            tiling.tiles,
            layout.batches * layout.positions,
            DOUBLE=accumulation_dtype(dz, y) == torch.float64,
            **tiling.constants,
        )
    return out
