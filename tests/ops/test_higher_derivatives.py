"""gradcheck, double backward, gradient penalties and retained graphs."""

import contextlib

import oracle
import pytest
import torch

from ssprop_patch import functional

from .convolutions import SSP, assert_close, by, by_each

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # by torch.func itself
]
SMALL = [
    (1, dict(groups=1), (2, 3, 6), (4, 3, 3)),
    (2, dict(groups=1, stride=2, padding=1), (2, 2, 5, 5), (4, 2, 3, 3)),
    (2, dict(groups=1, stride=2), (2, 3, 5, 4), (4, 3, 1, 1)),
    (2, dict(groups=2, padding="same"), (2, 4, 4, 4), (4, 2, 2, 3)),
    (2, dict(groups=4, dilation=2), (1, 4, 5, 5), (4, 1, 2, 2)),
    (2, dict(groups=4), (1, 8, 4, 4), (4, 2, 3, 3)),
    (3, dict(groups=1), (1, 2, 3, 3, 3), (4, 2, 2, 2, 2)),
]
KEPT = torch.tensor([False, True, True, False])


def _fixed(dy):
    return KEPT.to(dy.dtype)


def _small(x_shape, w_shape):
    x, w, b = (
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in (x_shape, w_shape, w_shape[:1])
    )
    return x, w, b


@pytest.mark.parametrize("selection", ["l1", "l2", _fixed], ids=["l1", "l2", "fixed"])
@pytest.mark.parametrize("dims, geometry, x_shape, w_shape", SMALL)
def test_gradcheck_where_only_kept_channels_reach_the_loss(
    dims, geometry, x_shape, w_shape, selection
):
    # There the sparse gradient is the gradient; elsewhere it is not meant to be.
    def kept(x, w, b):
        return conv(x, w, b)[:, KEPT]

    def conv(x, w, b):
        return SSP[dims](x, w, b, **geometry, drop_rate=0.5, selection=selection)

    inputs = _small(x_shape, w_shape)
    assert torch.autograd.gradcheck(kept, inputs)
    if selection is _fixed:  # the check is not blind (by l1 and l2 the one entry it asks for wins)
        assert not torch.autograd.gradcheck(conv, inputs, raise_exception=False)


@pytest.mark.parametrize("dims, geometry, x_shape, w_shape", SMALL)
def test_double_backward_is_the_derivative_of_the_sparse_backward(dims, geometry, x_shape, w_shape):
    # gradgradcheck differentiates (x, w, b, dy) -> (dX, dW, db) numerically.
    def conv(x, w, b):
        return SSP[dims](x, w, b, **geometry, drop_rate=0.5, selection=_fixed)

    assert torch.autograd.gradgradcheck(conv, _small(x_shape, w_shape))


@pytest.mark.parametrize("selection", ["l1", _fixed], ids=["l1", "fixed"])
@pytest.mark.parametrize("kernel", [None, "gather", "mask", "each"])
@pytest.mark.parametrize("dims, geometry, x_shape, w_shape", SMALL)
def test_gradient_penalty(dims, geometry, x_shape, w_shape, kernel, selection):
    inputs = _small(x_shape, w_shape)

    def penalty(conv):
        y = conv(*inputs)
        grads = torch.autograd.grad((y.tanh() * y.cos()).sum(), inputs, create_graph=True)
        loss = sum(g.pow(3).sum() for g in grads)
        return loss, torch.autograd.grad(loss, inputs)

    def sparse(x, w, b):
        return SSP[dims](x, w, b, **geometry, drop_rate=0.5, selection=selection)

    def choose_from(dy):
        if selection is _fixed:
            return KEPT
        choice = oracle.choose(dy, geometry["groups"], 0.5)
        assert choice.gap > 1e-6
        return choice.keep

    def masked(x, w, b):
        return oracle.conv(dims, x, w, b, **geometry, choose_from=choose_from)

    expected_loss, expected = penalty(masked)

    def check():
        loss, grads = penalty(sparse)
        assert_close(loss.detach(), expected_loss.detach())
        for grad, want in zip(grads, expected, strict=True):
            assert_close(grad, want)

    if kernel == "each":
        for _ in by_each():
            check()
    else:
        with contextlib.nullcontext() if kernel is None else by(kernel):
            check()


def test_autograd_grad_of_some_inputs_only():
    x, w, b = _small(*SMALL[1][2:])
    dy = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    choice = oracle.choose(dy, 1, 0.5)
    expected = oracle.gradients(x.detach(), w.detach(), b, dy, choice.keep, stride=2, padding=1)
    for i, t in enumerate((x, w, b)):
        y = functional.conv2d(x, w, b, stride=2, padding=1, drop_rate=0.5)
        (grad,) = torch.autograd.grad(y, t, dy)
        assert_close(grad, expected[i])


def test_backward_twice_through_a_retained_graph_accumulates():
    x, w, b = _small(*SMALL[1][2:])
    y = functional.conv2d(x, w, b, stride=2, padding=1, drop_rate=0.5)
    dy = torch.randn_like(y)
    y.backward(dy, retain_graph=True)
    once = w.grad.clone()
    y.backward(dy)
    assert torch.equal(w.grad, once + once)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)


def test_a_weight_changed_in_place_before_the_backward_is_an_error():
    x, w, b = _small(*SMALL[1][2:])
    y = functional.conv2d(x, w, b, drop_rate=0.5).sum()
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.backward()
