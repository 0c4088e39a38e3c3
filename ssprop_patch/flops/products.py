"""Counts every convolution, matrix product and attention that a forward pass runs.

Also those that belong to no layer: functional calls, attention, layers that no conversion takes.
The backward follows from the forward: a product of two tensors costs as much again for each of the
two that needs a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch_compat import MODES_SEE_OPERATORS, EagerDispatchMode, is_shard_class


class Product(NamedTuple):
    """One operation: FLOPs of its forward and backward, and the layer that it ran in."""

    forward: int
    backward: int
    layer: nn.Module | None


class _Part(NamedTuple):
    """A product of two tensors: FLOPs of its forward, and which of the two need a gradient."""

    flops: int
    first: bool
    second: bool


class Products(EagerDispatchMode):
    """Notes the products that run while it is entered; asks no tensor for a value.

    Attributes:
        found: One entry for each, in order.
        layer: The layer that runs, for who knows.
        unknown: Why something that ran could not be counted; empty if all was.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Product] = []
        self.layer: nn.Module | None = None
        self.unknown = "" if MODES_SEE_OPERATORS else "this torch shows its operators to no mode"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = _formula_of(func)
        if formula is not None:
            try:  # what is counted must never stop a training
                self._note(formula, func, types, args, out)
            except Exception as error:
                self.unknown = f"{func}: {type(error).__name__}: {error}"
        return out

    def _note(self, formula: Any, func: Any, types: Any, args: Any, out: Any) -> None:
        if formula is _unknown:
            self.unknown = f"{func} is not counted"
        elif any(is_shard_class(t) for t in types):
            self.unknown = f"{func} ran on tensors that are sharded over several ranks"
        else:
            forward = backward = 0
            for flops, first, second in formula(out, *args):
                forward += int(flops)
                backward += int(flops) * (first + second)
            backward *= torch.is_grad_enabled()
            self.found.append(Product(forward, backward, self.layer))

    def claim(self, forward: int) -> None:
        """Leave out the latest operation of this many FLOPs: its layer counts it itself."""
        for i in reversed(range(len(self.found))):
            if self.found[i].forward == forward:
                del self.found[i]
                return

    @property
    def forward(self) -> int:
        """FLOPs of the forward of all that was found."""
        return sum(product.forward for product in self.found)

    @property
    def backward(self) -> int:
        """FLOPs of the backward of all that was found."""
        return sum(product.backward for product in self.found)


# --- formulas -----------------------------------------------------------------------------------

_Formula = Callable[..., Iterator[_Part]]


def _convolution(out: Tensor, x: Tensor, w: Tensor, *rest: Any) -> Iterator[_Part]:
    transposed = rest[4]  # after bias, stride, padding and dilation
    at = x if transposed else out  # where the kernel is applied
    flops = 2 * (at.numel() // (at.shape[1] or 1)) * w.numel()
    yield _Part(flops, x.requires_grad, w.requires_grad)


def _deformable(out: Tensor, x: Tensor, w: Tensor, *rest: Any) -> Iterator[_Part]:
    flops = 2 * (out.numel() // (out.shape[1] or 1)) * w.numel()
    yield _Part(flops, x.requires_grad, w.requires_grad)


def _product(out: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Iterator[_Part]:
    yield _Part(2 * out.numel() * a.shape[-1], a.requires_grad, b.requires_grad)


def _added_product(out: Tensor, bias: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Iterator[_Part]:
    return _product(out, a, b)


def _attention(out: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Iterator[_Part]:
    keys, queries = k.shape[-2], q.numel() // (q.shape[-1] or 1)
    scores = q.requires_grad or k.requires_grad
    yield _Part(2 * q.numel() * keys, q.requires_grad, k.requires_grad)
    yield _Part(2 * queries * keys * v.shape[-1], scores, v.requires_grad)


def _recurrent(out: Any, x: Tensor, *rest: Any) -> Iterator[_Part]:
    # Each step multiplies the input with one matrix and the hidden state with another.
    weights = rest[0] if isinstance(rest[0], (list, tuple)) else rest[:4]
    steps = x.numel() // (x.shape[-1] or 1)
    for w in weights:
        if w.dim() == 2:
            yield _Part(2 * steps * w.numel(), w.requires_grad, w.requires_grad)


def _unknown(out: Any, *args: Any) -> Iterator[_Part]:
    raise NotImplementedError


_FORMULAS: dict[str, _Formula] = {
    "aten.convolution": _convolution,
    "torchvision.deform_conv2d": _deformable,
    **dict.fromkeys(
        ("aten.mm", "aten.bmm", "aten.mv", "aten.dot", "aten._scaled_mm", "aten._grouped_mm"),
        _product,
    ),
    **dict.fromkeys(("aten.addmm", "aten.baddbmm", "aten.addmv"), _added_product),
    **dict.fromkeys(
        (
            "aten._scaled_dot_product_flash_attention",
            "aten._scaled_dot_product_flash_attention_for_cpu",
            "aten._scaled_dot_product_efficient_attention",
            "aten._scaled_dot_product_cudnn_attention",
            "aten._scaled_dot_product_fused_attention_overrideable",
        ),
        _attention,
    ),
    **dict.fromkeys(("aten.mkldnn_rnn_layer", "aten._cudnn_rnn", "aten.miopen_rnn"), _recurrent),
    **dict.fromkeys(
        ("aten._flash_attention_forward", "aten._efficient_attention_forward"), _unknown
    ),
}


def _formula_of(func: Any) -> _Formula | None:
    packet = getattr(func, "overloadpacket", None)
    if packet is None:  # an operator of higher order: it runs what it was given, and nobody sees it
        return _unknown
    return _FORMULAS.get(str(packet))
