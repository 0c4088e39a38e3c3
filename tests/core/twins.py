"""The coarse twin of a convolution, said on its own with loops; and layers to try it on.

Autograd through :func:`twin` is what the coarse remainder has to compute.
"""

import itertools
import math
import random
from dataclasses import dataclass
from decimal import ROUND_HALF_DOWN, Decimal

import oracle
import torch

from ssprop_patch.core.geometry import ConvParams


@dataclass
class Layer:
    """Input, weight, the gradient of the output, geometry and the size of blocks."""

    x: torch.Tensor
    w: torch.Tensor
    dy: torch.Tensor
    params: ConvParams
    block: int

    @property
    def transposed(self):
        return self.params.transposed

    def __repr__(self):
        return f"{tuple(self.x.shape)}, {tuple(self.w.shape)}, {self.params}, block {self.block}"


def convolve(x, w, p):
    """Torch's own convolution."""
    dims = w.dim() - 2
    if p.transposed:
        rest = (p.output_padding or 0, p.groups, p.dilation)
        return oracle.CONV_TRANSPOSE[dims](x, w, None, p.stride, p.padding, *rest)
    return oracle.CONV[dims](x, w, None, p.stride, p.padding, p.dilation, p.groups)


def layers(number, seed, channels=((1, 2), (1, 3)), blocks=(2, 3, 4)):
    """That many random legal layers of every kind in float64; the same ones each time.

    Args:
        number: How many.
        seed: Of what they are.
        channels: Input channels, and output channels, of a group.
        blocks: Sizes of blocks.
    """
    pick = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    while number:
        dims = pick.choice([1, 2, 2, 3])
        transposed = pick.random() < 0.3
        groups = pick.choice([1, 1, 2, 4])
        c_in, c_out = (groups * pick.choice(each) for each in channels)

        def each(least, most, dims=dims):
            return tuple(pick.randint(least, most) for _ in range(dims))

        kernel, stride, dilation = each(1, 4 if dims < 3 else 3), each(1, 3), each(1, 2)
        padding, size = each(0, 2), each(1, 10 if dims < 3 else 5)
        output_padding = tuple(
            pick.randint(0, min(1, max(s, d) - 1)) * transposed
            for s, d in zip(stride, dilation, strict=True)
        )
        p = ConvParams(stride, padding, dilation, groups, transposed, output_padding)
        x = randn(2, c_in, *size)
        rows = (c_in, c_out // groups) if transposed else (c_out, c_in // groups)
        w = randn(*rows, *kernel)
        try:
            y = convolve(x, w, p)
        except RuntimeError:  # no output
            continue
        number -= 1
        yield Layer(x, w, randn(*y.shape), p, pick.choice(blocks))


def _cells(fine, large, kernel, stride, padding, dilation, block):
    """The blocks of one dimension, and of each the tile in the middle of what it reads."""
    nearest = (Decimal(fine) / block).to_integral_value(ROUND_HALF_DOWN)
    block = math.ceil(fine / max(1, int(nearest)))
    read = dilation * (kernel - 1) + 1
    for first in range(0, fine, block):
        start = first * stride - padding + math.ceil((read - stride) / 2)
        tile = [i for i in range(start, start + block * stride) if 0 <= i < large]
        yield list(range(first, min(first + block, fine))), tile


def _seen(w, p, fine, large):
    """Of each tap of the kernel, the share of positions for which it lies inside of the map."""
    shares = torch.zeros(w.shape[2:], dtype=w.dtype)
    positions = list(itertools.product(*map(range, fine)))
    for tap in itertools.product(*map(range, w.shape[2:])):
        inside = 0
        for position in positions:
            read = (
                at * s - pad + t * d
                for at, t, s, pad, d in zip(
                    position, tap, p.stride, p.padding, p.dilation, strict=True
                )
            )
            inside += all(0 <= at < n for at, n in zip(read, large, strict=True))
        shares[tap] = inside / len(positions)
    return shares


def twin(x, w, p, y_size, block):
    """The output of the twin: of each tile the mean, by the summed kernel, all over the block."""
    fine, large = (x.shape[2:], y_size) if p.transposed else (y_size, x.shape[2:])
    seen = w * _seen(w, p, fine, large)
    sums = seen.sum(list(range(2, w.dim()))).unflatten(0, (p.groups, -1))
    product = "ngi,gio->ngo" if p.transposed else "ngi,goi->ngo"
    channels = w.shape[1] * p.groups if p.transposed else w.shape[0]
    geometry = zip(fine, large, w.shape[2:], p.stride, p.padding, p.dilation, strict=True)
    y = torch.zeros(len(x), channels, *y_size, dtype=x.dtype)
    for cells in itertools.product(*(_cells(*each, block) for each in geometry)):
        blocks, tiles = zip(*cells, strict=True)
        read, written = (blocks, tiles) if p.transposed else (tiles, blocks)
        if not all(tiles):
            continue
        where = list(itertools.product(*read))
        total = sum(x[(..., *position)] for position in where)
        mean = total / math.prod(len(tile) for tile in tiles)
        out = torch.einsum(product, mean.unflatten(1, (p.groups, -1)), sums).flatten(1)
        spread = torch.zeros_like(y)
        for position in itertools.product(*written):
            spread[(..., *position)] = out
        y = y + spread
    return y


def twin_gradients(e, x, w, p, block):
    """Its (dX, dW) for the gradient ``e`` of the output, by autograd."""
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    y = twin(*leaves, p, tuple(e.shape[2:]), block)
    if not y.requires_grad:  # all tiles lie outside
        return torch.zeros_like(x), torch.zeros_like(w)
    grads = torch.autograd.grad(y, leaves, e, allow_unused=True)
    return tuple(
        torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)
    )
