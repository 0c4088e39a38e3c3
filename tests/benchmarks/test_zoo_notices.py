"""What the zoo's check would notice: every error that is put in here."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from zoo import check, step
from zoo.models import Entry, Sample

import ssprop_patch as ssp

from .zoo_samples import check_sample, entry_of, small


def test_a_network_that_is_as_it_should_be_is_ok(double):
    assert check_sample(small())[0] == ("ok", "")


@pytest.mark.parametrize(
    "wrong",
    [{"schedule": 0.6}, {"schedule": 0.0}, {"selection": "random"}, {"exclude": "0"}],
    ids=str,
)
def test_another_gradient_is_noticed(double, monkeypatch, wrong):
    right = ssp.convert
    monkeypatch.setattr(ssp, "convert", lambda m, schedule: right(m, **{"schedule": 0.8} | wrong))
    with pytest.raises(check.Mismatch, match="gradient of"):
        check_sample(small())


def convert_and(monkeypatch, add):
    """Make conversion also put something on the first layer."""
    right = ssp.convert

    def wrong(model, schedule):
        right(model, schedule=schedule)
        add(model[0])

    monkeypatch.setattr(ssp, "convert", wrong)


def test_an_error_in_the_input_gradient_is_noticed(double, monkeypatch):
    def scale(layer, args):
        if args[0].requires_grad:
            args[0].register_hook(lambda g: g * (1 + 1e-7))

    convert_and(monkeypatch, lambda layer: layer.register_forward_pre_hook(scale))
    with pytest.raises(check.Mismatch, match="gradient of input 0"):
        check_sample(small())


def test_another_forward_is_noticed(double, monkeypatch):
    def scale(layer, args, y):
        return y * (1 + 2**-52)

    convert_and(monkeypatch, lambda layer: layer.register_forward_hook(scale))
    with pytest.raises(check.Mismatch, match="outputs are not the dense ones"):
        check_sample(small())


def test_other_buffers_after_a_step_are_noticed(double, monkeypatch):
    sample = small(nn.BatchNorm2d(8))

    def count_twice(layer, args):
        sample.model[2].num_batches_tracked += 1

    convert_and(monkeypatch, lambda layer: layer.register_forward_pre_hook(count_twice))
    with pytest.raises(check.Mismatch, match="buffers are not the dense ones"):
        check_sample(sample)


def test_another_gradient_at_rate_0_is_noticed(double, monkeypatch):
    def scale(layer, args, y):
        if ssp.get_controller(layer).drop_rate == 0:
            y.register_hook(lambda g: g * (1 + 2**-50))

    convert_and(monkeypatch, lambda layer: layer.register_forward_hook(scale))
    with pytest.raises(check.Mismatch, match="at rate 0 the gradient of"):
        check_sample(small())


def test_a_layer_that_warns_that_it_stays_dense_is_noticed(double, monkeypatch):
    def warn(layer, args):
        warnings.warn("its backward stays dense", stacklevel=1)

    convert_and(monkeypatch, lambda layer: layer.register_forward_pre_hook(warn))
    with pytest.raises(check.Mismatch, match="stays dense"):
        check_sample(small())


def test_an_error_of_the_package_is_a_row(monkeypatch):
    def broken(model, schedule):
        raise AttributeError("no such thing")

    monkeypatch.setattr(ssp, "convert", broken)
    row = check.row(entry_of("timm", "test_vit"))
    assert (row["result"], row["reason"]) == ("ERROR", "AttributeError: no such thing")


@pytest.mark.parametrize("left", ["class", "attribute", "hook", "value", "key", "order"])
def test_what_revert_leaves_behind_is_noticed(double, monkeypatch, left):
    right = ssp.revert

    def wrong(model):
        right(model)
        layer = model[0]
        if left == "class":
            layer.__class__ = type("Conv2d", (nn.Conv2d,), {})
        elif left == "attribute":
            layer.stride = (1, 2)
        elif left == "hook":
            layer.register_forward_hook(lambda *a: None)
        elif left == "value":
            layer.weight.data[0, 0, 0, 0] += 1
        elif left == "key":
            layer.register_buffer("more", torch.zeros(1))
        else:
            vars(layer)["training"] = vars(layer).pop("training")

    monkeypatch.setattr(ssp, "revert", wrong)
    with pytest.raises(check.Mismatch, match="after revert differs"):
        check_sample(small())


def test_a_network_whose_gradients_vanish_proves_nothing(double):
    class Nothing(nn.Module):
        def forward(self, x):
            return x * 0

    with pytest.raises(step.CannotRun, match="no gradient of a convolution was dropped"):
        check_sample(Sample(nn.Sequential(small().model, Nothing()), small().inputs))


def test_a_mismatch_is_a_tie_only_where_two_channels_are_as_large(double):
    sample = small()
    layer = sample.model[0]
    with torch.no_grad():  # all channels alike, and so are their gradients
        layer.weight.copy_(layer.weight[:1].expand_as(layer.weight))
        layer.bias.zero_()
        last = sample.model[-1]
        last.weight.copy_(last.weight[:1].expand_as(last.weight))
    same = nn.Sequential(sample.model, nn.Flatten(1), nn.Linear(8 * 64, 1, bias=False))
    with torch.no_grad():
        same[2].weight.fill_(1)
    try:  # which of the equal ones is kept may happen to agree
        result, _ = check_sample(Sample(same, sample.inputs))
    except check.Tie:
        return
    assert result == ("ok", "")


def test_why_convolutions_stay_dense_is_counted(double):
    up = nn.ConvTranspose2d(8, 8, 2), nn.Conv2d(8, 1, 1), nn.Conv2d(1, 8, 1)
    result, found = check_sample(small(*up))
    assert result == ("ok", "")
    assert found["convolutions"] == 5 and found["sparse"] == 3
    assert found["left_dense"] == "transposed convolution: 1; one output channel: 1"


def test_a_convolution_outside_of_any_layer_is_counted_and_stays_dense(double):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(8, 8, 1, 1))

        def forward(self, x):
            return nn.functional.conv2d(x, self.kernel)

    result, found = check_sample(small(Functional()))
    assert result == ("ok", "") and found["functional"] == 1


def test_a_large_network_is_checked_by_input_and_small_convolutions(double, monkeypatch):
    monkeypatch.setattr(check, "MANY_PARAMETERS", 10)
    monkeypatch.setattr(check, "MOST_GRADIENTS", 8 * 9 + 8)
    result, found = check_sample(small(nn.BatchNorm2d(8)))
    assert result == ("ok", "")
    assert found["gradients"] == "input and 1 of 2 convolutions" and "rate0" not in found


def test_a_network_that_cannot_be_built_is_a_row_with_the_reason():
    row = check.row(Entry("timm", "resnet", "no_such_network"))
    assert row["result"] == "not run" and "no_such_network" in row["reason"]
