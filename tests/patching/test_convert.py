"""What a converted layer does in its forward and backward."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ssprop_patch as ssp

from .networks import (
    NAMES,
    OWN,
    ByKeyword,
    ThroughConvForward,
    all_rows,
    assert_same,
    backward,
    image,
    loss,
    make,
    rows,
)


class WithoutConvolution(nn.Conv2d):
    def forward(self, x):
        return torch.einsum("oihw,nihw->no", self.weight, x)


@pytest.mark.parametrize(
    ("cls", "size"), [(nn.Conv1d, (9,)), (nn.Conv2d, (6, 6)), (nn.Conv3d, (4, 4, 4))]
)
def test_stock_layers_keep_the_largest_channels(cls, size):
    model, dense = make(cls, 3, 10, 3), make(cls, 3, 10, 3)
    x = torch.randn(4, 3, *size)
    assert ssp.convert(model, 0.7) is model
    assert torch.equal(model(x), dense(x))

    y = dense(x)
    y.retain_grad()
    loss(y).backward()
    kept = set(y.grad.abs().transpose(0, 1).flatten(1).mean(1).topk(3).indices.tolist())
    grads = backward(model, x)
    for name, p in dense.named_parameters():
        for c in range(10):
            expected = p.grad[c] if c in kept else torch.zeros_like(p.grad[c])
            torch.testing.assert_close(grads[name][c], expected)


@pytest.mark.parametrize("cls", OWN)
def test_own_forwards_are_caught(cls):
    model, dense = (make(cls, 3, 10, 3, padding=1).double() for _ in range(2))
    x = image().double()
    ssp.convert(model, 0.7)
    assert torch.equal(model(x), dense(x))
    grads, expected = backward(model, x), backward(dense, x)
    assert rows(grads["weight"]) == 3 and int(grads["bias"].ne(0).sum()) == 3
    kept = grads["bias"].ne(0)
    # What happened to the weight before the convolution stays in autograd.
    torch.testing.assert_close(grads["weight"][kept], expected["weight"][kept])


def test_own_forward_with_arguments_of_its_own():
    model = make(ThroughConvForward, 3, 10, 3)
    dense = make(ThroughConvForward, 3, 10, 3)(image(), scale=2.0)
    ssp.convert(model, 0.7)
    y = model(image(), scale=2.0)
    assert torch.equal(y, dense)
    loss(y).backward()
    assert rows(model.weight.grad) == 3


def test_a_forward_without_convolution_warns_once_and_stays_dense():
    model, dense = make(WithoutConvolution, 3, 8, 6), make(WithoutConvolution, 3, 8, 6)
    ssp.convert(model, 0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            grads = backward(model)
    assert [w.category for w in caught] == [UserWarning]
    assert "WithoutConvolution" in str(caught[0].message)
    assert_same(grads, backward(dense))


def test_a_forward_without_convolution_does_not_warn_when_dense():
    model = make(WithoutConvolution, 3, 8, 6)
    ssp.convert(model, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(model)


def test_a_convolution_inside_an_own_forward_keeps_its_own_settings():
    """The outer layer's forward runs the inner layer, which has other settings."""

    class Offset(nn.Conv2d):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.excluded = nn.Conv2d(3, 8, 3)
            self.zero = nn.Conv2d(3, 8, 3)
            self.in_eval = nn.Conv2d(3, 8, 3)
            self.inner = nn.Conv2d(3, 8, 3)
            self.own_inner = ByKeyword(3, 8, 3)

        def forward(self, x):
            children = sum(child(x) for child in self.children())
            return F.conv2d(x, self.weight, self.bias) + children

    model = make(Offset, 3, 8, 3)
    ssp.convert(
        model,
        0.5,
        exclude="excluded",
        overrides={"zero": 0.0, "inner": 0.75, "own_inner": 0.75},
    )
    model.in_eval.eval()
    assert {n.split(".")[0]: rows(g) for n, g in backward(model).items() if g.dim() == 4} == {
        "weight": 4,
        "excluded": 8,
        "zero": 8,
        "in_eval": 8,
        "inner": 2,
        "own_inner": 2,
    }


def test_the_root_may_be_a_convolution():
    model = make(nn.Conv2d, 3, 8, 3)
    assert ssp.convert(model, 0.5) is model and ssp.is_converted(model)
    assert rows(backward(model)["weight"]) == 4
    assert ssp.revert(model) is model and type(model) is nn.Conv2d
    assert rows(backward(model)["weight"]) == 8


@pytest.mark.parametrize("how", [{"schedule": 0.75}, {"drop_rate": 0.75}])
def test_whole_network_drops_in_every_layer(how):
    model = make()
    ssp.convert(model, **how)
    assert all_rows(backward(model)) == dict.fromkeys(NAMES, 2)
    assert ssp.get_controller(model).schedule == ssp.ConstantSchedule(0.75)


def test_one_output_channel_stays_dense():
    model = nn.Sequential(make(nn.Conv2d, 3, 8, 3), nn.Conv2d(8, 1, 1), nn.Conv1d(4, 1, 1))
    ssp.convert(model, 0.9)
    assert type(model[1]) is nn.Conv2d and type(model[2]) is nn.Conv1d
    loss(model[1](torch.randn(2, 8, 3, 3))).backward()
    assert rows(model[1].weight.grad) == 1


def test_drop_rate_zero_is_bit_identical():
    model, dense = make(), make()
    ssp.convert(model, 0.0)
    assert_same(backward(model), backward(dense))


def test_a_rate_that_keeps_every_channel_is_bit_identical():
    model, dense = make(), make()
    ssp.convert(model, 0.05)  # 7.6 of 8 channels, rounded: 8
    assert_same(backward(model), backward(dense))


def test_eval_gives_the_exact_gradient():
    model, dense = make().eval(), make().eval()
    ssp.convert(model, 0.8)
    assert_same(backward(model), backward(dense))
    assert rows(backward(model.train())["stem.weight"]) == 2


@pytest.mark.parametrize("cls", OWN)
def test_eval_gives_the_exact_gradient_in_own_forwards(cls):
    model, dense = make(cls, 3, 8, 3, padding=1).eval(), make(cls, 3, 8, 3, padding=1).eval()
    ssp.convert(model, 0.8)
    assert_same(backward(model), backward(dense))


def test_a_single_layer_in_eval_is_dense_among_others():
    model = make()
    ssp.convert(model, 0.5)
    model.layer1.conv2.eval()
    assert all_rows(backward(model)) == {**dict.fromkeys(NAMES, 4), "layer1.conv2": 8}


def test_no_grad_and_inference_mode_run():
    model, dense = make(), make()
    ssp.convert(model, 0.8)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(image()), dense(image()))


def test_frozen_parameters_get_no_gradient():
    model = make()
    model.stem.requires_grad_(False)
    model.layer1.conv2.weight.requires_grad_(False)
    ssp.convert(model, 0.5)
    grads = backward(model)
    assert not {"stem.weight", "stem.bias", "layer1.conv2.weight"} & grads.keys()
    assert int(grads["layer1.conv2.bias"].ne(0).sum()) == 4
