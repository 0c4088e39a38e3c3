"""The autograd functions: a forward that is torch's own, and a sparse backward.

In eager mode the backward is plain Python; under torch.compile it is a custom operator.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch_compat import backward_class, will_engine_execute_node
from ..core.geometry import ConvParams, Geometry, conv_params, ntuple, resolve_padding
from ..core.operations import CONVOLUTIONS, LINEAR, TRANSPOSED_CONVOLUTIONS, Operation
from ..core.rule import BackwardRule
from ..schedule.call_observer import CallObserver
from . import custom_ops
from .backward import linear_backward, sparse_backward
from .lazy_grad import graph as lazy_grad
from .lazy_grad.gradients import LazyGradient
from .lazy_grad.graph import Needed
from .traced_gradient import along_directions, kind_with_directions
from .transforms import NO_TRANSFORMS, cast, in_transform, is_autocasting, is_batched
from .two_resolutions import Call, ahead_backward, begin_call


class Compiled(NamedTuple):
    """What the backward of compiled code goes by.

    Attributes:
        rate, token: Of the layer, see :mod:`.custom_ops`.
        directions: With a number, dy goes back along so many directions in operations that the
            compiler sees, where the layer has directions of dy.
        block: With them, as of :class:`ssprop_patch.core.rule.BackwardRule`.
    """

    rate: Tensor
    token: Tensor
    directions: int | None = None
    block: int = 0


def needs_backward(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd will ask this layer for any gradient."""
    return torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )


