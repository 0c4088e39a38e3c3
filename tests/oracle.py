"""What a sparse backward must compute, said a second time and on its own.

The kept channels by sorting a Python list, the gradients by the dense ``aten.convolution_backward``
on a gradient whose other channels are zero, padding strings by padding the input, and a whole
network by masking the gradient of every layer's output. Nothing of ssprop_patch is used.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


# --- the choice -------------------------------------------------------------------------------


def number_kept(channels, drop_rate):
    """k of ``channels``: rounded half up, at least one."""
    return max(1, math.floor((1 - drop_rate) * channels + 0.5))


def choices(channels, groups):
    """The sets of output channels from each of which the same number is kept."""
    if groups in (1, channels):
        return [range(channels)]
    size = channels // groups
    return [range(g * size, (g + 1) * size) for g in range(groups)]


def importance(dy, order=1):
    """Mean of |dy| ** order over batch and space, as Python floats; half precision summed wider."""
    wide = dy.detach().double() if dy.dtype.itemsize < 4 else dy.detach()
    return wide.abs().pow(order).transpose(0, 1).flatten(1).mean(1).tolist()


@dataclass
class Choice:
    """The kept channels of one gradient.

    ``gap`` is how far the choice is from a tie: the smallest relative distance between a kept and
    a dropped channel of one set, infinite where nothing is dropped or where all is zero.
    """

    keep: torch.Tensor
    gap: float


def choose(dy, groups, drop_rate, order=1):
    """Choose among the channels of dy, shape (N, C_out, *spatial)."""
    scores = importance(dy, order)
    keep, gap = torch.zeros(dy.shape[1], dtype=torch.bool), math.inf
    for channels in choices(dy.shape[1], groups):
        k = number_kept(len(channels), drop_rate)
        ranked = sorted(channels, key=lambda c: scores[c], reverse=True)
        keep[ranked[:k]] = True
        if k < len(ranked) and scores[ranked[k - 1]] > 0:
            least, most = scores[ranked[k - 1]], scores[ranked[k]]
            gap = min(gap, (least - most) / least)
    return Choice(keep, gap)


def mask(dy, keep):
    """dy with the channels that are not kept set to zero."""
    return torch.where(keep.to(dy.device).view(-1, *[1] * (dy.dim() - 2)), dy, 0)


# --- one convolution --------------------------------------------------------------------------


def gradients(x, w, b, dy, keep, *, stride=1, padding=0, dilation=1, groups=1):
    """(dX, dW, db) of one convolution, ``keep`` being the output channels that count.

    Batched or not; numbers or tuples; padding strings. db is None without a bias.
    """
    dims = w.dim() - 2
    if x.dim() == dims + 1:
        dx, dw, db = gradients(
            x[None],
            w,
            b,
            dy[None],
            keep,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
        return dx[0], dw, db
    stride, dilation = _tuple(stride, dims), _tuple(dilation, dims)
    # All padding is put on by hand, so that strings need no rule of the convolution.
    size, kernel = x.shape[2:], w.shape[2:]
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        before = [t // 2 for t in total]
        after = [t - s for t, s in zip(total, before, strict=True)]
    else:
        before = after = _tuple(padding, dims)
    pads = [n for pair in reversed(list(zip(before, after, strict=True))) for n in pair]
    padded = F.pad(x, pads)
    dx, dw, db = torch.ops.aten.convolution_backward(
        mask(dy, keep),
        padded,
        w,
        [w.shape[0]],
        stride,
        [0] * dims,
        dilation,
        False,
        [0] * dims,
        groups,
        [True, True, True],
    )
    for dim, (start, length) in enumerate(zip(before, size, strict=True), start=2):
        dx = dx.narrow(dim, start, length)
    return dx, dw, None if b is None else db


def _tuple(value, dims):
    return (value,) * dims if isinstance(value, int) else tuple(value)


class _MaskGradient(torch.autograd.Function):
    """The identity; its backward keeps the channels that ``choose_from(dy)`` says."""

    @staticmethod
    def forward(ctx, y, choose_from):
        ctx.choose_from = choose_from
        return y.clone()  # a view could not be changed in place, as many networks do next

    @staticmethod
    def backward(ctx, dy):
        return mask(dy, ctx.choose_from(dy)), None


def conv(dims, x, w, b=None, *, choose_from, **arguments):
    """A dense convolution whose output lets the gradient of some channels through only.

    Differentiable as often as one likes; batched.
    """
    return _MaskGradient.apply(CONV[dims](x, w, b, **arguments), choose_from)


# --- a whole network --------------------------------------------------------------------------


@dataclass
class Record:
    """What the oracle met in one backward: calls, those that dropped a channel, the least gap."""

    calls: int = 0
    dropped: int = 0
    gap: float = math.inf


def functions_of(module):
    """The functions that make a layer's output from its input."""
    if isinstance(module, nn.Linear):
        return (F.linear,)
    return tuple((CONV_TRANSPOSE if isinstance(module, TRANSPOSED) else CONV).values())


class _MaskLayers(TorchFunctionMode):
    def __init__(self, drop_rate, record, inside, order):
        super().__init__()
        self.drop_rate, self.record, self.inside, self.order = drop_rate, record, inside, order

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        y = func(*args, **kwargs)
        layer = self.inside[-1] if self.inside else None
        if layer is None or not layer.training or func not in functions_of(layer):
            return y
        # After input, weight, bias, stride and padding a transposed convolution takes its output
        # padding and then the groups, an ordinary one its dilation and then the groups.
        groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
        batched = y.dim() == (args[1] if len(args) > 1 else kwargs["weight"]).dim()

        def choose_from(dy):
            choice = choose(dy, groups, self.drop_rate, self.order)
            self.record.calls += 1
            self.record.dropped += not choice.keep.all()
            self.record.gap = min(self.record.gap, choice.gap)
            return choice.keep

        if func is F.linear:
            rows = _MaskGradient.apply(y.reshape(-1, y.shape[-1]), choose_from)
            return rows.view(y.shape)
        if batched:
            return _MaskGradient.apply(y, choose_from)
        return _MaskGradient.apply(y[None], choose_from)[0]


@contextlib.contextmanager
def network(model, drop_rate, types=CONVOLUTIONS, order=1):
    """Give every layer of ``types`` in an unconverted model a masked gradient; yield a Record.

    Around the forward; the backward may come later. Calls of ``F.conv*d`` and the like from outside
    of such a layer stay as they are. ``order`` is that of the importance: 1 for l1, 2 for l2.
    """
    record, inside = Record(), []

    def enter(module, args):
        inside.append(module)

    def leave(module, args, output):
        inside.pop()

    handles = []
    for module in model.modules():
        if isinstance(module, types):
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with _MaskLayers(drop_rate, record, inside, order):
            yield record
    finally:
        for handle in handles:
            handle.remove()
