"""The closed form of a convolution's FLOPs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssprop_patch import functional
from ssprop_patch.core.rule import BackwardRule
from ssprop_patch.core.selection import l1_scores
from ssprop_patch.flops.count import ConvFlops, conv_flops
from ssprop_patch.flops.torch_counter import tell_torch
from ssprop_patch.ops import custom_ops
from ssprop_patch.schedule import settings

from .networks import counted

GEOMETRIES = [
    (1, (2, 3, 17), 8, 3, {}),
    (1, (2, 4, 17), 6, 5, {"stride": 2, "padding": 2}),
    (2, (2, 3, 9, 11), 8, 3, {"padding": 1}),
    (2, (3, 8, 12, 12), 5, 1, {}),
    (2, (2, 4, 16, 16), 8, 3, {"stride": 2, "padding": 1}),
    (2, (2, 4, 16, 16), 8, 3, {"dilation": 3}),
    (2, (1, 4, 15, 16), 8, (3, 5), {"stride": (2, 1), "padding": "valid"}),
    (3, (2, 3, 5, 6, 7), 4, 3, {"padding": 1}),
    (3, (1, 4, 8, 8, 8), 4, 2, {"stride": 2}),
]


@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize(("dims", "shape", "out", "kernel", "options"), GEOMETRIES)
def test_dense_formula_agrees_with_torchs_counter(dims, shape, out, kernel, options, need_x):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](shape[1], out, kernel, **options)
    y, forward, backward = counted(dims, torch.randn(shape, requires_grad=need_x), conv)
    flops = conv_flops(shape, conv.weight.shape, y.shape, output_mask=(need_x, True, False))
    assert flops == ConvFlops(forward, backward, backward, out)
    biased = conv_flops(shape, conv.weight.shape, y.shape, output_mask=(need_x, True, True))
    assert biased.dense_backward - backward == y.numel()


@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize(("dims", "shape", "out", "kernel", "options"), GEOMETRIES)
def test_sparse_formula_agrees_with_what_the_sparse_backward_runs(
    dims, shape, out, kernel, options, need_x
):
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](shape[1], out, kernel, **options)
    sparse = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]

    def conv(x):
        return sparse(x, layer.weight, None, **options, drop_rate=0.6)

    y, forward, backward = counted(dims, torch.randn(shape, requires_grad=need_x), conv)
    flops = conv_flops(
        shape, layer.weight.shape, y.shape, drop_rate=0.6, output_mask=(need_x, True, False)
    )
    assert (flops.forward, flops.backward) == (forward, backward + 2 * y.numel())


def test_bias_importance_and_needs_by_hand():
    x, w, y = (2, 3, 8, 8), (10, 3, 3, 3), (2, 10, 8, 8)
    m, n = 2 * 8 * 8, 3 * 9
    full = conv_flops(x, w, y, drop_rate=0.7, output_mask=(True, True, True))
    assert full.forward == 2 * m * n * 10
    assert full.dense_backward == 4 * m * n * 10 + m * 10
    assert full.kept == 3
    assert full.backward == 4 * m * n * 3 + m * 3 + 2 * m * 10
    assert conv_flops(x, w, y, drop_rate=0.7, output_mask=(False, False, True)).backward == m * 23
    nothing = conv_flops(x, w, y, drop_rate=0.7, output_mask=(False, False, False))
    assert (nothing.dense_backward, nothing.backward) == (0, 0)
    assert conv_flops(x[1:], w, y[1:]).forward == full.forward // 2  # unbatched


def test_grouped_keeps_the_same_number_in_each_group():
    flops = conv_flops((2, 12, 8, 8), (20, 3, 3, 3), (2, 20, 8, 8), drop_rate=0.5)
    m, n = 2 * 64, 3 * 9
    assert flops.kept == 4 * 3  # 4 groups of 5 channels: int(2.5 + 0.5) of each
    assert flops.forward == 2 * m * n * 20
    assert flops.dense_backward == 4 * m * n * 20
    assert flops.backward == 4 * m * n * 12 + 2 * m * 20


def test_depthwise_keeps_groups():
    flops = conv_flops((1, 10, 6, 6), (10, 1, 3, 3), (1, 10, 6, 6), drop_rate=0.75)
    assert flops.kept == 3
    assert flops.dense_backward == 4 * 36 * 9 * 10
    assert flops.backward == 4 * 36 * 9 * 3 + 2 * 36 * 10


def test_channel_multiplier_is_grouped():
    flops = conv_flops((1, 4, 6, 6), (8, 1, 3, 3), (1, 8, 6, 6), drop_rate=0.9)
    assert flops.kept == 4  # one of two in each of four groups


@given(st.integers(1, 40), st.floats(0, 1, exclude_max=True), st.booleans(), st.booleans())
def test_sparse_costs_what_is_kept_and_the_importance(channels, rate, need_x, need_b):
    needs = (need_x, True, need_b)
    args = ((2, 5, 7), (channels, 5, 3), (2, channels, 5))
    flops = conv_flops(*args, drop_rate=rate, output_mask=needs)
    assert all(type(n) is int for n in (flops.forward, flops.dense_backward, flops.backward))
    importance = 20 * channels if flops.kept < channels else 0
    per_channel, rest = divmod(flops.dense_backward, channels)
    assert rest == 0 and flops.backward == per_channel * flops.kept + importance


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no convolution has input"):
        conv_flops((2, 3, 8), (4, 2, 3), (2, 4, 6))
    with pytest.raises(ValueError, match="no convolution has input"):
        conv_flops((2, 3, 8), (4, 3, 3), (2, 5, 6))
    with pytest.raises(ValueError, match="drop_rate"):
        conv_flops((2, 3, 8), (4, 3, 3), (2, 4, 6), drop_rate=1.5)


def test_torchs_counter_knows_the_opaque_operator():
    tensors = (
        settings.rate_tensor(0.75),
        settings.token_of(settings.LayerSettings(BackwardRule(l1_scores))),
    )
    dy, x, w = torch.randn(2, 8, 6, 6), torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3)
    geometry = ([1, 1], [1, 1], [1, 1], 1, False, [0, 0], *tensors)
    tell_torch()
    for mask in ([True, True, True], [False, True, False]):
        with FlopCounterMode(display=False) as counter:
            custom_ops.conv_backward(dy, x, w, *geometry, mask)
        assert counter.get_total_flops() == sum(mask[:2]) * 2 * (2 * 36) * (4 * 9) * 2