def sparse(
    operation: Operation,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    *,
    k: int = 0,
    rule: BackwardRule | None = None,
    observer: CallObserver | None = None,
    compiled: Compiled | None = None,
) -> Tensor:
    """Run ``operation``; in the backward keep ``k`` channels, or what ``compiled`` says.

    Args:
        k: Channels to keep of each choice.
        rule: What of the gradient goes back.
        observer: Gets a report of this call.
        compiled: Instead of these three. For torch.compile, which would make one graph per ``k``.

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
    if is_autocasting(input):
        device_type = input.device.type
        # Cast what autocast would, but outside the Function, so that autograd casts back.
        dtype = torch.get_autocast_dtype(device_type)
        input, weight = cast(input, dtype, device_type), cast(weight, dtype, device_type)
        bias = None if bias is None else cast(bias, dtype, device_type)
    if operation.dims == 0:
        if compiled is None:
            return _SparseLinear.apply(input, weight, bias, k, rule, observer)
        return _OpaqueSparseLinear.apply(input, weight, bias, compiled.rate, compiled.token)
    return _convolve(operation, input, weight, bias, geometry, k, rule, observer, compiled)


def _convolve(
    operation: Operation,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    k: int,
    rule: BackwardRule | None,
    observer: CallObserver | None,
    compiled: Compiled | None,
) -> Tensor:
    dims = operation.dims
    unbatched = input.dim() == dims + 1
    if unbatched:
        input = input.unsqueeze(0)
    if isinstance(geometry.padding, str):
        stride, dilation = ntuple(geometry.stride, dims), ntuple(geometry.dilation, dims)
        input, padding = resolve_padding(geometry.padding, input, weight, stride, dilation)
        # Not _replace, which torch.compile of torch 2.6 does not trace.
        geometry = Geometry(stride, padding, dilation, geometry.groups)
    params = conv_params(geometry, dims, operation.transposed)
    if compiled is None:
        out = _SparseConv.apply(input, weight, bias, params, k, rule, observer)
    else:
        out = _OpaqueSparseConv.apply(input, weight, bias, *params, *compiled)
    return out.squeeze(0) if unbatched else out


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
        rule: BackwardRule,
        observer: CallObserver | None,
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.config = params, k, rule, observer
        y = _convolution(x, w, b, params)
        if observer is not None:
            observer.forward(x, w, y)
        if rule.ahead is not None:
            ctx.ahead = begin_call(x, w, y, params, k, rule, SparseConvNode)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        if w.dtype is not x.dtype:  # a hook put it back into the dtype that it is stored in
            w = w.to(x.dtype)
        params, k, rule, observer = ctx.config
        output_mask = _output_mask(ctx)
        call: Call | None = getattr(ctx, "ahead", None)
        if not torch.compiler.is_compiling() and (call is None or call.inputs is None):
            lazy_grad.prepare_before(ctx, x, needed_by)
        if call is not None and call.kept is not None:
            ahead = ahead_backward, dy, x, w, params, rule, call, output_mask, observer
            dx, dw, db = _outside_of_autocast(*ahead)
            # What is asked for by torch.autograd.grad has to be an ordinary tensor.
            if isinstance(dx, LazyGradient) and any(map(lazy_grad.is_partial, call.before)):
                dx = dx.form()
            return dx, dw, db, None, None, None, None
        grads = _outside_of_autocast(
            sparse_backward, dy, x, w, params, k, rule, output_mask, observer
        )
        return *grads, None, None, None, None


#: The class of ``grad_fn`` of what a sparse convolution returns.
SparseConvNode = backward_class(_SparseConv)


def needed_by(node: Any) -> Needed | None:
    """Return what a :data:`SparseConvNode` reads of its gradient; None if it needs all of it."""
    params, _, rule, _ = node.config
    # Of a transposed convolution the cells are not those of its blocks.
    if rule.subspace is not None or (rule.block and params.transposed):
        return None
    return Needed(rule.score_fn, rule.block)


def make_lazy(out: Tensor) -> None:
    """Make the gradients lazy that come before ``out``, as a sparse convolution of it would."""
    lazy_grad.prepare(out.grad_fn, SparseConvNode, needed_by)


class _SparseLinear(torch.autograd.Function):
    """As :class:`_SparseConv`, of ``F.linear``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        k: int,
        rule: BackwardRule,
        observer: CallObserver | None,
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.config = k, rule
        ctx.observer = observer
        y = _linear(x, w, b)
        if observer is not None:
            observer.forward(x, w, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        if w.dtype is not x.dtype:
            w = w.to(x.dtype)
        output_mask = _output_mask(ctx)
        grads = _outside_of_autocast(
            linear_backward, dy, x, w, *ctx.config, output_mask, ctx.observer
        )
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
        return will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient torch.autograd.grad returns
        return True


def _outside_of_autocast(backward: Any, dy: Tensor, *args: Any) -> Any:
    if is_batched(dy):
        raise RuntimeError(NO_TRANSFORMS)
    if not is_autocasting(dy):
        return backward(dy, *args)
    with torch.autocast(dy.device.type, enabled=False):  # the dense backward ignores it too
        return backward(dy, *args)


class _OpaqueSparseConv(torch.autograd.Function):
    """For torch.compile: the backward is a custom operator that gets the rate in a tensor.

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
        directions: int | None,
        block: int,
    ) -> Tensor:
        ctx.save_for_backward(x, w, rate, token)
        ctx.geometry = stride, padding, dilation, groups, transposed, output_padding
        ctx.directions, ctx.block = directions, block
        params = ConvParams(stride, padding, dilation, groups, transposed, output_padding)
        return _convolution(x, w, b, params)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, rate, token = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        output_mask = [need_x, need_w, need_b]
        kind = None
        if ctx.directions is not None:
            kind = kind_with_directions(dy, x, w, ctx.geometry, ctx.directions, ctx.block)
        if kind is None:
            grads = custom_ops.conv_backward(dy, x, w, *ctx.geometry, rate, token, output_mask)
            dx, dw, db = grads
        else:
            p = ConvParams(*ctx.geometry)
            u = custom_ops.directions(dy, token, p.groups, ctx.directions)
            dx, dw, db = along_directions(dy, x, w, p, u, kind, (need_x, need_w, need_b))
        return (
            dx if need_x else None,
            dw if need_w else None,
            db if need_b else None,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
        )


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
        output_mask = [need_x, need_w, need_b]
        dx, dw, db = custom_ops.linear_backward(dy, x, w, rate, token, output_mask)
        return (
            dx if need_x else None,
            dw if need_w else None,
            db if need_b else None,
            None,
            None,
        )
