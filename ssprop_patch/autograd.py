"""The autograd functions: a forward that is torch's own, and a sparse backward.

In eager mode the backward is plain Python; under torch.compile it is an opaque operator.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import lazy_grad, opaque
from .backward import Record, linear_backward, sparse_backward
from .kept import ConvParams
from .operations import (
    CONVOLUTIONS,
    LINEAR,
    TRANSPOSED_CONVOLUTIONS,
    Geometry,
    Operation,
    Size,
)
from .selection import ScoreFn

# Small layers spend more time in these lines of Python than in their kernels.
_are_transforms_active = torch._C._are_functorch_transforms_active
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def needs_backward(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd will ask this layer for any gradient."""
    return torch.is_grad_enabled() and (
        input.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    )


def in_transform(*tensors: Tensor | None) -> bool:
    """Whether torch.func or forward-mode AD is at work, which this kind of function knows not."""
    if _are_transforms_active():
        return True
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def is_batched(t: Tensor) -> bool:
    """Whether ``t`` stands for several gradients: ``is_grads_batched``, ``torch.func.vmap``."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t)


NO_TRANSFORMS = (
    "the sparse backward does not work inside torch.func transforms (grad, vmap, jvp, ...), in "
    "forward-mode AD or under is_grads_batched: wrap the call in ssprop_patch.dense(model), use "
    "model.eval(), or drop_rate=0"
)


def sparse(
    operation: Operation,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    *,
    k: int = 0,
    score_fn: ScoreFn | None = None,
    record: Record | None = None,
    compiled: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Run ``operation``; in the backward keep ``k`` channels, or what ``compiled`` says.

    Args:
        k: Channels to keep of each choice.
        score_fn: Scores the channels.
        record: Is told of this call.
        compiled: Instead of these three: rate and token, see :mod:`ssprop_patch.opaque`. For
            torch.compile, which would make one graph per ``k``.

    Raises:
        TypeError: If the tensors are complex.
        RuntimeError: Inside a torch.func transform.
    """
    if weight.is_complex():
        raise TypeError(
            f"the sparse backward takes real tensors, got {weight.dtype}; use drop_rate=0, or "
            "exclude the layer"
        )
    if in_transform(input, weight, bias):
        raise RuntimeError(NO_TRANSFORMS)
    if _is_autocasting(input):
        device_type = input.device.type
        # Cast what autocast would, but outside the Function, so that autograd casts back.
        dtype = torch.get_autocast_dtype(device_type)
        input, weight = _cast(input, dtype, device_type), _cast(weight, dtype, device_type)
        bias = None if bias is None else _cast(bias, dtype, device_type)
    if operation.dims == 0:
        if compiled is None:
            return _SparseLinear.apply(input, weight, bias, k, score_fn, record)
        return _OpaqueSparseLinear.apply(input, weight, bias, *compiled)
    return _convolve(operation, input, weight, bias, geometry, k, score_fn, record, compiled)


# First, as ``device.type`` takes longer than all else that is asked of a tensor in a forward.
_is_autocasting_anywhere = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def _is_autocasting(t: Tensor) -> bool:
    if not _is_autocasting_anywhere():
        return False
    if not torch.compiler.is_compiling() and t.is_meta:  # of which it is an error to ask
        return False
    return torch.is_autocast_enabled(t.device.type)


def _cast(t: Tensor, dtype: torch.dtype, device_type: str) -> Tensor:
    eligible = t.is_floating_point() and t.dtype != torch.float64 and t.device.type == device_type
    return t.to(dtype) if eligible else t


def _convolve(
    operation: Operation,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    k: int,
    score_fn: ScoreFn | None,
    record: Record | None,
    compiled: tuple[Tensor, Tensor] | None,
) -> Tensor:
    dims = operation.dims
    unbatched = input.dim() == dims + 1
    if unbatched:
        input = input.unsqueeze(0)
    if isinstance(geometry.padding, str):
        stride, dilation = _ntuple(geometry.stride, dims), _ntuple(geometry.dilation, dims)
        input, padding = _resolve_padding(geometry.padding, input, weight, stride, dilation)
        # Not _replace, which torch.compile of torch 2.6 does not trace.
        geometry = Geometry(stride, padding, dilation, geometry.groups)
    if torch.compiler.is_compiling():  # which cannot look into a cache
        params, apply = _params(geometry, dims, operation.transposed), _apply
    else:
        params = _params_of(geometry, dims, operation.transposed)
        plain = type(input) is Tensor and not (_is_wrapped(input) or _is_wrapped(weight))
        apply = _apply_plain if plain else _apply
    if compiled is None:
        out = apply(input, weight, bias, params, k, score_fn, record)
    else:
        out = _OpaqueSparseConv.apply(input, weight, bias, *params, *compiled)
    return out.squeeze(0) if unbatched else out


def _params_of(geometry: Geometry, dims: int, transposed: bool) -> ConvParams:
    try:
        return _known_params(geometry, dims, transposed)
    except TypeError:  # lists, which have no hash
        return _params(geometry, dims, transposed)


def _params(geometry: Geometry, dims: int, transposed: bool) -> ConvParams:
    stride, padding, dilation, groups, output_padding = geometry
    return ConvParams(
        _ntuple(stride, dims), _ntuple(padding, dims), _ntuple(dilation, dims), groups,
        transposed, _ntuple(output_padding, dims),
    )  # fmt: skip


