"""Do the weights of a model change? A few small ones are kept and compared."""

from __future__ import annotations

from weakref import ref

import torch
from torch import Tensor, nn

from .._torch_compat import len_torch_dispatch_stack
from .step_counter import StepCounter

_HOW_MANY = 4


class WeightProbe:
    """Compares a few small trainable parameters with what they were at the last look.

    Args:
        watch: Knows the modules whose parameters these are.
    """

    def __init__(self, watch: StepCounter) -> None:
        modules = [*watch.layers, *watch.roots]
        found = {id(p): p for m in modules for p in m.parameters() if _is_comparable(p)}
        smallest = sorted(found.values(), key=Tensor.numel)[:_HOW_MANY]
        self._seen: list[tuple[ref[Tensor], Tensor | None]] = [(ref(p), None) for p in smallest]
        self._changes = 0

    def changed(self) -> int:
        """Look; return how many of the looks so far found a change."""
        if _is_recorded():
            return self._changes
        now: list[tuple[ref[Tensor], Tensor | None]] = []
        changed = False
        with torch.no_grad():
            for reference, before in self._seen:
                p = reference()
                if p is None or not _is_comparable(p) or _is_capturing(p):
                    continue
                value = _local(p)
                if before is not None and _are_alike(before, value):
                    changed = changed or not torch.equal(before, value)
                now.append((reference, value.clone()))
        self._seen = now
        self._changes += changed
        return self._changes


def _is_comparable(p: Tensor) -> bool:
    plain = type(p) in (nn.Parameter, Tensor) or hasattr(p, "to_local")
    return plain and p.requires_grad and p.numel() > 0 and not p.is_meta


def _are_alike(before: Tensor, now: Tensor) -> bool:
    """Whether a parameter was neither moved nor cast, which is not training."""
    return (before.dtype, before.device, before.shape) == (now.dtype, now.device, now.shape)


def _local(p: Tensor) -> Tensor:
    """Return the values that lie here, without asking other processes."""
    p = p.detach()
    return p.to_local() if hasattr(p, "to_local") else p


def _is_recorded() -> bool:
    """Whether something takes note of every operation: FLOP counters, checkpointing, fakes."""
    return len_torch_dispatch_stack() > 0


def _is_capturing(p: Tensor) -> bool:
    return p.is_cuda and torch.cuda.is_current_stream_capturing()
