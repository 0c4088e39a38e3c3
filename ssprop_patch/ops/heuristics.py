"""Rules for the algorithms of a sparse backward, from timings on a few machines."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.geometry import ConvParams
from .algorithms import Algorithms, has_forward, has_nhwc
from .channel_gradients import KeptChannels
from .channel_ops import is_channels_last
from .native.conv import is_small
from .pointwise import is_pointwise

_AVX512 = "AVX512" in torch.backends.cpu.get_cpu_capability()

_GATHER, _MATMUL, _MASK, _DIRECT, _ROWS = (
    Algorithms(name, name) for name in ("gather", "matmul", "mask", "direct", "rows")
)
# The AVX2 kernels for grouped convolutions of contiguous tensors take blocks of this many channels.
_AVX2_BLOCK = 8
# Kept channels times taps. Of more of them the first cache does not hold what a position reads;
# with a stride torch's kernel for contiguous tensors copies dX twice. dW pays with more in images
# that are not small, where gaps count less, and in three dimensions, where torch is slow.
_MOST_TERMS, _MOST_STRIDED_TERMS, _MOST_DW_TERMS, _MOST_3D_TERMS = 300, 480, 700, 2000
# With AVX-512 torch's kernels, whose blocks have 16 channels, are slow where these are not full.
_MOST_TERMS_AVX512, _MOST_DW_TERMS_AVX512 = 150, 85
_NOT_SMALL = 144
# Inputs, and products of an input and a weight, of a 1x1 convolution that C functions take.
_FEW_INPUTS, _FEW_PRODUCTS, _FEW_PRODUCTS_WIDE, _FEW_PRODUCTS_LAST = 2**18, 1.5e6, 2.5e5, 4e6
_MOST_FOR_ROWS = 5e6


class _Layer(NamedTuple):
    """All of a convolution on a CPU that its rule depends on."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    p: ConvParams
    k: int
    dtype: torch.dtype
    last: bool
    direct: bool
    avx512: bool


def by_rule(kept: KeptChannels) -> Algorithms:
    """Return the algorithms that are usually the fastest.

    From timings of layers at drop rate 0.8 on two cores of three AMD EPYCs, with AVX-512 (Zen 4 and
    5) and without (Zen 3), torch 2.14. The smaller convolutions of AVX-512 are nearly as fast as
    their FLOPs say, above all in channels_last. Other devices keep to their convolution kernels.
    """
    x, w, p = kept.whole_x, kept.whole_w, kept.p
    if not x.is_cpu or p.transposed:
        depthwise = p.groups > 1 and p.groups == p.out_channels(w)
        smaller = p.groups == 1 or (depthwise and (p.transposed or not is_channels_last(x)))
        return _GATHER if smaller else _MASK
    last, direct = is_channels_last(x), kept.can_be_direct
    return _on_cpu(_Layer(x.shape, w.shape, p, kept.number, x.dtype, last, direct, _AVX512))


def when_traced(w: Tensor, p: ConvParams) -> Algorithms:
    """As :func:`by_rule`, for a backward that torch.compile traces (of the functional form).

    It asks for neither device nor memory format: torch 2.6 cannot trace that in a backward, and
    later versions make gradients contiguous first.
    """
    return _GATHER if p.groups in (1, p.out_channels(w)) else _MASK


@functools.lru_cache(maxsize=4096)  # a small layer takes no longer to compute than this
def _on_cpu(layer: _Layer) -> Algorithms:
    if layer.direct and not is_small(layer.x, layer.w, layer.p):
        layer = layer._replace(direct=False)
    if layer.p.groups > 1:
        return _grouped(layer)
    return _pointwise(layer) if is_pointwise(layer.w, layer.p) else _ordinary(layer)


def _grouped(layer: _Layer) -> Algorithms:
    """As :func:`by_rule`, of a grouped convolution on a CPU: in which format, and is it smaller?

    The kernels for some channels of each group are slow but in channels_last.
    """
    x, w, p = layer.x, layer.w, layer.p
    depthwise = p.groups == w[0]
    if layer.direct:  # timed with AVX2 only
        return _DIRECT
    if depthwise and layer.last:
        return _GATHER
    if depthwise:
        return _through_nhwc(layer) if layer.avx512 or max(w[2:]) > 3 else _GATHER
    if layer.avx512:
        return _through_nhwc(layer) if max(p.stride) == 1 else _MASK
    if layer.last and len(x) == 4:
        return _GATHER
    if len(x) != 4 or w[1] == _AVX2_BLOCK:
        return _MASK
    nhwc = _through_nhwc(layer)
    return nhwc._replace(dx="forward") if has_forward(w, p) else nhwc


def _through_nhwc(layer: _Layer) -> Algorithms:
    name = "gather_nhwc" if has_nhwc(layer.x, layer.last) else "gather"
    return Algorithms(name, name)


def _pointwise(layer: _Layer) -> Algorithms:
    """As :func:`by_rule`, of a 1x1 convolution on a CPU: is it faster as a matrix product?

    Yes where it is small (less to prepare), where it has a stride, and, of a contiguous tensor,
    where it has many positions. Where it is very small the C functions are: they take 20 to 40 us
    before they begin, several of torch's operations 90 to 150.
    """
    x, k = layer.x, layer.k
    positions = math.prod(x[2:])
    size = x[0] * positions * x[1] * k
    if positions == 1:  # squeeze and excitation
        return _ROWS if layer.direct and size <= _MOST_FOR_ROWS else _MATMUL
    if layer.direct and max(layer.p.stride) == 1:
        narrow = x[1] <= 128 and k <= 32
        few = _FEW_PRODUCTS_LAST if layer.last else _FEW_PRODUCTS if narrow else _FEW_PRODUCTS_WIDE
        if size <= few and math.prod(x) <= _FEW_INPUTS:
            return _DIRECT
    if layer.last:
        pays = size <= 8e6 if layer.avx512 else k >= 32 or math.prod(x) <= 2**19
        return _MATMUL if pays else _GATHER
    if layer.dtype not in (torch.float32, torch.float64):  # see algorithms.candidates
        return _GATHER
    if max(layer.p.stride) > 1:
        return _MATMUL
    many, small = (256, 3e7) if layer.avx512 else (100, 1e7)
    return _MATMUL if positions >= many or size <= small else _GATHER


def _ordinary(layer: _Layer) -> Algorithms:
    """As :func:`by_rule`, of an ordinary convolution on a CPU: is it faster by C functions?

    Yes where few enough channels are kept. In channels_last only dW, and not of a few input
    channels or with a stride, where the way into their layout takes too long.
    """
    x, w = layer.x, layer.w
    if not layer.direct or (layer.avx512 and len(x) == 5):  # the latter was not timed
        return _GATHER
    strided, terms = max(layer.p.stride) > 1, layer.k * math.prod(w[2:])
    most = _MOST_TERMS_AVX512 if layer.avx512 else _MOST_TERMS
    few = terms <= (_MOST_STRIDED_TERMS if strided else most)
    dx = few and not layer.last
    dw = few and not (layer.avx512 and (strided or terms > _MOST_DW_TERMS_AVX512))
    if not (layer.avx512 or strided):
        dw = dw or (terms <= _MOST_DW_TERMS and math.prod(x[2:]) >= _NOT_SMALL)
    if layer.last:
        dw = dw and not strided and x[1] >= 24
    if len(x) == 5:  # torch's dW is slow there, and of a single sample also its dX
        dx = dx or x[0] == 1
        dw = terms <= _MOST_3D_TERMS or not strided
    return Algorithms("direct" if dx else "gather", "direct" if dw else "gather")
