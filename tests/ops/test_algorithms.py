"""The ways of computing a gradient: second derivatives, small layers, rows, large products."""

import pytest
import torch

from ssprop_patch import functional, kernels
from ssprop_patch.ops import algorithms, native, pointwise
from ssprop_patch.ops.channel_ops import put_sums

from .layers import run


def test_a_choice_made_for_a_first_derivative_has_a_second_one(monkeypatch):
    def second_order():
        g = torch.Generator().manual_seed(0)
        x = torch.randn(2, 8, 6, 6, generator=g, dtype=torch.float64, requires_grad=True)
        w = torch.randn(8, 4, 3, 3, generator=g, dtype=torch.float64, requires_grad=True)
        y = functional.conv2d(x, w, groups=2, drop_rate=0.5)
        first = torch.autograd.grad(y.square().sum(), (x, w), create_graph=True)
        return torch.autograd.grad(sum(t.cos().sum() for t in first), (x, w))

    monkeypatch.setattr(kernels, "choose", lambda *args: algorithms.Algorithms("gather", "gather"))
    expected = second_order()
    monkeypatch.setattr(kernels, "choose", lambda *args: algorithms.Algorithms("direct", "direct"))
    for got, like in zip(second_order(), expected, strict=True):
        torch.testing.assert_close(got, like, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(native.build.find_compiler() is None, reason="there is no C compiler")
@pytest.mark.parametrize("size, kernel, groups", [(6, 1, 1), (6, 3, 2), (6, 3, 8), (1, 1, 1)])
@pytest.mark.parametrize("selection, calls", [("l1", 1), ("l2", 1), ("random", 0)])
def test_a_small_layer_is_one_call(size, kernel, groups, selection, calls, monkeypatch):
    made, real = [], algorithms.conv_backward
    monkeypatch.setattr(algorithms, "conv_backward", lambda *args: made.append(args) or real(*args))
    x = torch.randn(2, 8, size, size, requires_grad=True)
    w = torch.randn(8, 8 // groups, kernel, kernel, requires_grad=True)
    padding = kernel // 2
    y = functional.conv2d(x, w, padding=padding, groups=groups, drop_rate=0.5, selection=selection)
    y.backward(torch.randn_like(y))
    assert len(made) == calls


@pytest.mark.parametrize("kernel, groups", [(1, 1), (3, 1), (3, 2)])
def test_rows_of_a_layer_with_several_positions_are_the_ordinary_gradient(
    kernel, groups, monkeypatch
):
    monkeypatch.setattr(kernels, "choose", lambda *args: algorithms.Algorithms("rows", "rows"))
    assert run(kernel=kernel, groups=groups) < 1e-12
    monkeypatch.setattr(algorithms, "is_done_by_c", lambda t: False)
    assert run(kernel=kernel, groups=groups) < 1e-12


@pytest.mark.parametrize("samples", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("threads", [1, 3])
def test_large_products_are_added_up_on_the_way(samples, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    batches = []
    monkeypatch.setattr(
        pointwise,
        "put_sums",
        lambda parts, *args: batches.append(len(parts)) or put_sums(parts, *args),
    )
    monkeypatch.setattr(kernels, "choose", lambda *args: algorithms.Algorithms("matmul", "matmul"))
    assert run((samples, 512, 3, 3), c_out=1100) < 1e-11
    assert batches == [min(samples, threads)]
