"""Batch norm behind a sparse convolution: its gradient is formed for the kept channels only.

A batch norm whose input comes straight from a convolution with a sparse backward gives that a
gradient which is not formed yet (:mod:`ssprop_patch.deferred`). Whether it does is seen in the
autograd graph, call by call: nothing is paired beforehand, and where anything stands in between
(a hook's function, an addition, eval mode) the norm is torch's own.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.overrides import TorchFunctionMode

from . import passes
from .autograd import NO_TRANSFORMS, SparseConvNode, in_transform, is_batched, score_fn_of
from .deferred import NormGradient, ReLUGradient
from .modules import Patched, make_patched_class
from .selection import deferred_order

# Of so few positions per channel the closed form of the squares is mostly cancellation.
_MIN_POSITIONS = 16
# For fewer elements the Python of a deferred gradient takes longer than the passes that it saves:
# 50 us a layer against 0.4 ns an element, on two AVX-512 cores.
_MIN_ELEMENTS = 2**17


class PatchedNorm(Patched):
    """Mixin of patched batch norms."""


def deferring_norms(model: nn.Module, order: int | None) -> list[nn.Module]:
    """Return the batch norms of ``model`` to patch for scores of ``order``, see :func:`can_defer`.

    None at all where no gradient could be deferred: then their classes stay what they are.
    """
    devices = {p.device.type for p in model.parameters()}
    if order is None or not any(passes.may_split_norm(device, order) for device in devices):
        return []
    return [m for m in model.modules() if can_defer(m)]


def can_defer(module: nn.Module) -> bool:
    """Whether a layer is a batch norm that can be patched.

    Not SyncBatchNorm, whose sums are those of all ranks; not one whose forward was replaced on
    the instance.
    """
    return (
        isinstance(module, _BatchNorm)
        and not isinstance(module, (nn.SyncBatchNorm, _LazyNormBase, torch.jit.ScriptModule))
        and "forward" not in vars(module)
    )


@functools.cache
def patched_norm_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``cls``, a batch norm, that defers its input's gradient."""
    dense_forward, deferring_forward = cls.forward, _with_batch_norm(cls.forward)
    is_paired, catch = _is_paired, _CatchNorm

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not (self.training and is_paired(x)):
            return dense_forward(self, *args, **kwargs)
        if deferring_forward is not None:
            return deferring_forward(self, *args, **kwargs)
        with catch():
            return dense_forward(self, *args, **kwargs)

    return make_patched_class(PatchedNorm, patched_norm_class, cls, "forward", forward)


def _is_paired(x: Any) -> bool:
    """Whether ``x`` comes straight from a sparse convolution that can use a deferred gradient."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or not is_large_enough(x):
        return False
    node = x.grad_fn
    if not isinstance(node, SparseConvNode) or _saves_elsewhere():
        return False
    order = deferred_order(score_fn_of(node))
    return order is not None and passes.can_split_norm(x.detach(), order)


def is_large_enough(x: Tensor) -> bool:
    """Whether a deferred gradient pays for a norm with the input ``x``."""
    return x.dim() >= 2 and x.numel() >= max(_MIN_ELEMENTS, _MIN_POSITIONS * x.shape[1])


def _saves_elsewhere() -> bool:
    """Whether something takes away what autograd saves.

    So does checkpointing without reentrance, which wants the same tensors saved when it runs the
    forward again, though the rate may be 0 by then and the norm torch's own.
    """
    return _top_hooks is not None and _top_hooks(True) is not None


_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch >= 2.8


# Both of the following make the batch norm that a module's forward calls a deferring one. What
# subclasses do around it (an activation, as in timm's BatchNormAct2d) stays theirs.


def _with_batch_norm(forward: Any) -> Any:
    """Return ``forward`` with an ``F.batch_norm`` that may defer; None if it does not call that."""
    if not isinstance(forward, types.FunctionType) or "batch_norm" not in forward.__code__.co_names:
        return None
    names = {
        name: _FUNCTIONAL
        for name in forward.__code__.co_names
        if forward.__globals__.get(name) is nn.functional
    }
    if not names:
        return None
    copy = types.FunctionType(
        forward.__code__, {**forward.__globals__, **names}, forward.__name__,
        forward.__defaults__, forward.__closure__,
    )  # fmt: skip
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


class _CatchNorm(TorchFunctionMode):
    """As :func:`_with_batch_norm`, for a forward that calls it elsewhere: slower by 40 us."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_batch_norm if func is nn.functional.batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As ``F.batch_norm``, whose arguments these are; deferring where that is of use."""
    statistics = (running_mean, running_var)
    if not (training and _is_paired(input)) or in_transform(input, weight, bias):
        return nn.functional.batch_norm(input, *statistics, weight, bias, training, momentum, eps)
    order = deferred_order(score_fn_of(input.grad_fn))
    return _DeferringNorm.apply(input, weight, bias, *statistics, momentum, eps, order)


class _Functional:
    """``torch.nn.functional`` but for batch norm."""

    batch_norm = staticmethod(_batch_norm)

    def __getattr__(self, name: str) -> Any:
        return getattr(nn.functional, name)


_FUNCTIONAL = _Functional()


class _DeferringNorm(torch.autograd.Function):
    """Batch norm in training mode; the forward is torch's own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        order: int,
    ) -> Tensor:
        out, mean, invstd, reserve, kind = torch._batch_norm_impl_index(
            x, weight, bias, running_mean, running_var, True, momentum, eps,
            torch.backends.cudnn.enabled,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, mean, invstd, reserve)
        ctx.eps, ctx.kind, ctx.order = eps, kind, order
        ctx.takes_relu = passes.can_split_relu(x)  # for the ReLU behind, which sees this as grad_fn
        return out

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, reserve = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not need_x:
            # Compiled autograd cannot trace a deferred gradient; for a double backward torch's own
            # is differentiable.
            dx, dw, db = torch.ops.aten._batch_norm_impl_index_backward(
                ctx.kind, x, dz, weight, None, None, mean, invstd, True, ctx.eps,
                [need_x, need_w, need_b], reserve,
            )  # fmt: skip
        elif is_batched(dz):
            raise RuntimeError(NO_TRANSFORMS)
        else:
            dz, relu_out = dz.parts() if isinstance(dz, ReLUGradient) else (dz, None)
            sums = passes.norm_sums(dz, x, weight, mean, invstd, ctx.order, relu_out)
            dx = NormGradient(x, dz, weight, mean, invstd, ctx.eps, sums, ctx.order, relu_out)
            dw = sums.dz_xhat.to(weight.dtype) if need_w else None
            db = sums.dz.to(weight.dtype) if need_b else None
        return dx if need_x else None, dw if need_w else None, db if need_b else None, *[None] * 5


#: The class of ``grad_fn`` of what such a norm returns.
DeferringNormNode = _DeferringNorm._backward_cls
