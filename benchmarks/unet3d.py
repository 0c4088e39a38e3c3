"""A U-Net for volumes, such as those of medical imaging: four levels, two convolutions each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LEVELS = 4


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv3d(channels, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm3d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet3d(nn.Module):
    """Volumes (N, 1, D, H, W) to one number for each voxel.

    Args:
        width: Channels of the first level; twice as many in each deeper one.
    """

    #: The sides of a volume are multiples of it.
    MULTIPLE = 2 ** (_LEVELS - 1)

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(_LEVELS)]
        self.down = nn.ModuleList(map(_block, [1, *widths], widths))
        self.pool = nn.MaxPool3d(2)
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1])
        )
        self.merge = nn.ModuleList(_block(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv3d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels: list[Tensor] = []
        for block in self.down:
            x = block(self.pool(x) if levels else x)
            levels.append(x)
        levels.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), levels.pop()], 1))
        return self.head(x)
