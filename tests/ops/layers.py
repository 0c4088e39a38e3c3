"""One layer run through its backward."""

import oracle
import torch

from ssprop_patch import functional


def run(shape=(2, 8, 6, 6), c_out=10, kernel=1, groups=1, dtype=torch.float64, rate=0.5, seed=0):
    """Run one layer's backward; return the largest error against the masked dense kernel."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=dtype, requires_grad=True)
    w = torch.randn(c_out, shape[1] // groups, kernel, kernel, generator=g, dtype=dtype)
    w.requires_grad_()
    geometry = {"padding": kernel // 2, "groups": groups}
    y = functional.conv2d(x, w, **geometry, drop_rate=rate)
    dy = torch.randn(y.shape, generator=g, dtype=dtype)
    y.backward(dy)
    keep = oracle.choose(dy, groups, rate).keep
    dx, dw, _ = oracle.gradients(x.detach(), w.detach(), None, dy, keep, **geometry)
    return max((x.grad - dx).abs().max().item(), (w.grad - dw).abs().max().item())
