"""Random weights that cost little and prove much.

Libraries draw their initial weights slowly, and with zeros: the last norm of a residual block,
the scale of a layer, a bias. A branch that is multiplied by zero has no gradient, and nothing
about it would be shown. So large draws are left out while a network is built, and then every
parameter gets a value: of variance 2 / fan-in for weights, near 1 for norms, near what the library
set for all others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

LARGE = 16_384  # parameters smaller than this are drawn as the library does
PERIOD = 1_000_003  # a prime, so that no two rows of a weight are alike

aten = torch.ops.aten
_DRAWS = (aten.normal_, aten.uniform_, aten.bernoulli_, aten.random_)
_AFTERWARDS = (aten.mul_, aten.add_, aten.sub_, aten.div_, aten.clamp_, aten.erfinv_, aten.fmod_)


class LeaveOutLargeDraws(TorchDispatchMode):
    """While active, large tensors are filled with zeros in place of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._undrawn: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        if packet in _DRAWS and args[0].numel() >= LARGE:
            self._undrawn.add(args[0].data_ptr())
            return args[0].zero_()  # some draw again until all numbers are small enough
        if packet in _AFTERWARDS and self._undrawn and args[0].data_ptr() in self._undrawn:
            return args[0]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Give every parameter of ``model`` a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(PERIOD, generator=generator)
    done: set[int] = set()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) in done or not p.is_floating_point():
                continue
            done.add(id(p))
            start = int(torch.randint(PERIOD, (), generator=generator))
            if name == "weight" and p.dim() > 1:
                _fill(p, noise, start, math.sqrt(2 / max(p[0].numel(), 1)))
            elif p.numel() >= LARGE:
                _fill(p, noise, start, 0.1)
            else:
                library = torch.ones_like(p) if name == "weight" else p.clone()
                _fill(p, noise, start, 0.1)
                p.add_(library)


def _fill(p: Tensor, noise: Tensor, start: int, scale: float) -> None:
    """Write ``scale`` times the noise, again and again, from ``start`` on."""
    flat = p.data.view(-1) if p.is_contiguous() else torch.empty(p.numel(), dtype=p.dtype)
    at = 0
    while at < flat.numel():
        piece = noise[start : start + flat.numel() - at]
        torch.mul(piece, scale, out=flat[at : at + piece.numel()])
        at, start = at + piece.numel(), 0
    if not p.is_contiguous():
        p.data.copy_(flat.view(p.shape))
