"""ReLU behind a batch norm that defers its gradient: its backward is done in that norm's passes.

A pass of its own would read the gradient and the output, and write as much again. As for the norm
(:mod:`ssprop_patch.norm`), whether it does is seen in the autograd graph, call by call.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from . import passes
from .autograd import in_transform, is_batched
from .deferred import ReLUGradient
from .modules import Patched, make_patched_class
from .norm import DeferringNormNode

# For fewer elements its Python takes longer than the pass that it saves.
_MIN_ELEMENTS = 2**18


class PatchedReLU(Patched):
    """Mixin of patched ReLUs."""


def deferring_relus(model: nn.Module) -> list[nn.Module]:
    """Return the ReLUs of ``model`` to patch: those whose forward is torch's own.

    None at all where no gradient could be deferred: then their classes stay what they are.
    """
    devices = {p.device.type for p in model.parameters()}
    if not any(passes.may_split_relu(device) for device in devices):
        return []
    return [
        m for m in model.modules()
        if isinstance(m, nn.ReLU)
        and (isinstance(m, PatchedReLU) or type(m).forward is nn.ReLU.forward)
        and "forward" not in vars(m)
    ]  # fmt: skip


@functools.cache
def patched_relu_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``cls``, a ReLU, that defers its input's gradient."""
    dense_forward, defers, apply = cls.forward, _defers, _DeferringReLU.apply

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        return apply(input, self.inplace) if defers(input) else dense_forward(self, input)

    return make_patched_class(PatchedReLU, patched_relu_class, cls, "forward", forward)


def _defers(x: Any) -> bool:
    """Whether ``x`` comes straight from a norm that can do the backward of a ReLU on the way."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.numel() < _MIN_ELEMENTS:
        return False
    node = x.grad_fn
    if not isinstance(node, DeferringNormNode) or not torch.is_grad_enabled():
        return False
    return node.takes_relu and not in_transform(x)


class _DeferringReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            out = x.relu_()
            ctx.mark_dirty(out)
        else:
            out = x.relu()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        # As in the norm: compiled autograd cannot trace a deferred gradient, and torch's own
        # operation can be differentiated once more and has a rule for batches.
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or is_batched(dz):
            return passes.relu_backward(dz, out), None
        return ReLUGradient(out, dz), None
