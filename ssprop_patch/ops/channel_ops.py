"""The passes over memory that a sparse backward needs besides its matrix products.

Sums over each channel, a gather of channels, and batch norm's input gradient for some channels.
They do no arithmetic to speak of: what counts is how often memory is read and written. On a CPU C
functions do them where there is a compiler (:mod:`ssprop_patch.ops.native`); on CUDA, where the
environment variable ``SSPROP_PATCH_TRITON`` is 1, Triton kernels. Those are asked for, not the
default, until they have been timed on a GPU. All else is done by torch's own operations.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import selection
from ..core.cells import Cells
from . import native
from .native.cells import can_describe

aten = torch.ops.aten

_TRITON = os.environ.get("SSPROP_PATCH_TRITON") == "1"

# Elements that a temporary of a sum may have on the CPU: it then stays in the cache, and its
# memory is used again instead of being mapped anew. Timed from 2**16 to 2**19 and unlimited.
_CHUNK = 2**19

# Of fewer elements zeros and a copy take less time than what stands around a C function.
_LARGE_WEIGHT = 2**16


def channel_sum(t: Tensor, order: int) -> Tensor:
    """Return the sum of ``|t|`` (``order`` 1) or of ``t ** 2`` (2) over each channel.

    Args:
        t: (N, C, *spatial).
        order: 1 or 2.

    Returns:
        (C,), in float32 where ``t`` is in half precision, which would tie channels that differ
        (8 bits in bfloat16) and overflow (float16).
    """
    kernels = _kernels(t)
    if kernels is not None:
        return kernels.channel_sums(t, order)
    dims = [0, *range(2, t.dim())]
    dtype = torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else t.dtype
    if not _sum_in_parts(t):
        norm = torch.linalg.vector_norm(t, order, dims, dtype=dtype)
        return norm if order == 1 else norm.square()
    if order == 2 and t.dim() > 2 and t.is_contiguous() and t.dtype == torch.float32:
        # The norm of contiguous rows is vectorised: a quarter of the time of what is below.
        return torch.linalg.vector_norm(t.flatten(2), 2, 2).square_().sum(0)
    return _chunked_sum(t, torch.abs if order == 1 else torch.square, dtype, dims)


def _sum_in_parts(t: Tensor) -> bool:
    # A traced sum (torch.compile) is one fused loop: no parts, no Python loop over the batch.
    return not torch.compiler.is_compiling() and t.is_cpu


def _chunked_sum(
    t: Tensor, power: Callable[[Tensor], Tensor], dtype: torch.dtype, dims: list[int]
) -> Tensor:
    # Two vectorised operations on one part of the batch after the other take half to a sixth of
    # the time of the one pass of torch.linalg.vector_norm.
    if t.numel() <= _CHUNK:
        return _sum_of_part(t, power, dtype, dims)
    samples = max(1, _CHUNK // t[:1].numel())
    first, *others = t.split(samples)
    total = _sum_of_part(first, power, dtype, dims)
    for part in others:
        total = total.add_(_sum_of_part(part, power, dtype, dims))
    return total


def _sum_of_part(
    t: Tensor, power: Callable[[Tensor], Tensor], dtype: torch.dtype, dims: list[int]
) -> Tensor:
    t = power(t if t.dtype == dtype else t.to(dtype))
    if t.dim() > 2 and t.numel() > t.shape[0] * t.shape[1] and t.is_contiguous():
        return t.flatten(2).sum(2).sum(0)  # along the rows first, which is the fastest order there
    return t.sum(dims)


def topk_indices(scores: Tensor, k: int, choices: int) -> Tensor:
    """As :func:`ssprop_patch.core.selection.topk_indices`."""
    if are_for_c(scores):
        return native.topk_indices(scores, k, choices)
    return selection.topk_indices(scores, k, choices)


def topk_channels(t: Tensor, order: int, k: int, groups: int) -> Tensor | None:
    """Return :func:`topk_indices` of :func:`channel_sum` in one call; None where there is none."""
    return native.topk_channels(t, order, k, groups) if is_done_by_c(t) else None


def take_channels(t: Tensor, index: Tensor) -> Tensor:
    """Return ``t[:, index]`` in ``t``'s own memory format.

    Along channels that lie side by side ``gather`` on the (positions, channels) view is several
    times faster than ``index_select``.
    """
    kernels = _kernels(t)
    if kernels is not None:
        return kernels.take_channels(t, index)
    # A traced gather is one loop in any format, for which a trace should not ask.
    if torch.compiler.is_compiling() or (t.dim() > 2 and not is_channels_last(t)):
        return t.index_select(1, index)
    last = t.movedim(1, -1)
    rows = last.reshape(-1, t.shape[1])
    kept = rows.gather(1, index.expand(rows.shape[0], -1))
    return kept.view(*last.shape[:-1], index.shape[0]).movedim(-1, 1)


def put_channels(t: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Return zeros of the shape and format of ``like``, with ``t`` in the channels ``index``."""
    out = torch.zeros_like(like)
    if torch.compiler.is_compiling() or not is_channels_last(like):
        return out.index_copy_(1, index, t)
    # As above: half the time of index_copy_.
    rows = t.movedim(1, -1).reshape(-1, t.shape[1])
    out.movedim(1, -1).view(-1, like.shape[1]).scatter_(1, index.expand(rows.shape[0], -1), rows)
    return out


