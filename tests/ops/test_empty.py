"""Tensors without elements: nothing fails where torch does not, and the results are torch's."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ssprop_patch as ssp
from ssprop_patch import functional
from ssprop_patch.core.rule import BackwardRule
from ssprop_patch.core.selection import l1_scores
from ssprop_patch.ops import custom_ops, native
from ssprop_patch.schedule import settings

SELECTIONS = {
    "l1": "l1",
    "l2": "l2",
    "random": "random",
    "function": lambda dy: dy.abs().sum([0, *range(2, dy.dim())]),
}


@pytest.fixture(params=["C", "torch"], autouse=True)
def way(request, monkeypatch):
    """With the C functions, where there is a compiler, and without."""
    if request.param == "torch":
        monkeypatch.setattr(native, "is_available", lambda t: False)


def linear():
    for bias in (True, False):
        for features, shapes in (
            ((6, 8), [(0, 6), (0, 3, 6), (3, 0, 6), (2, 0, 3, 6)]),
            ((0, 8), [(3, 0), (0, 0), (2, 3, 0), (0,)]),
            ((6, 0), [(3, 6), (0, 6), (6,)]),
            ((0, 0), [(3, 0), (0, 0)]),
        ):
            for shape in shapes:
                yield nn.Linear, (*features, bias), {}, shape


def convolutions():
    channels = ((4, 6, 1), (4, 6, 2), (4, 4, 4), (4, 8, 4), (8, 4, 4))
    kinds = itertools.product(("Conv", "ConvTranspose"), (1, 2, 3), channels, ((1, 0), (3, 1)))
    for name, dims, (c_in, c_out, groups), (kernel, padding) in kinds:
        size = (5,) * dims
        for shape in (
            (0, c_in, *size),
            (0, c_in, *[1] * dims),
            (2, c_in, *[0] * dims),
            (2, c_in, 0, *size[1:]),
            (c_in, *[0] * dims),
            (2, 0, *size),
        ):
            more = {"padding": padding, "groups": groups}
            yield getattr(nn, f"{name}{dims}d"), (c_in, c_out, kernel), more, shape
        yield getattr(nn, f"{name}{dims}d"), (0, 4, 1), {}, (2, 0, *size)
        yield getattr(nn, f"{name}{dims}d"), (4, 0, 1), {}, (2, 4, *size)


def gradients(kind, arguments, more, shape, dtype, last, selection):
    """Return what a layer computes; or None, if its forward is an error."""
    torch.manual_seed(0)
    layer = kind(*arguments, **more).to(dtype)
    if selection is not None:
        ssp.convert(layer, 0.5, selection=selection, types=kind, strict=False)
    x = torch.randn(shape, dtype=dtype)
    if last and x.dim() > 2:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    x.requires_grad_()
    try:
        y = layer(x)
    except (RuntimeError, ValueError, IndexError):
        return None
    y.backward(torch.randn_like(y))
    return y, x.grad, *(p.grad for p in layer.parameters())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore:.*converted")
@pytest.mark.parametrize(
    "selection, dtype",
    [
        ("l1", torch.float32),
        ("l2", torch.float64),
        ("random", torch.float32),
        ("function", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("kinds", [linear, convolutions])
def test_layers_compute_what_torch_does(kinds, dtype, selection):
    compared = 0
    for case in kinds():
        last = len(case[3]) % 2 == 0
        expected = gradients(*case, dtype, last, None)
        got = gradients(*case, dtype, last, SELECTIONS[selection])
        assert (got is None) == (expected is None), case
        if expected is None:
            continue
        compared += 1
        for one, two in zip(got, expected, strict=True):
            assert one.shape == two.shape and one.stride() == two.stride(), case
            assert one.dtype == two.dtype and not one.isnan().any(), case
        for one, two in zip(got[1:], expected[1:], strict=True):
            # All zeros, but for a bias where there are rows without features.
            assert ((one == 0) | torch.isclose(one, two)).all(), case
    assert compared >= 20


@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (0, 0), (2, 0, 6), (2, 3, 0)])
@pytest.mark.parametrize("features", [0, 8])
def test_the_opaque_operator_of_linear_layers(shape, features):
    tensors = (
        settings.rate_tensor(0.5),
        settings.token_of(settings.LayerSettings(BackwardRule(l1_scores))),
    )
    x, w = torch.randn(shape), torch.randn(features, shape[-1])
    dy = torch.randn(*shape[:-1], features)
    dx, dw, db = custom_ops.linear_backward(dy, x, w, *tensors, [True] * 3)
    assert dx.shape == x.shape and dw.shape == w.shape and db.shape == (features,)
    assert not dx.any() and not dw.any()


@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (2, 0, 6)])
def test_the_functional_form(shape):
    x, w = torch.randn(shape, requires_grad=True), torch.randn(8, shape[-1], requires_grad=True)
    functional.linear(x, w, drop_rate=0.5).sum().backward()
    assert x.grad.shape == x.shape and not w.grad.any()
    x = torch.randn(0, 3, 5, 5, requires_grad=True)
    w = torch.randn(8, 3, 3, 3, requires_grad=True)
    y = functional.conv2d(x, w, drop_rate=0.5)
    assert y.shape == F.conv2d(x, w).shape
    y.sum().backward()
    assert x.grad.shape == x.shape and not w.grad.any()


def test_a_second_derivative():
    x = torch.randn(0, 6, dtype=torch.float64, requires_grad=True)
    layer = ssp.convert(nn.Linear(6, 8).double(), 0.5, types=nn.Linear)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    dx.sum().backward()
    assert not layer.weight.grad.any() and x.grad.shape == x.shape
