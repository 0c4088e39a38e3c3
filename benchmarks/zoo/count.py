"""How much of a network's training step its sparse convolutions are, in FLOPs.

A forward pass is watched: matrix products and attention count by torch's formulas, convolutions
as ``ssp.summary`` counts them. The backward of a product is two products, and so is a
convolution's, but for the input gradient where nothing before it is trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import ssprop_patch as ssp

aten = torch.ops.aten
CONVOLUTIONS = (aten.convolution, aten._convolution)


class Shares(NamedTuple):
    """What the sparse convolutions are of the backward FLOPs, and of forward + backward."""

    backward: float
    step: float
    shape: str


class _Forward(TorchDispatchMode):
    """FLOPs of all operators of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in CONVOLUTIONS:
            self.flops += _convolution(args[0], args[1], out, transposed=args[6])
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def _convolution(x: Tensor, w: Tensor, y: Tensor, transposed: bool) -> int:
    if transposed:  # the kernel is applied at each input position
        return 2 * x.numel() // x.shape[1] * w.numel()
    # Not torch's count, which knows no groups in some versions.
    return 2 * y.numel() // w.shape[0] * w.numel()


def shares_without_data(model: nn.Module, inputs: tuple[Any, ...]) -> Shares:
    """Return the shares as if the model were run on large ``inputs``, whose data is not read."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = pytree.tree_map_only(Tensor, mode.from_tensor, inputs)
        state = {n: mode.from_tensor(p) for n, p in model.named_parameters()}
        state |= {n: mode.from_tensor(b) for n, b in model.named_buffers()}
        with watched(model) as watch:
            torch.func.functional_call(model, state, inputs)
    return watch.shares(inputs)


class Watch:
    """What a forward has cost."""

    def __init__(self) -> None:
        self.operators = _Forward()
        self.sparse_forward = self.sparse_backward = 0

    def note(self, module: nn.Module, args: Any, y: Tensor) -> None:
        """Count a call of a layer that is to be sparse: a forward hook."""
        x, bias = args[0], module.bias is not None
        forward = _convolution(x, module.weight, y, transposed=False)
        self.sparse_forward += forward
        # For the gradients of the weight, the input and the bias.
        self.sparse_backward += forward * (1 + x.requires_grad) + y.numel() * bias

    def shares(self, inputs: Any) -> Shares:
        """Return the shares of the forward that was watched."""
        forward = self.operators.flops
        if self.sparse_forward > forward:
            raise AssertionError("more FLOPs in the convolutions than in all")
        backward = 2 * (forward - self.sparse_forward) + self.sparse_backward
        x = next(t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor))
        return Shares(
            self.sparse_backward / (backward or 1),
            (self.sparse_forward + self.sparse_backward) / (forward + backward or 1),
            "x".join(map(str, x.shape)),
        )


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[Watch]:
    """Yield what counts the forward of an unconverted model, all of which is trained.

    The inputs need no gradient: a first convolution has none to compute.
    """
    watch = Watch()
    handles = [row.module.register_forward_hook(watch.note) for row in ssp.plan(model).converted]
    try:
        with watch.operators:
            yield watch
    finally:
        for handle in handles:
            handle.remove()
