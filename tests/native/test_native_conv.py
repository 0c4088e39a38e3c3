"""The C functions for convolutions against the dense backward on a masked gradient."""

import itertools
import math

import pytest
import torch

from ssprop_patch.core.geometry import ConvParams
from ssprop_patch.ops import algorithms, native
from ssprop_patch.ops.channel_gradients import KeptChannels
from ssprop_patch.ops.native import build, conv

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C compiler")
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-12}


def random(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def lying(t, last):
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if last else t.contiguous()


def kept_channels(generator, channels, groups, kept):
    """``kept`` channels of each group; of all where each is a group."""
    size = channels if groups == channels else channels // groups
    sets = [
        torch.randperm(size, generator=generator)[:kept].sort().values + first
        for first in range(0, channels, size)
    ]
    return torch.cat(sets)


def check(
    size,
    groups,
    inputs,
    outputs,
    kept,
    kernel,
    stride=1,
    padding=0,
    dilation=1,
    *,
    n=2,
    dtype=torch.float64,
    x_last=False,
    dy_last=False,
    w_last=False,
):
    """Compare dX and dW with those of the dense kernel on a dy whose dropped channels are 0."""
    generator = torch.Generator().manual_seed(0)
    dims = len(size)
    stride, padding, dilation = (
        (value,) * dims if isinstance(value, int) else value
        for value in (stride, padding, dilation)
    )
    x = random(generator, n, groups * inputs, *size)
    w = random(generator, groups * outputs, inputs, *kernel)
    index = kept_channels(generator, groups * outputs, groups, kept)
    out = (
        (length + 2 * pad - d * (taps - 1) - 1) // s + 1
        for length, pad, d, taps, s in zip(size, padding, dilation, kernel, stride, strict=True)
    )
    dy = random(generator, n, w.shape[0], *out)
    # The channels that have the largest sums, too, for the function that chooses them.
    dy[:, index] *= 100
    masked = torch.zeros_like(dy).index_copy_(1, index, dy[:, index])
    expected_dx, expected_dw, expected_db = torch.ops.aten.convolution_backward(
        masked,
        x,
        w,
        [w.shape[0]],
        stride,
        padding,
        dilation,
        False,
        [0] * dims,
        groups,
        [True, True, True],
    )
    x, w = lying(x.to(dtype), x_last), lying(w.to(dtype), w_last)
    params = ConvParams(stride, padding, dilation, groups)
    args = (lying(dy[:, index].to(dtype), dy_last), x, w, index, params)
    assert native.is_available(x) and native.is_available(w) and conv.is_supported(x, w)
    dx, dw, db = conv.conv_dx(*args), conv.conv_dw(*args), conv.conv_db(*args)
    b, whole_dy = w.new_empty(w.shape[0]), lying(dy.to(dtype), dy_last)
    order, needed = 1 + sum(size) % 2, (True, True, True)
    chosen, whole = conv.conv_backward(whole_dy, x, w, params, kept, order, needed)
    assert torch.equal(chosen, index)
    expected_by = zip((x, w, b), (expected_dx, expected_dw, expected_db), strict=True)
    results = [*expected_by] * 2
    for got, (like, expected) in zip((*whole, dx, dw, db), results, strict=True):
        assert got.dtype == dtype and got.shape == like.shape and got.stride() == like.stride()
        tolerance = TOLERANCES[dtype] * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)
    return dx, dw


FORMATS = [
    dict(zip(("x_last", "dy_last", "w_last"), f, strict=True))
    for f in itertools.product([False, True], repeat=3)
]


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1)])
@pytest.mark.parametrize("padding, dilation", [(0, 1), (1, 1), ((3, 0), 2), (2, (1, 3))])
@pytest.mark.parametrize("groups", [1, 3])
def test_geometry(dtype, layout, stride, padding, dilation, groups):
    check((11, 14), groups, 4, 5, 2, (3, 3), stride, padding, dilation, dtype=dtype, **layout)


