"""The arguments of the functional form: what is refused, and what torch's forms mean."""

import math

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from ops.convolutions import SSP

from ssprop_patch import functional

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # by torch.func itself
]


def _call(**kwargs):
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    return functional.conv2d(x, torch.randn(4, 2, 3, 3), **kwargs)


@pytest.mark.parametrize(
    "rate, error",
    [
        ("0.5", TypeError),
        (None, TypeError),
        (True, TypeError),
        (False, TypeError),
        ([0.5], TypeError),
        (1j, TypeError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (-0.1, ValueError),
        (1.0, ValueError),
        (1, ValueError),
        (80, ValueError),
        (torch.tensor(math.nan), ValueError),
        (np.float64(1.5), ValueError),
    ],
    ids=repr,
)
def test_bad_drop_rate(rate, error):
    with pytest.raises(error, match=r"drop_rate must be .*\[0, 1\)"):
        _call(drop_rate=rate)


def test_a_percentage_is_recognised():
    with pytest.raises(ValueError, match=r"not a percentage.* 0\.8"):
        _call(drop_rate=80)


@pytest.mark.parametrize("rate", [0, 0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
def test_numbers_of_other_libraries_are_rates(rate):
    assert _call(drop_rate=rate).shape == (1, 4, 3, 3)


@pytest.mark.parametrize("selection", ["L1", "l3", ""])
def test_unknown_selection_names_the_known_ones(selection):
    with pytest.raises(ValueError, match=r"l1.*l2.*random"):
        _call(drop_rate=0.5, selection=selection)


@pytest.mark.parametrize("selection", [None, 1])
def test_a_selection_that_is_neither_name_nor_callable(selection):
    with pytest.raises(TypeError, match=r"selection must be .*callable"):
        _call(drop_rate=0.5, selection=selection)


@pytest.mark.parametrize(
    "scores",
    [
        lambda dy: dy,
        lambda dy: dy.mean(),
        lambda dy: dy.mean((0, 2, 3))[:3],
        lambda dy: [1.0] * 4,
        lambda dy: None,
        lambda dy: dy.mean((0, 2, 3))[None],
    ],
)
def test_a_selection_that_returns_the_wrong_shape(scores):
    y = _call(drop_rate=0.5, selection=scores)
    with pytest.raises(ValueError, match=r"one score per output channel.*\(4,\)"):
        y.sum().backward()


def test_complex_tensors():
    x = torch.randn(1, 2, 5, 5, dtype=torch.complex64, requires_grad=True)
    w = torch.randn(4, 2, 3, 3, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"real tensors.*drop_rate=0"):
        functional.conv2d(x, w, drop_rate=0.5)
    assert functional.conv2d(x, w, drop_rate=0).dtype == torch.complex64


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacrev", "vmap"])
def test_transforms_of_torch_func_are_refused_with_a_way_out(transform):
    x, w = torch.randn(1, 2, 5, 5), torch.randn(4, 2, 3, 3, requires_grad=True)

    def loss(x):
        return functional.conv2d(x, w, drop_rate=0.5).sum()

    call = {
        "grad": lambda: torch.func.grad(loss)(x),
        "vjp": lambda: torch.func.vjp(loss, x),
        "jvp": lambda: torch.func.jvp(loss, (x,), (x,)),
        "jacrev": lambda: torch.func.jacrev(loss)(x),
        "vmap": lambda: torch.func.vmap(loss)(x[None]),
    }[transform]
    with pytest.raises(RuntimeError, match=r"torch\.func.*dense\(model\).*drop_rate=0"):
        call()


def test_transforms_of_torch_func_work_at_rate_zero():
    x, w = torch.randn(1, 2, 5, 5), torch.randn(4, 2, 3, 3)
    grad = torch.func.grad(lambda w: functional.conv2d(x, w, drop_rate=0).sum())(w)
    torch.testing.assert_close(grad, torch.func.grad(lambda w: F.conv2d(x, w).sum())(w))


BAD_GEOMETRY = [
    ("length of stride", 2, (1, 2, 5, 5), (4, 2, 3, 3), {"stride": (1, 2, 3)}),
    ("zero stride", 2, (1, 2, 5, 5), (4, 2, 3, 3), {"stride": 0}),
    ("negative padding", 2, (1, 2, 5, 5), (4, 2, 3, 3), {"padding": -1}),
    ("padding word", 2, (1, 2, 5, 5), (4, 2, 3, 3), {"padding": "full"}),
    ("same with stride", 2, (1, 2, 5, 5), (4, 2, 3, 3), {"padding": "same", "stride": 2}),
    ("fractional stride", 2, (1, 2, 5, 5), (4, 2, 3, 3), {"stride": 1.5}),
    ("channels", 2, (1, 3, 5, 5), (4, 2, 3, 3), {}),
    ("groups", 2, (1, 2, 5, 5), (4, 1, 3, 3), {"groups": 3}),
    ("no groups", 2, (1, 2, 5, 5), (4, 1, 3, 3), {"groups": 0}),
    ("kernel", 2, (1, 2, 2, 2), (4, 2, 3, 3), {}),
    ("too few dimensions", 2, (5, 5), (4, 2, 3, 3), {}),
    ("too many dimensions", 2, (1, 1, 2, 5, 5), (4, 2, 3, 3), {}),
    ("images in conv1d", 1, (1, 2, 5, 5), (4, 2, 3, 3), {}),
    ("volumes in conv2d", 2, (1, 2, 5, 5, 5), (4, 2, 3, 3, 3), {}),
]


@pytest.mark.parametrize(
    "dims, x, w, geometry", [g[1:] for g in BAD_GEOMETRY], ids=[g[0] for g in BAD_GEOMETRY]
)
def test_what_the_dense_convolution_refuses_is_refused(dims, x, w, geometry):
    x, w = torch.randn(x, requires_grad=True), torch.randn(w)
    errors = (RuntimeError, TypeError, ValueError)
    with pytest.raises(errors):
        oracle.CONV[dims](x, w, **geometry)
    with pytest.raises(errors):
        SSP[dims](x, w, **geometry, drop_rate=0.5)


@pytest.mark.parametrize(
    "geometry",
    [
        {"stride": np.int64(2)},
        {"padding": np.int64(1)},
        {"stride": [2]},
        {"stride": [2, 1]},
        {"stride": torch.Size([2, 2])},
        {"padding": (np.int64(1), 2)},
    ],
    ids=repr,
)
def test_sizes_in_every_form_that_the_dense_convolution_takes(geometry):
    x, w = torch.randn(2, 2, 5, 5), torch.randn(4, 2, 3, 3, requires_grad=True)
    expected = F.conv2d(x, w, **geometry)
    y = functional.conv2d(x, w, **geometry, drop_rate=0.5)
    assert torch.equal(y, expected)
    y.backward(torch.randn_like(y))


def test_positional_arguments_are_those_of_the_dense_convolution():
    x, w, b = torch.randn(2, 4, 9, 9), torch.randn(4, 2, 3, 3, requires_grad=True), torch.randn(4)
    arguments = (x, w, b, 2, 1, 2, 2)
    assert torch.equal(functional.conv2d(*arguments, drop_rate=0.5), F.conv2d(*arguments))
