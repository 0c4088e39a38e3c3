"""A U-Net in plain torch (arXiv 1505.04597), padded and with batch norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UNet(nn.Module):
    """Segments images into ``classes``: 31 million parameters.

    Args:
        width: Channels of the first stage; each of the four below has twice as many.
        classes: Output channels.
    """

    #: Its inputs have a multiple of this many pixels.
    DIVISOR = 16

    def __init__(self, width: int = 64, classes: int = 2) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(5)]
        self.down = nn.ModuleList(map(_stage, [3, *widths], widths))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(2 * n, n, 2, stride=2) for n in reversed(widths[:-1])
        )
        self.joined = nn.ModuleList(_stage(2 * n, n) for n in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes, H, W) for images (N, 3, H, W)."""
        kept = []
        for i, stage in enumerate(self.down):
            x = stage(nn.functional.max_pool2d(x, 2) if i else x)
            kept.append(x)
        for up, joined, before in zip(self.up, self.joined, reversed(kept[:-1]), strict=True):
            x = joined(torch.cat([before, up(x)], 1))
        return self.head(x)


def _stage(c_in: int, c_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n in (c_in, c_out):
        layers += [nn.Conv2d(n, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers)