@pytest.mark.parametrize("layout", FORMATS[::3], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (5, 5), (7, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_kernels_of_any_size(layout, kernel, stride):
    padding = tuple(n // 2 for n in kernel)
    check((9, 8), 6, 1, 1, 4, kernel, stride, padding, **layout)
    check((9, 8), 2, 3, 4, 1, kernel, stride, padding, **layout)
    check((9, 8), 1, 3, 4, 2, kernel, stride, padding, **layout)


@pytest.mark.parametrize("inputs", range(1, 10))
@pytest.mark.parametrize("kept", range(1, 10))
def test_every_number_of_channels_fills_its_registers(inputs, kept):
    check((6, 5), 2, inputs, 9, kept, (3, 2), padding=1)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("inputs", [3, 64, 77, 130, 201])
@pytest.mark.parametrize("stride", [1, 2])
def test_more_input_channels_than_are_computed_at_a_time(threads, last, groups, inputs, stride):
    check((7, 6), groups, inputs, 9, 4, (3, 3), stride, 1, n=3, x_last=last, dy_last=last)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kept", [33, 34, 70, 101])
@pytest.mark.parametrize("stride", [1, 2])
def test_more_terms_than_are_computed_at_a_time(last, kept, stride):
    check((7, 6), 1, 9, 101, kept, (3, 3), stride, 1, x_last=last, dy_last=last)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("size, kernel", [((1, 1), (1, 1)), ((6, 5), (3, 3))], ids=str)
def test_only_what_is_needed(layout, needed, size, kernel):
    generator = torch.Generator().manual_seed(0)
    x, w = random(generator, 3, 5, *size), random(generator, 9, 5, *kernel)
    dy = random(generator, 3, 9, *(n - m + 1 for n, m in zip(size, kernel, strict=True)))
    x, dy, w = (
        lying(t, layout[name]) for t, name in ((x, "x_last"), (dy, "dy_last"), (w, "w_last"))
    )
    params = ConvParams((1, 1), (0, 0), (1, 1), 1)
    index, all_of_them = conv.conv_backward(dy, x, w, params, 4, 2, (True, True, True))
    again, grads = conv.conv_backward(dy, x, w, params, 4, 2, needed)
    assert torch.equal(index, again)
    for grad, like, need in zip(grads, all_of_them, needed, strict=True):
        assert torch.equal(grad, like) if need else grad is None


def test_one_position_between_padding_is_no_matrix_product():
    check((1, 1), 1, 5, 9, 4, (1, 1), stride=3, padding=1)
    check((1, 1), 1, 5, 9, 4, (1, 1), stride=3, padding=(0, 1))


def test_one_channel_is_no_depthwise_convolution():
    check((7, 6), 1, 5, 1, 1, (3, 3), padding=1)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("kept", [1, 7, 40])
def test_depthwise(threads, last, inputs, kept):
    check((10, 10), 40, inputs, 1, kept, (3, 3), padding=1, n=3, x_last=last, dy_last=last)


def test_depthwise_images_larger_than_what_a_thread_takes_of_them(threads):
    check((30, 31), 150, 1, 1, 149, (3, 3), padding=1, n=6, x_last=True, dy_last=True)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("n", [1, 7, 50])
def test_more_images_than_are_computed_at_a_time(threads, last, n):
    # 256 KiB hold a few of these; 50 leave a part of the last handful.
    check((20, 20), 5, 8, 8, 2, (3, 3), padding=1, n=n, x_last=last, dy_last=last)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size, kernel", [((35,), (1,)), ((7, 5), (1, 1))], ids=str)
def test_images_with_no_gap_between_them(threads, last, size, kernel):
    check(size, 12, 3, 6, 2, kernel, n=401, x_last=last, dy_last=last)


@pytest.mark.parametrize("last", [False, True])
def test_images_larger_than_what_is_computed_at_a_time(last):
    check((200, 210), 2, 2, 4, 1, (3, 3), 2, 1, n=2, x_last=last, dy_last=last)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_one_spatial_dimension(last, stride):
    check((33,), 4, 3, 6, 2, (5,), stride, 2, n=3, x_last=last, dy_last=last)


@pytest.mark.parametrize("layout", FORMATS[::3], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, (1, 2, 3)])
@pytest.mark.parametrize("padding, dilation", [(0, 1), (1, 1), ((2, 0, 1), (1, 2, 1)), (3, 1)])
def test_three_spatial_dimensions(layout, groups, stride, padding, dilation):
    check((5, 6, 7), groups, 5, 6, 2, (3, 2, 3), stride, padding, dilation, n=3, **layout)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3), (3, 1, 1)])
