"""Rules for the ways in which a sparse backward is computed, from timings of a few machines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .kept import ConvParams
from .passes import is_channels_last
from .ways import Ways, can_be_direct, possible

_AVX512 = "AVX512" in torch.backends.cpu.get_cpu_capability()

_GATHER, _MATMUL, _MASK, _DIRECT = (Ways(n, n) for n in ("gather", "matmul", "mask", "direct"))
# The AVX2 kernels for grouped convolutions of contiguous tensors take blocks of so many channels.
_AVX2_BLOCK = 8
# Kept channels times taps. Of more of them the first cache does not hold what a position reads;
# with a stride torch's kernel for contiguous tensors copies dX twice. dW pays with more in images
# that are not small, where gaps count less, and in three dimensions, where torch is slow.
_MOST_TERMS, _MOST_STRIDED_TERMS, _MOST_DW_TERMS, _MOST_3D_TERMS = 300, 480, 700, 2000
_NOT_SMALL = 144


def by_rule(x: Tensor, w: Tensor, p: ConvParams, k: int) -> Ways:
    """Return the ways that are usually the fastest.

    From timings of layers at drop rate 0.8 on two cores of two AMD EPYCs, with AVX-512 (Zen 5) and
    without (Zen 3), torch 2.14. The former's smaller convolutions are nearly as fast as their FLOPs
    say, above all in channels_last. Other devices keep to their convolution kernels.

    Args:
        x, w, p: Input, weight and geometry.
        k: Kept channels.
    """
    last = is_channels_last(x)
    depthwise = p.groups > 1 and p.groups == p.out_channels(w)
    if p.transposed:
        return _GATHER if p.groups == 1 or depthwise else _MASK
    if not x.is_cpu:
        return _GATHER if p.groups == 1 or (depthwise and not last) else _MASK
    if p.groups > 1:
        return _grouped(x, w, p, depthwise, last)
    if all(n == 1 for n in w.shape[2:]) and not any(p.padding):
        return _pointwise(x, w, p, k, last)
    return _ordinary(x, w, p, k, last)


def when_traced(w: Tensor, p: ConvParams) -> Ways:
    """As :func:`by_rule`, for a backward that torch.compile traces (of the functional form).

    It asks for neither device nor memory format: torch 2.6 cannot trace that in a backward, and
    later versions make gradients contiguous first.
    """
    return _GATHER if p.groups in (1, p.out_channels(w)) else _MASK


def _grouped(x: Tensor, w: Tensor, p: ConvParams, depthwise: bool, last: bool) -> Ways:
    """As :func:`by_rule`, of a grouped convolution on a CPU: in which format, and is it smaller?

    The kernels for some channels of each group are slow but in channels_last.
    """
    if can_be_direct(x, w):  # timed with AVX2 only
        return _DIRECT
    if depthwise and last:
        return _GATHER
    if depthwise:
        return _through_nhwc(x, w, p) if _AVX512 or max(w.shape[2:]) > 3 else _GATHER
    if _AVX512:
        return _through_nhwc(x, w, p) if max(p.stride) == 1 else _MASK
    if last and x.dim() == 4:
        return _GATHER
    if x.dim() != 4 or w.shape[1] == _AVX2_BLOCK:
        return _MASK
    nhwc = _through_nhwc(x, w, p)
    return nhwc._replace(dx="forward") if "forward" in possible(x, w, p)[0] else nhwc


def _through_nhwc(x: Tensor, w: Tensor, p: ConvParams) -> Ways:
    name = "gather_nhwc" if "gather_nhwc" in possible(x, w, p)[0] else "gather"
    return Ways(name, name)


def _pointwise(x: Tensor, w: Tensor, p: ConvParams, k: int, last: bool) -> Ways:
    """As :func:`by_rule`, of a 1x1 convolution on a CPU: is it faster as a matrix product?

    Yes where it is small (less to prepare), where it has a stride, and, of a contiguous tensor,
    where it has many positions.
    """
    positions = math.prod(x.shape[2:])
    if positions == 1:  # squeeze and excitation: a quarter of the time
        return _MATMUL
    size = x.shape[0] * positions * x.shape[1] * k
    if last:
        pays = size <= 8e6 if _AVX512 else k >= 32 or x.numel() <= 2**19
        return _MATMUL if pays else _GATHER
    if x.dtype not in (torch.float32, torch.float64):  # see ways.possible
        return _GATHER
    if max(p.stride) > 1:
        return _MATMUL
    many, small = (900, 3e7) if _AVX512 else (100, 1e7)
    return _MATMUL if positions >= many or size <= small else _GATHER


def _ordinary(x: Tensor, w: Tensor, p: ConvParams, k: int, last: bool) -> Ways:
    """As :func:`by_rule`, of an ordinary convolution on a CPU: is it faster by C functions?

    Yes where few enough channels are kept. In channels_last only dW, and not of a few input
    channels or with a stride, where the way into their layout takes too long. Timed with AVX2 only.
    """
    if _AVX512 or not can_be_direct(x, w):
        return _GATHER
    strided, terms = max(p.stride) > 1, k * math.prod(w.shape[2:])
    few = terms <= (_MOST_STRIDED_TERMS if strided else _MOST_TERMS)
    dx = few and not last
    dw = few or (not strided and terms <= _MOST_DW_TERMS and math.prod(x.shape[2:]) >= _NOT_SMALL)
    if last:
        dw = dw and not strided and x.shape[1] >= 24
    if x.dim() == 5:  # torch's dW is slow there, and of a single sample also its dX
        dx = dx or x.shape[0] == 1
        dw = terms <= _MOST_3D_TERMS or not strided
    return Ways("direct" if dx else "gather", "direct" if dw else "gather")
