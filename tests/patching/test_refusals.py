"""strict and other refusals: an error changes nothing."""

import math

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import ssprop_patch as ssp

from .networks import NAMES, all_rows, backward, make, rows, snapshot


def no_convolution():
    return nn.Sequential(nn.Linear(3, 3), nn.ConvTranspose2d(3, 3, 1), nn.Conv2d(3, 1, 1))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), no_convolution()], ids=["none", "only dense"])
def test_strict(model):
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"(?s)nothing to convert.*strict=False"):
        ssp.convert(model, 0.5)
    assert snapshot(model) == before
    with pytest.warns(UserWarning, match="nothing to convert") as caught:
        assert ssp.convert(model, 0.5, strict=False) is model
    assert len(caught) == 1 and caught[0].filename == __file__
    assert snapshot(model) == before and not ssp.is_converted(model)


def test_strict_says_why_each_layer_stays_dense():
    with pytest.raises(ValueError, match=r"(?s)transposed.*one output channel"):
        ssp.convert(no_convolution())


def test_nothing_left_to_convert_keeps_an_earlier_conversion_under_strict():
    model = make()
    ssp.convert(model, 0.5)
    before = snapshot(model)
    with pytest.raises(ValueError, match="nothing to convert"):
        ssp.convert(model, 0.5, filter_fn=lambda module, name: False)
    assert snapshot(model) == before
    with pytest.warns(UserWarning, match="nothing to convert"):
        ssp.convert(model, 0.5, filter_fn=lambda module, name: False, strict=False)
    assert not ssp.is_converted(model)


def bad_filter(module, name):
    if name == "layer2.conv1":
        raise RuntimeError("filter broke")
    return True


BAD = {
    "rate 1": (dict(schedule=1.0), ValueError, "1.0"),
    "rate below 0": (dict(schedule=-0.1), ValueError, "-0.1"),
    "rate nan": (dict(schedule=math.nan), ValueError, "nan"),
    "rate in percent": (dict(schedule=80), ValueError, "0.8"),
    "rate as text": (dict(schedule="0.5"), TypeError, "0.5"),
    "rate as bool": (dict(schedule=True), TypeError, "True"),
    "rate None": (dict(schedule=None), TypeError, "None"),
    "schedule class": (dict(schedule=ssp.BarSchedule), TypeError, "BarSchedule"),
    "schedule nan at 0": (dict(schedule=lambda t: math.nan), ValueError, "nan"),
    "schedule text at 0": (dict(schedule=lambda t: "0.5"), TypeError, "0.5"),
    "schedule 1 at 0": (dict(schedule=lambda t: 1.0), ValueError, "t=0"),
    "steps 0": (dict(steps_per_epoch=0), ValueError, "steps_per_epoch"),
    "steps float": (dict(steps_per_epoch=10.0), TypeError, "steps_per_epoch"),
    "steps bool": (dict(steps_per_epoch=True), TypeError, "steps_per_epoch"),
    "override 1": (dict(overrides={"stem": 1.0}), ValueError, "stem"),
    "override nan": (dict(overrides={"stem": math.nan}), ValueError, "stem"),
    "override text": (dict(overrides={"stem": "0.5"}), TypeError, "stem"),
    "selection": (dict(selection="l3"), ValueError, "l3.*|.*random"),
    "selection type": (dict(selection=3), TypeError, "int"),
    "exclude typo": (dict(exclude="layer1.conv3"), ValueError, "layer1.conv"),
    "exclude among others": (dict(exclude=["stem", "layer9"]), ValueError, "layer9"),
    "exclude number": (dict(exclude=[1]), TypeError, "1"),
    "exclude empty": (dict(exclude=""), ValueError, "''"),
    "exclude no regex": (dict(exclude="layer1.(conv"), ValueError, "layer1"),
    "override typo": (dict(overrides={"stern": 0.5}), ValueError, "'stem'"),
    "controller type": (dict(controller="none"), TypeError, "controller"),
    "controller and schedule": (
        dict(controller=ssp.SparsityController(0.5), schedule=0.5),
        ValueError,
        "controller",
    ),
    "controller and steps": (
        dict(controller=ssp.SparsityController(0.5), steps_per_epoch=2),
        ValueError,
        "controller",
    ),
    "schedule and rate": (dict(schedule=0.5, drop_rate=0.5), ValueError, "not both"),
    "preset and rate": (dict(schedule=ssp.presets.PAPER, drop_rate=0.5), ValueError, "not both"),
    "controller and rate": (
        dict(controller=ssp.SparsityController(0.5), drop_rate=0.5),
        ValueError,
        "drop_rate.*belong to the controller",
    ),
    "schedule as rate": (dict(drop_rate=ssp.BarSchedule(0.8)), TypeError, "as schedule="),
    "percentage as rate": (dict(drop_rate=80), ValueError, "80 % would be 0.8"),
    "filter": (dict(filter_fn=bad_filter), RuntimeError, "filter broke"),
    "filter by name": (
        dict(filter_fn=lambda name, layer: True),
        TypeError,
        r"filter_fn\(name, layer\) takes the name first",
    ),
    "filter's order": (
        dict(filter_fn=lambda a, b: "conv1" not in a),
        TypeError,
        r"takes the name first; it is called as filter_fn\(module, name\)",
    ),
    "filter's own error": (
        dict(filter_fn=lambda module, name: module.nothing),
        AttributeError,
        "^'Conv2d' object has no attribute 'nothing'$",
    ),
    "filter of one": (dict(filter_fn=lambda m: True), TypeError, "too many positional.*layer firs"),
    "filter no function": (dict(filter_fn=["stem"]), TypeError, "must be a function"),
}