def test_depthwise_in_three_spatial_dimensions(threads, last, kernel):
    padding = tuple(n // 2 for n in kernel)
    check((4, 6, 5), 12, 1, 1, 5, kernel, 1, padding, n=7, x_last=last, dy_last=last)


def test_a_gradient_that_lies_in_no_format():
    generator = torch.Generator().manual_seed(0)
    x, w = random(generator, 2, 8, 6, 6), random(generator, 8, 1, 3, 3)
    index = torch.tensor([1, 4, 6])
    dy = random(generator, 2, 3, 6, 12)[..., ::2]
    args = (x, w, index, ConvParams((1, 1), (1, 1), (1, 1), 8))
    assert conv.conv_dx(dy, *args).equal(conv.conv_dx(dy.contiguous(), *args))
    assert conv.conv_dw(dy, *args).equal(conv.conv_dw(dy.contiguous(), *args))


@pytest.mark.parametrize("groups", [1, 20])
def test_the_number_of_threads_changes_no_bit_of_contiguous_tensors(groups, monkeypatch):
    found = []
    for number in (1, 2, 3):
        monkeypatch.setattr(conv, "threads_for", lambda *args, number=number: number)
        sizes = ((20, 20), groups, 80 // groups, 8, 2, (3, 3))
        found.append(check(*sizes, padding=1, n=30, dtype=torch.float32))
    for dx, dw in found[1:]:
        assert dx.equal(found[0][0]) and dw.equal(found[0][1])


def test_what_is_not_finite_stays_in_its_group():
    generator = torch.Generator().manual_seed(0)
    x, w = random(generator, 2, 8, 6, 6), random(generator, 8, 2, 3, 3)
    dy, index = random(generator, 2, 4, 6, 6), torch.tensor([0, 3, 4, 6])
    dy[0, 1] = math.inf
    x[1, 5] = math.nan
    args = (dy, x, w, index, ConvParams((1, 1), (1, 1), (1, 1), 4))
    assert conv.conv_dw(*args) is None  # a zero in a gap may have made a nan of it
    kept = KeptChannels(dy.new_zeros(2, 8, 6, 6).index_copy_(1, index, dy), x, w, args[-1], 1, len)
    kept.index = index
    dx, dw = conv.conv_dx(*args), algorithms.direct_dw(kept)
    assert not dx[0, 2:4].isfinite().any() and dx[0, [0, 1, *range(4, 8)]].isfinite().all()
    assert dx[1].isfinite().all()
    assert not dw[3].isfinite().any() and not dw[4, 1].isfinite().any()
    assert dw[[0, 1, 2, 5, 6, 7]].isfinite().all() and dw[4, 0].isfinite().all()


@pytest.mark.parametrize(
    "x, w",
    [
        (torch.zeros(2, 4, 1, 3, 3, 3), torch.zeros(4, 1, 1, 3, 3, 3)),
        (torch.zeros(0, 4, 3, 3), torch.zeros(4, 1, 3, 3)),
        (torch.zeros(2, 4, 3, 3), torch.zeros(4, 1, 3, 3, dtype=torch.float64)),
    ],
    ids=["4d", "no image", "two dtypes"],
)
def test_others_are_left_alone(x, w):
    assert not conv.is_supported(x, w)
