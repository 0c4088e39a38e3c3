"""Without measuring: the chosen way is one that the layer has, and its gradient is right."""

import pytest
import torch

from ssprop_patch.core import reference
from ssprop_patch.core.geometry import ConvParams
from ssprop_patch.core.selection import l1_scores
from ssprop_patch.ops import algorithms, heuristics, native
from ssprop_patch.ops.channel_gradients import KeptChannels

LAST = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d}

# Shapes of x and w, kept channels, stride. On both sides of where the rules change their mind, as
# far as one can tell from outside.
ORDINARY = [
    ((4, channels, size, size), (80, channels, *kernel), kept, stride)
    for size, channels, kept, kernel, stride in [
        (10, 32, 12, (3, 3), 1),
        (10, 32, 12, (3, 3), 2),
        (10, 3, 12, (1, 5), 1),
        (10, 32, 12, (7, 7), 1),
        (10, 32, 34, (3, 3), 1),
        (10, 32, 53, (3, 3), 2),
        (10, 32, 54, (3, 3), 2),
        (10, 3, 12, (3, 3), 1),
        (12, 32, 34, (3, 3), 1),
        (12, 32, 77, (3, 3), 1),
        (12, 32, 78, (3, 3), 1),
        (12, 32, 54, (3, 3), 2),
    ]
]
POINTWISE = [
    ((4, channels, size, size), (80, channels, 1, 1), kept, stride)
    for size, channels, kept, stride in [
        (10, 32, 8, 1),
        (10, 32, 8, 2),
        (24, 96, 32, 1),
        (10, 128, 32, 1),
        (10, 128, 29, 1),
        (5, 129, 20, 1),
        (5, 129, 19, 1),
        (5, 32, 80, 1),
        (10, 128, 78, 1),
        (10, 128, 79, 1),
        (1, 300, 80, 1),
        (1, 20000, 80, 1),
    ]
]
GROUPED = [
    ((4, 16, 10, 10), (16, per_group, kernel, kernel), 16 // per_group, stride)
    for per_group in (1, 4, 8)
    for kernel in (3, 5)
    for stride in (1, 2)
]
OTHER_DIMENSIONS = [
    ((4, 32, 6, 6, 6), (128, 32, 3, 3, 3), 11, 1),
    ((4, 32, 6, 6, 6), (128, 32, 3, 3, 3), 12, 1),
    ((1, 32, 6, 6, 6), (128, 32, 3, 3, 3), 90, 1),
    ((4, 32, 6, 6, 6), (128, 32, 3, 3, 3), 90, 2),
    *[
        ((4, 8, *[6] * dims), (8, 8 // groups, *[kernel] * dims), groups if groups > 1 else 4, s)
        for dims in (1, 3)
        for groups in (1, 2, 8)
        for kernel, s in ((1, 1), (3, 2), (5, 1))
    ],
]
EVERY = [*ORDINARY, *POINTWISE, *GROUPED, *OTHER_DIMENSIONS]


def params(x_shape, w_shape, stride):
    dims = len(x_shape) - 2
    padding = tuple(n // 2 for n in w_shape[2:])
    return ConvParams((stride,) * dims, padding, (1,) * dims, x_shape[1] // w_shape[1])


def kept_channels(x, w, p, kept):
    """As a layer's backward has them; ``kept`` of all channels."""
    convolution = (torch.conv1d, torch.conv2d, torch.conv3d)[x.dim() - 3]
    dy = torch.randn_like(convolution(x, w, None, p.stride, p.padding, p.dilation, p.groups))
    k = kept if p.groups in (1, w.shape[0]) else kept // p.groups
    return KeptChannels(dy, x, w, p, k, l1_scores)


@pytest.fixture(params=[True, False], ids=["AVX-512", "AVX2"])
def avx512(request, monkeypatch):
    monkeypatch.setattr(heuristics, "_AVX512", request.param)


@pytest.fixture(params=[True, False], ids=["C", "torch"])
def by_c(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(native, "is_available", lambda t: False)


@pytest.mark.usefixtures("avx512", "by_c")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("x_shape, w_shape, kept, stride", EVERY, ids=str)
def test_the_way_exists_and_its_gradient_is_the_reference(x_shape, w_shape, kept, stride, last):
    layout = LAST[len(x_shape) - 2] if last else torch.contiguous_format
    x = torch.randn(x_shape).contiguous(memory_format=layout)
    w = torch.randn(w_shape) / w_shape[1]
    p = params(x_shape, w_shape, stride)
    layer = kept_channels(x, w, p, kept)
    chosen = heuristics.by_rule(layer)
    dx, dw = algorithms.candidates(x, w, p)
    assert chosen.dx in dx and chosen.dw in dw

    found = chosen.run(layer, (True, True, True))
    expected = reference.sparse_backward(layer.whole_dy, x, w, p, layer.k)
    for got, like in zip(found, expected, strict=True):
        torch.testing.assert_close(got, like, rtol=1e-4, atol=1e-4 * like.abs().max().item())
    assert int(found[2].ne(0).sum()) == layer.number


@pytest.mark.usefixtures("avx512", "by_c")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kernel, stride", [(1, 1), (1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("size", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rules_name_ways_that_the_layer_has(layout, groups, kernel, stride, size, dtype):
    x = torch.zeros(4, 8, size, size, dtype=dtype).contiguous(memory_format=layout)
    w = torch.zeros(8, 8 // groups, kernel, kernel, dtype=dtype)
    p = params(x.shape, w.shape, stride)
    dx, dw = algorithms.candidates(x, w, p)
    chosen = heuristics.by_rule(kept_channels(x, w, p, 4))
    assert chosen.dx in dx and chosen.dw in dw


@pytest.mark.skipif(native.build.find_compiler() is None, reason="there is no C compiler")
@pytest.mark.usefixtures("avx512")
@pytest.mark.parametrize("x_shape, w_shape, kept, stride", EVERY, ids=str)
def test_no_c_function_where_a_derivative_of_the_backward_is_asked_for(
    x_shape, w_shape, kept, stride
):
    x, w = torch.randn(x_shape), torch.randn(w_shape)
    p = params(x_shape, w_shape, stride)
    assert kept_channels(x, w, p, kept).can_be_direct
    chosen = heuristics.by_rule(kept_channels(x, w.requires_grad_(), p, kept))
    assert {"direct", "rows"}.isdisjoint(chosen)
