"""``types``: which layers beyond Conv1d/2d/3d are converted, and which are not."""

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import ssprop_patch as ssp

from .layer_types import ALL, UNet


def converted(model, **kwargs):
    return [row.name for row in ssp.plan(model, **kwargs).converted]


def test_only_convolutions_are_converted_unless_others_are_named():
    model = UNet()
    assert converted(model) == ["down", "middle.0", "out"]
    assert converted(model, types=nn.Linear) == ["time"]
    assert converted(model, types=[nn.ConvTranspose2d]) == ["up", "smooth"]
    assert converted(model, types=ALL) == ["down", "middle.0", "time", "up", "smooth", "out"]
    rows = {row.name: row for row in ssp.plan(model)}
    assert "time" not in rows  # a linear layer is no candidate, a convolution is
    assert rows["up"].reason == "transposed convolution: nn.ConvTranspose2d is not among types"
    rows = {row.name: row for row in ssp.plan(model, types=nn.Linear)}
    assert rows["down"].reason == "nn.Conv2d is not among types"


def test_converting_again_with_fewer_types_takes_the_others_off():
    model = ssp.convert(UNet(), types=ALL)
    ssp.convert(model)
    assert type(model.time) is nn.Linear and type(model.up) is nn.ConvTranspose2d
    assert ssp.is_converted(model.down)


def test_names_and_rates_of_linear_layers():
    model = nn.ModuleDict({"body": nn.Linear(4, 8), "head": nn.Linear(8, 10)})
    ssp.convert(model, 0.5, types=nn.Linear, exclude="head", overrides={"body": 0.75})
    assert not ssp.is_converted(model.head)
    model.body(torch.randn(6, 4)).square().sum().backward()
    assert (model.body.weight.grad != 0).any(1).sum() == 2


@pytest.mark.parametrize(
    ("types", "error", "words"),
    [
        (nn.BatchNorm2d, ValueError, "BatchNorm2d has no sparse backward.*nn.Linear"),
        ((nn.Conv2d, nn.Module), ValueError, "Module has no sparse backward"),
        ((), ValueError, "empty"),
        (("Conv2d",), TypeError, "classes.*'Conv2d'"),
        ((int,), TypeError, "classes"),
        (nn.Conv2d(1, 1, 1), TypeError, "classes|iterable"),
    ],
)
def test_types_that_cannot_be(types, error, words):
    model = UNet()
    for function in (ssp.convert, ssp.plan):
        with pytest.raises(error, match=words):
            function(model, types=types)
    assert not ssp.is_converted(model)


def test_linear_layers_that_cannot_be_are_skipped_with_the_reason():
    model = nn.ModuleDict(
        {
            "one": nn.Linear(4, 1),
            "attention": nn.MultiheadAttention(4, 2),
            "complex": nn.Linear(4, 4, dtype=torch.complex64),
            "good": nn.Linear(4, 4),
        }
    )
    rows = {row.name: row for row in ssp.plan(model, types=nn.Linear)}
    assert rows["one"].reason == "one output channel: nothing to choose from"
    assert "MultiheadAttention" in rows["attention.out_proj"].reason
    assert rows["complex"].reason == "complex weights"
    assert [name for name, row in rows.items() if row.action == "convert"] == ["good"]
    ssp.convert(model, 0.5, types=nn.Linear)
    x = torch.randn(3, 2, 4)
    model["attention"](x, x, x)[0].sum().backward()


def test_a_lazy_linear_layer_is_refused():
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match="lazy"):
        ssp.convert(model, types=nn.Linear)
    with pytest.raises(ValueError, match="nothing to convert"):  # not asked for: not in the way
        ssp.convert(model)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.ConvTranspose1d(4, 4, 1)])
def test_a_forward_wrapped_on_the_instance_stays_dense_and_says_so(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x)
    (row,) = ssp.plan(layer, types=type(layer))
    assert row.action == "skip" and "before it is wrapped" in row.reason


def test_a_named_class_that_calls_no_convolution_warns_when_it_runs():
    class Convolver(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            return x @ self.weight

    model = ssp.convert(nn.Sequential(Convolver()), 0.5, types=Convolver)
    with pytest.warns(UserWarning, match="called no torch.nn.functional.conv1d"):
        model(torch.randn(2, 4))
