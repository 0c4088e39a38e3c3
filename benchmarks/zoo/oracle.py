"""What a sparse backward must compute, without ssprop_patch: a dense network with masked dy.

The output of every convolution goes through an identity whose backward sets all but the k largest
channels of the gradient to zero; autograd does the rest.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


@dataclass
class Record:
    """What was met in one pass.

    Attributes:
        calls: Gradients of convolutions that arrived.
        dropped: Those of which a channel that was not zero is dropped.
        dead: Those that were zero throughout, which prove nothing.
        gap: The least relative distance between a kept and a dropped channel: near 0 is a tie.
        outside: Calls of ``F.conv*d`` outside of a convolution module: they stay dense.
    """

    calls: int = 0
    dropped: int = 0
    dead: int = 0
    gap: float = math.inf
    outside: int = 0


def choose(dy: Tensor, groups: int, drop_rate: float, record: Record) -> Tensor:
    """Return which channels of dy, (N, C, *spatial), are kept: a boolean (C,)."""
    channels = dy.shape[1]
    scores = dy.abs().transpose(0, 1).flatten(1).mean(1).tolist()
    sets = 1 if groups in (1, channels) else groups  # the same number is kept of each set
    size = channels // sets
    k = max(1, math.floor((1 - drop_rate) * size + 0.5))
    keep = torch.zeros(channels, dtype=torch.bool)
    dropped = False
    for start in range(0, channels, size):
        ranked = sorted(range(start, start + size), key=lambda c: scores[c], reverse=True)
        keep[ranked[:k]] = True
        if k < size and scores[ranked[k - 1]] > 0:
            least, most = scores[ranked[k - 1]], scores[ranked[k]]
            record.gap = min(record.gap, (least - most) / least)
            dropped = dropped or most > 0
    record.calls += 1
    record.dropped += dropped
    record.dead += not any(scores)
    return keep


class _Mask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, groups, drop_rate, record):
        ctx.how = groups, drop_rate, record
        return y.clone()  # a view could not be changed in place, as many networks do next

    @staticmethod
    def backward(ctx, dy):
        keep = choose(dy, *ctx.how).view(-1, *[1] * (dy.dim() - 2))
        return torch.where(keep, dy, 0), None, None, None


class _MaskConvolutions(TorchFunctionMode):
    def __init__(self, drop_rate: float, record: Record, inside: list[nn.Module]) -> None:
        super().__init__()
        self.drop_rate, self.record, self.inside = drop_rate, record, inside

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        y = func(*args, **kwargs)
        if func not in CONVOLUTIONS:
            return y
        if not self.inside:
            self.record.outside += 1
            return y
        if not self.inside[-1].training or not y.requires_grad:
            return y
        groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        how = groups, self.drop_rate, self.record
        if y.dim() == weight.dim():
            return _Mask.apply(y, *how)
        return _Mask.apply(y[None], *how)[0]


@contextlib.contextmanager
def network(model: nn.Module, drop_rate: float) -> Iterator[Record]:
    """Mask the gradient of every Conv1d/2d/3d module of an unconverted model.

    Around the forward; the backward may come later.
    """
    record, inside = Record(), []
    handles = []
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            handles.append(module.register_forward_pre_hook(lambda m, args: inside.append(m)))
            handles.append(
                module.register_forward_hook(lambda m, args, y: _leave(inside), always_call=True)
            )
    try:
        with _MaskConvolutions(drop_rate, record, inside):
            yield record
    finally:
        for handle in handles:
            handle.remove()


def _leave(inside: list[nn.Module]) -> None:
    inside.pop()  # and return None: the output stays