def put_rows(rows: Tensor, index: Tensor, like: Tensor, dim: int = 0) -> Tensor:
    """Return zeros like ``like``, with ``rows`` in the places ``index``, ascending, of ``dim``."""
    large = dim == 0 and like.numel() >= _LARGE_WEIGHT
    if large and are_for_c(rows, like):
        out = native.put_rows(rows, index, like)
        if out is not None:
            return out
    return torch.zeros_like(like).index_copy_(dim, index, rows)


def put_sums(parts: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """As :func:`put_rows`, of the sum of ``parts``, (N, k, *), over dim 0."""
    alike = parts.dtype is like.dtype and parts.shape[2:] == like.shape[1:]
    if alike and parts.is_contiguous() and like.is_contiguous() and are_for_c(parts, like):
        return native.put_sums(parts, index, like)
    return put_rows(parts.sum(0), index, like)


def is_channels_last(t: Tensor) -> bool:
    """Whether the channels of ``t`` lie side by side, and those of a contiguous tensor do not."""
    return t.dim() > 2 and not t.is_contiguous() and t.movedim(1, -1).is_contiguous()


class NormSums(NamedTuple):
    """Sums over batch and space of batch norm's backward, each (C,).

    Attributes:
        dz: Of the gradient of the norm's output: the gradient of its bias.
        dz_xhat: Of that times the normalised input: the gradient of the weight.
        dz2: Of dz squared; None where that takes a pass of its own.
        dy: Of ``|dy| ** order``, with dy the gradient of the norm's input; None where it follows
            from the others.
        cells: Of dy over the cells of its maps, (N, C, *number); None where nobody asked for them.
    """

    dz: Tensor
    dz_xhat: Tensor
    dz2: Tensor | None = None
    dy: Tensor | None = None
    cells: Tensor | None = None


def may_split_norm(device_type: str, order: int) -> bool:
    """Whether :func:`can_split_norm` may hold for tensors on a device, before there are any."""
    return may_split_relu(device_type) or (device_type == "cpu" and order == 2)


def can_split_norm(t: Tensor, order: int) -> bool:
    """Whether batch norm's backward may be done in the passes below.

    With torch's own operations only on the CPU and for the sum of squares: on CUDA they would read
    more, not less, and the sum of ``|dy|`` does not follow from sums of dz.
    """
    return can_split_relu(t) or (t.is_cpu and order == 2)


def may_split_relu(device_type: str) -> bool:
    """Whether :func:`can_split_relu` may hold for tensors on a device, before there are any."""
    if device_type == "cpu":
        return native.may_be_available()
    return device_type == "cuda" and _TRITON and _triton_kernels() is not None


def can_split_relu(t: Tensor) -> bool:
    """Whether these passes can do the backward of a ReLU after the norm in the same passes.

    With torch's own operations that would be one more pass over memory in each of the two.
    """
    return _kernels(t) is not None


def can_sum_cells(t: Tensor, cells: Cells) -> bool:
    """Whether :func:`norm_sums` can return the sums over cells of tensors such as ``t``."""
    return not any(cells.start) and is_done_by_c(t) and can_describe(t, cells)


def norm_sums(
    dz: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    order: int,
    relu_out: Tensor | None = None,
    cells: Cells | None = None,
) -> NormSums:
    """Return what batch norm's backward in training mode needs to know of the whole batch.

    Args:
        dz: Gradient of the norm's output, (N, C, *spatial); of the output of the ReLU after it if
            ``relu_out`` is given.
        x: The norm's input, of the same shape.
        weight: (C,), or None.
        mean, invstd: Of the batch, (C,).
        order: Of the sum of dy.
        relu_out: Output of the ReLU, see :func:`can_split_relu`.
        cells: Cells of dy's maps whose sums are needed, too; see :func:`can_sum_cells`.
    """
    kernels = _kernels(x)
    if cells is not None:
        args = dz, x, weight, mean, invstd, order, relu_out, cells
        (dz, dz_xhat, dy), of_cells = native.norm_sums_and_cells(*args)
        return NormSums(dz, dz_xhat, dy=dy, cells=of_cells)
    if kernels is native:
        dz, dz_xhat, dy = native.norm_sums(dz, x, weight, mean, invstd, order, relu_out)
        return NormSums(dz, dz_xhat, dy=dy)
    if kernels is not None and kernels.is_available(dz):
        sums = NormSums(*kernels.norm_sums(dz, x, mean, invstd, relu_out))
        if order == 2:
            return sums
        dy = kernels.norm_grad_sums(dz, x, mean, invstd, sums.dz, sums.dz_xhat, relu_out)
        return sums._replace(dy=dy if weight is None else dy * weight.abs())
    dz = relu_backward(dz, relu_out)
    _, dz_xhat, dz = aten.native_batch_norm_backward(
        dz, x, None, None, None, mean, invstd, True, 0.0, [False, True, True]
    )
    return NormSums(dz, dz_xhat)


def norm_input_grad(
    dz: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    index: Tensor,
    relu_out: Tensor | None = None,
) -> Tensor:
    """Return the gradient of batch norm's input, in training mode, of the channels ``index``.

    Args:
        dz, x, mean, invstd, relu_out: As for :func:`norm_sums`.
        weight: (C,), or None.
        sum_dz, sum_dz_xhat: Of :class:`NormSums`.
        index: (k,), the channels.

    Returns:
        (N, k, *spatial), of ``x``'s dtype and memory format.
    """
    kernels = _kernels(x)
    if kernels is native or (kernels is not None and kernels.is_available(dz)):
        sums = (sum_dz, sum_dz_xhat)
        return kernels.norm_input_grad(dz, x, weight, mean, invstd, *sums, index, relu_out)
    dz = relu_backward(dz, relu_out)
    # Not torch's own kernel on the chosen channels, which would sum over them once more; in
    # channels_last it takes longer for some channels than for all of them.
    n = dz.numel() // dz.shape[1]
    shape = (-1, *[1] * (x.dim() - 2))
    invstd = invstd[index]
    scale = invstd if weight is None else weight[index] * invstd
    xhat_scale = scale * invstd * sum_dz_xhat[index] / n
    dy, xhat = (take_channels(t, index).to(mean.dtype) for t in (dz, x))
    xhat.sub_(mean[index].view(shape)).mul_(xhat_scale.view(shape))
    dy.sub_((sum_dz[index] / n).view(shape)).mul_(scale.view(shape)).sub_(xhat)
    return dy.to(x.dtype)


def relu_backward(dz: Tensor, relu_out: Tensor | None) -> Tensor:
    """Return the gradient of a ReLU's input; ``dz`` where there is no ReLU."""
    return dz if relu_out is None else aten.threshold_backward(dz, relu_out, 0)


def are_for_c(*tensors: Tensor) -> bool:
    """Whether the functions of :mod:`ssprop_patch.ops.native` can take all of them."""
    return not torch.compiler.is_compiling() and all(map(native.is_available, tensors))


def is_done_by_c(t: Tensor) -> bool:
    """Whether the passes over ``t`` are done by C functions."""
    return _kernels(t) is native


def _kernels(t: Tensor) -> ModuleType | None:
    """Return the module of kernels that can take ``t``, if there is one."""
    if torch.compiler.is_compiling():
        return None
    if t.is_cpu:
        return native if native.is_available(t) else None
    if not t.is_cuda or not _TRITON:
        return None
    kernels = _triton_kernels()
    return kernels if kernels is not None and kernels.is_available(t) else None


@functools.cache
def _triton_kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from . import triton_kernels  # a second of import, only where there is a GPU

    return triton_kernels
