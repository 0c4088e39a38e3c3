"""Networks whose FLOPs are counted, and how torch counts."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
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


class Mixed(nn.Module):
    """A convolution, two functional ones, attention in two ways, products of no layer.

    Without biases and groups, as torch's counter leaves out the ones and mistakes the others.
    """

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4, bias=False)
        self.kernel = nn.Parameter(torch.randn(16, 16, 3, 3))
        self.up = nn.Parameter(torch.randn(16, 16, 2, 2))
        self.attention = nn.MultiheadAttention(16, 2, bias=False, batch_first=True)
        self.proj = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 5, bias=False)

    def forward(self, x):
        x = F.conv2d(self.stem(x), self.kernel, padding=1)
        x = x + F.conv_transpose2d(x, self.up, stride=2)[..., ::2, ::2]
        x = x.flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        q = self.proj(x)[:, None]
        x = x + F.scaled_dot_product_attention(q, q[..., :9, :], q[..., :9, :])[:, 0]
        return self.head(torch.einsum("bid,bjd->bij", x, x) @ x).mean(1)


def rows(summary):
    return {row.name: row for row in summary.layers}


def counted(dims, x, conv):
    """Forward and backward FLOPs as torch counts them: no bias, no importance."""
    with FlopCounterMode(display=False) as forward:
        y = conv(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return y, forward.get_total_flops(), backward.get_total_flops()
