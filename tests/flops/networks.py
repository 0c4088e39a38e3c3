"""A network whose FLOPs are counted, and how torch counts."""

from collections import OrderedDict

from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def small():
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 8, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(8),
            act=nn.ReLU(inplace=True),
            drop=nn.Dropout(0.5),
            body=nn.Conv2d(8, 16, 3, padding=1),
            head=nn.Conv2d(16, 4, 1),
        )
    )


def rows(summary):
    return {row.name: row for row in summary.layers}


def counted(dims, x, conv):
    """Forward and backward FLOPs as torch counts them: no bias, no importance."""
    with FlopCounterMode(display=False) as forward:
        y = conv(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return y, forward.get_total_flops(), backward.get_total_flops()