@pytest.mark.parametrize("already", [False, True], ids=["fresh", "converted before"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_change_nothing(case, already):
    arguments, error, text = BAD[case]
    model = make()
    if already:
        ssp.convert(model, 0.5, exclude="layer1")
    before = snapshot(model)
    with pytest.raises(error, match=f"(?s){text}"):
        ssp.convert(model, **arguments)
    assert snapshot(model) == before


@pytest.mark.parametrize("function", [ssp.convert, ssp.revert, ssp.plan])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"nn.Module"):
        function("resnet50")


def test_a_pattern_that_matches_nothing_names_the_nearest():
    with pytest.raises(ValueError) as caught:
        ssp.convert(make(), exclude="layer2.conv_1")
    assert "'layer2.conv_1'" in str(caught.value) and "'layer2.conv1'" in str(caught.value)
    assert "'stem'" not in str(caught.value)
    with pytest.raises(ValueError, match="no layer to convert; there is no such layer"):
        ssp.convert(nn.Linear(2, 2), exclude="x")


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("layr1", "; the nearest name is 'layer1'"),
        ("layer1.0.conv3", "; the nearest names are 'layer1.0.conv1', 'layer1.0.conv2'"),
        ("conv_1", "; the nearest name is 'conv1'"),
        ("layer", "; the nearest names are 'layer1', 'layer2', 'layer3'"),
        ("downsampel", "; the nearest name is 'downsample.0'"),
        ("fc", ", only 'fc' (Linear), which stays dense anyway: types= names the classes"),
        ("encoder", "; no name is near it, there are 'conv1', 'layer1.0.conv1', 'layer1.0.con"),
    ],
)
def test_a_mistyped_pattern_is_answered_with_what_differs_least(pattern, hint):
    """Blocks and ends of names are among it, as a pattern may be one."""
    model = timm.create_model("resnet18")
    with pytest.raises(ValueError) as caught:
        ssp.convert(model, exclude=pattern)
    start = f"the pattern {pattern!r} matches no layer to convert"
    assert str(caught.value).startswith(start + hint)


def test_lazy_convolutions_are_refused():
    model = nn.Sequential(make(), nn.LazyConv2d(4, 3))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"(?s)nothing was changed.*1: lazy.*forward"):
        ssp.convert(model)
    assert snapshot(model) == before
    ssp.revert(model)  # nothing on it: nothing to refuse
    model[1](torch.randn(1, 3, 4, 4))
    ssp.convert(model, 0.5)
    assert rows(backward(model[1])["weight"]) == 2


def test_a_parametrization_put_on_after_conversion():
    model = make()
    ssp.convert(model, 0.5)
    parametrizations.weight_norm(model.layer1.conv1)
    before = snapshot(model)
    for again in (ssp.revert, ssp.convert):
        with pytest.raises(ValueError, match=r"(?s)layer1.conv1.*remove_parametrizations.*then"):
            again(model)
        assert snapshot(model) == before
    grads = backward(model)
    assert all_rows({"stem": grads["stem.weight"]}) == {"stem": 4}
    assert rows(grads["layer1.conv1.parametrizations.weight.original1"]) == 4
    ssp.revert(model.layer2)  # where nothing is in the way
    parametrize.remove_parametrizations(model.layer1.conv1, "weight")
    ssp.revert(model)
    assert not ssp.is_converted(model) and type(model.layer1.conv1) is nn.Conv2d


class Stubborn(nn.Conv2d):
    stubborn = True

    def __setattr__(self, name, value):
        if name == "__class__" and self.stubborn:
            raise TypeError("__class__ is mine")
        super().__setattr__(name, value)


@pytest.mark.parametrize("already", [False, True], ids=["fresh", "converted before"])
def test_a_class_that_cannot_be_replaced_leaves_every_layer_as_it_was(already):
    model = make()
    model.layer1.conv2 = Stubborn(8, 8, 1)
    if already:
        ssp.convert(model, 0.5, exclude=["layer1.conv2", "stem"])
        old = ssp.get_controller(model)
    before = snapshot(model)
    with pytest.raises(TypeError, match="__class__ is mine"):
        ssp.convert(model, 0.75, exclude="layer2")
    assert snapshot(model) == before
    if already:
        assert ssp.get_controller(model) is old
        assert all_rows(backward(model)) == {
            n: 8 if n in ("stem", "layer1.conv2") else 4 for n in NAMES
        }
        ssp.convert(model, 0.75, exclude="layer1.conv2")  # goes on without it


def test_revert_rolls_back_too():
    model = make()
    model.layer1.conv2 = Stubborn(8, 8, 1)
    model.layer1.conv2.stubborn = False
    ssp.convert(model, 0.5)
    model.layer1.conv2.stubborn = True
    before = snapshot(model)
    with pytest.raises(TypeError, match="is mine"):
        ssp.revert(model)
    assert snapshot(model) == before
    assert all_rows(backward(model)) == dict.fromkeys(NAMES, 4)
