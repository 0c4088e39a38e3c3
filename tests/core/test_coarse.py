"""The coarse remainder against autograd through a twin that is written with loops (float64)."""

import pytest
import torch

from core.twins import convolve, layers, twin, twin_gradients
from ssprop_patch import Coarse
from ssprop_patch.core.cells import Cells, count_blocks, divide
from ssprop_patch.core.coarse import CoarseTwin
from ssprop_patch.core.geometry import ConvParams

close = dict(rtol=1e-11, atol=1e-11)


def of_twin(layer):
    x, dy, w = layer.x, layer.dy, layer.w
    made = CoarseTwin.of(dy, x, w, layer.params, layer.block)
    with torch.no_grad():
        dx, dw = made.backward(made.pool_output(dy), x, w, True, True)
    return made, dx, dw


@pytest.mark.parametrize("seed", range(8))
def test_any_layer(seed):
    for layer in layers(25, seed):
        made, dx, dw = of_twin(layer)
        expected = twin_gradients(layer.dy, layer.x, layer.w, layer.params, layer.block)
        message = str(layer).replace("{", "").__add__
        torch.testing.assert_close(made.of_x.spread(dx), expected[0], **close, msg=message)
        torch.testing.assert_close(made.spread_taps(dw, layer.w), expected[1], **close, msg=message)
        with torch.no_grad():
            added = made.of_x.add_spread(torch.ones_like(layer.x), dx)
        torch.testing.assert_close(added, 1 + expected[0], **close, msg=message)


def test_the_layers_tried_are_of_every_kind():
    found = [layer for seed in range(8) for layer in layers(25, seed)]
    assert {layer.w.dim() - 2 for layer in found} == {1, 2, 3}
    assert {layer.transposed for layer in found} == {False, True}
    assert {layer.params.groups for layer in found} == {1, 2, 4}
    depthwise = [layer for layer in found if layer.params.groups == layer.dy.shape[1] > 1]
    assert {layer.transposed for layer in depthwise} == {False, True}
    kernels = {n for layer in found for n in layer.w.shape[2:]}
    blocks = {layer.block for layer in found}
    assert (kernels, blocks) == ({1, 2, 3, 4}, {2, 3, 4})
    assert any(layer.dy.shape[-1] % layer.block for layer in found)


@pytest.mark.parametrize(
    "size, kernel, stride, padding",
    [(24, 3, 1, 1), (8, 3, 2, 1), (4, 3, 1, 1), (7, 5, 1, 2), (2, 5, 1, 2), (1, 3, 1, 1)],
)
def test_of_a_constant_gradient_and_input_the_sums_are_the_convolutions_own(
    size, kernel, stride, padding
):
    """Also where much of the kernel lies in the padding: there a plain sum of taps is too large."""
    x = torch.ones(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    w = torch.rand(5, 3, kernel, kernel).double().requires_grad_()
    p = ConvParams((stride,) * 2, (padding,) * 2, (1, 1), 1)
    y = convolve(x, w, p)
    torch.testing.assert_close(twin(x, w, p, y.shape[2:], 4).sum((2, 3)), y.sum((2, 3)), **close)
    dy = torch.ones_like(y)
    expected_dx, expected_dw = torch.autograd.grad(y, (x, w), dy)
    with torch.no_grad():
        made = CoarseTwin.of(dy, x, w, p, 4)
        dx, dw = made.backward(made.pool_output(dy), x, w, True, True)
        dx = made.of_x.spread(dx)
        torch.testing.assert_close(dx.sum((2, 3)), expected_dx.sum((2, 3)), **close)
        torch.testing.assert_close(made.spread_taps(dw, w), expected_dw, **close)


def test_pooling_is_linear_and_takes_any_number_of_channels():
    made = CoarseTwin.of(*(torch.zeros(2, c, 7, 9) for c in (5, 3)), torch.zeros(5, 3, 1, 1), P, 4)
    a, b = torch.randn(2, 11, 7, 9).double(), torch.randn(2, 11, 7, 9).double()
    pooled = made.pool_output(a - 2 * b)
    assert pooled.shape == (2, 11, 2, 2)
    torch.testing.assert_close(pooled, made.pool_output(a) - 2 * made.pool_output(b), **close)
    torch.testing.assert_close(pooled.sum((2, 3)), (a - 2 * b).sum((2, 3)), **close)


P = ConvParams((1, 1), (0, 0), (1, 1), 1)


def test_what_is_not_needed_is_not_computed():
    layer = next(layers(1, 0))
    made, dx, dw = of_twin(layer)
    pooled = made.pool_output(layer.dy)
    for needs in [(True, False), (False, True), (False, False)]:
        for found, all_of_it, needed in zip(
            made.backward(pooled, layer.x, layer.w, *needs), (dx, dw), needs, strict=True
        ):
            assert (found is not None) == needed
            assert not needed or torch.equal(found, all_of_it)


def test_it_is_differentiable():
    """A double backward goes through it."""
    x, w = torch.randn(1, 2, 5).double(), torch.randn(3, 2, 2).double()
    e = torch.randn(1, 3, 4).double()

    def backward(e, x, w):
        made = CoarseTwin.of(e, x, w, ConvParams((1,), (0,), (1,), 1), 3)
        dx, dw = made.backward(made.pool_output(e), x, w, True, True)
        return made.of_x.add_spread(x * 2, dx), dw

    assert torch.autograd.gradcheck(backward, [t.requires_grad_() for t in (e, x, w)])


def test_cells_are_clipped_where_they_reach_over_an_edge():
    cells = Cells((5,), (-1,), (4,), (2,))
    ones = torch.ones(1, 1, 5)
    assert cells.sums(ones).tolist() == [[[3, 2]]]
    assert cells.inside(ones).tolist() == [3, 2]
    assert cells.spread(torch.tensor([[[7.0, 8.0]]])).tolist() == [[[7, 7, 7, 8, 8]]]
    assert not cells.are_whole() and Cells((8,), (0,), (4,), (2,)).are_whole()
    # One that lies outside altogether holds nothing, and divides by 1.
    assert Cells((2,), (-4,), (4,), (2,)).inside(ones).tolist() == [1, 2]


def test_a_map_is_divided_into_blocks_of_about_that_size():
    assert count_blocks((9, 3, 8), 4) == (2, 1, 2)
    assert count_blocks((0, 1), 4) == (0, 1)
    for block in range(2, 10):
        for n in range(1, 60):
            size, number = divide(n, block)
            assert (number - 1) * size < n <= number * size  # none is empty
            assert size <= 1.5 * block and (2 * size > block or size == n)


def test_common_maps_have_no_slivers():
    sizes = {n: divide(n, 4) for n in (4, 5, 7, 10, 14, 20, 28, 40, 56, 112)}
    assert sizes == {
        4: (4, 1),
        5: (5, 1),
        7: (4, 2),
        10: (5, 2),
        14: (5, 3),
        20: (4, 5),
        28: (4, 7),
        40: (4, 10),
        56: (4, 14),
        112: (4, 28),
    }


@pytest.mark.parametrize("wrong", [1, 0, -4, 2.5, "4", None, True])
def test_a_block_is_a_whole_number_of_at_least_2(wrong):
    with pytest.raises((TypeError, ValueError), match="block_size"):
        Coarse(wrong)
    assert Coarse().block_size == 4
