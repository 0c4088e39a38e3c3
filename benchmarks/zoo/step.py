"""One training step of a network without an optimizer, always the same one."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ssprop_patch as ssp

from . import count, models


class CannotRun(Exception):
    """The dense network does not run like this, or shows nothing; nothing is said of ssProp."""


class Run:
    """One training step without an optimizer: outputs, gradients, and the buffers after it."""

    def __init__(
        self,
        sample: models.Sample,
        buffers: list[Tensor],
        seed: int,
        *,
        backward: bool = True,
        learn_input: bool = True,
        watch: bool = False,
    ) -> None:
        model, leaves = sample.model, []
        learn_input = learn_input and not watch

        def fresh(t: Tensor) -> Tensor:
            t = t.detach().clone()
            # Boxes are no input that a gradient belongs to; images have three dimensions.
            if learn_input and t.is_floating_point() and t.dim() > 2 and t.shape[-1] != 3:
                leaves.append(t.requires_grad_())
            return t

        inputs = pytree.tree_map_only(Tensor, fresh, sample.inputs)
        put_back(model, buffers)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            with contextlib.ExitStack() as stack:
                also = stack.enter_context(_heard(sample.also))
                outputs = [*tensors(model(*inputs)), *also]
            # A smooth loss whose gradient differs everywhere.
            loss = sum((t * torch.randn(t.shape)).sum() for t in outputs if t.requires_grad)
            self.shares = count.shares(model, inputs) if watch else None
            if backward:
                loss.backward()
        except Exception as error:
            if is_memory(error) or ssp.is_converted(model):
                raise
            raise CannotRun(said(error)) from error
        self.outputs = [t.detach() for t in outputs]
        self.grads: dict[str, Tensor | None] = {}
        if backward:
            self.grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            self.grads |= {f"input {i}": t.grad for i, t in enumerate(leaves)}
        self.buffers = [b.clone() for b in model.buffers()]
        model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _heard(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Yield a list to which each call of the modules adds its outputs."""
    heard: list[Tensor] = []
    handles = [m.register_forward_hook(lambda m, x, y: heard.extend(tensors(y))) for m in modules]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def tensors(output: Any) -> list[Tensor]:
    """Return all tensors of numbers in what a network returns, in order."""
    leaves = pytree.tree_leaves(output)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def put_back(model: nn.Module, buffers: list[Tensor]) -> None:
    """Give the buffers the values they had."""
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)


def is_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that memory was short."""
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or "can't allocate memory" in text or "bad_alloc" in text:
            return True
        error = error.__cause__
    return False


def said(error: BaseException) -> str:
    """Return an error in words."""
    return f"{type(error).__name__}: {error}"