_known_params = functools.lru_cache(maxsize=1024)(_params)


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


_CONV = {o.dims: o.original for o in CONVOLUTIONS}
_CONV_TRANSPOSE = {o.dims: o.original for o in TRANSPOSED_CONVOLUTIONS}
_linear = LINEAR.original


def _convolution(x: Tensor, w: Tensor, b: Tensor | None, p: ConvParams) -> Tensor:
    # Torch's own, as what a tool may have put in its place was called before: see operations.py.
    # Not aten.convolution, which does all of them: profilers and counters know these by name.
    if p.transposed:
        forward = _CONV_TRANSPOSE[w.dim() - 2]
        return forward(x, w, b, p.stride, p.padding, p.output_padding, p.groups, p.dilation)
    return _CONV[w.dim() - 2](x, w, b, p.stride, p.padding, p.dilation, p.groups)


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
        record: Record | None,
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.config = params, k, score_fn, record
        y = _convolution(x, w, b, params)
        if record is not None:
            record.forward(x, w, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        if w.dtype is not x.dtype:  # a hook put it back into the dtype that it is stored in
            w = w.to(x.dtype)
        params, k, score_fn, record = ctx.config
        needed = _output_mask(ctx)
        if not torch.compiler.is_compiling():
            lazy_grad.prepare_before(ctx, x, score_fn_of)
        grads = _outside_of_autocast(
            sparse_backward, dy, x, w, params, k, score_fn, needed, record
        )
        return *grads, None, None, None, None


#: The class of ``grad_fn`` of what a sparse convolution returns.
SparseConvNode = _SparseConv._backward_cls

_apply = _SparseConv.apply
# What that calls at last. Before, it looks for transforms of torch.func, and for tensors that one
# of them left behind, which are looked for here.
_apply_plain = super(torch.autograd.Function, _SparseConv).apply


def score_fn_of(node: Any) -> ScoreFn:
    """Return what scores the channels of a :data:`SparseConvNode`."""
    return node.config[2]


def make_lazy(out: Tensor) -> None:
    """Make the gradients lazy that come before ``out``, as a sparse convolution of it would."""
    lazy_grad.prepare(out.grad_fn, SparseConvNode, score_fn_of)


class _SparseLinear(torch.autograd.Function):
    """As :class:`_SparseConv`, of ``F.linear``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        k: int,
        score_fn: ScoreFn,
        record: Record | None,
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.config = k, score_fn
        ctx.record = record
        y = _linear(x, w, b)
        if record is not None:
            record.forward(x, w, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        if w.dtype is not x.dtype:
            w = w.to(x.dtype)
        needed = _output_mask(ctx)
        grads = _outside_of_autocast(linear_backward, dy, x, w, *ctx.config, needed, ctx.record)
        return *grads, None, None, None


def _output_mask(ctx: Any) -> tuple[bool, ...]:
    """Return which of dX, dW and db this backward is after.

    ``torch.autograd.grad`` and ``backward(inputs=...)`` may leave some out, which torch's own
    convolution does not compute then either; ``needs_input_grad`` knows the forward only.
    """
    needed = ctx.needs_input_grad[:3]
    if torch.compiler.is_compiling():
        return needed
    nodes = ctx.next_functions
    return tuple(n and _is_asked_for(nodes[i][0]) for i, n in enumerate(needed))


def _is_asked_for(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient torch.autograd.grad returns
        return True


def _outside_of_autocast(backward: Any, dy: Tensor, *args: Any) -> Any:
    if is_batched(dy):
        raise RuntimeError(NO_TRANSFORMS)
    if not _is_autocasting(dy):
        return backward(dy, *args)
    with torch.autocast(dy.device.type, enabled=False):  # the dense backward ignores it too
        return backward(dy, *args)


class _OpaqueSparseConv(torch.autograd.Function):
    """For torch.compile: the backward is an opaque operator, told the rate by a tensor.

    That and the token are saved, not put on ``ctx``, as compiled autograd of torch 2.14 loses
    tensors that are. So checkpointing around compiled code makes them those of its second forward.
    """

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
        transposed: bool,
        output_padding: tuple[int, ...],
        rate: Tensor,
        token: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, w, rate, token)
        ctx.geometry = stride, padding, dilation, groups, transposed, output_padding
        params = ConvParams(stride, padding, dilation, groups, transposed, output_padding)
        return _convolution(x, w, b, params)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, rate, token = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        mask = [need_x, need_w, need_b]
        dx, dw, db = opaque.conv_backward(dy, x, w, *ctx.geometry, rate, token, mask)
        return (
            dx if need_x else None,
            dw if need_w else None,
            db if need_b else None,
            None, None, None, None, None, None, None, None,
        )  # fmt: skip


class _OpaqueSparseLinear(torch.autograd.Function):
    """As :class:`_OpaqueSparseConv`, of ``F.linear``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, rate: Tensor, token: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, w, rate, token)
        return _linear(x, w, b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, rate, token = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        mask = [need_x, need_w, need_b]
        dx, dw, db = opaque.linear_backward(dy, x, w, rate, token, mask)
        return (
            dx if need_x else None,
            dw if need_w else None,
            db if need_b else None,
            None, None,
        )  # fmt: skip
