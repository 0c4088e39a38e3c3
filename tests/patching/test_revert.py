"""Converting again, and back."""

import pytest
from torch import nn
from torch.nn.utils import parametrizations

import ssprop_patch as ssp

from .networks import (
    NAMES,
    Standardised,
    all_rows,
    assert_same,
    backward,
    image,
    loss,
    make,
    optimizer_step,
    rows,
    snapshot,
)


def test_converting_twice_is_converting_once_with_the_new_arguments():
    model, once = make(), make()
    counting = ssp.LambdaSchedule(lambda t: 0.25, interval="step")
    ssp.convert(model, counting, exclude="layer1", overrides={"stem": 0.5}, selection="l2")
    old = ssp.get_controller(model)
    for m in (model, once):
        ssp.convert(m, 0.75, exclude="stem", overrides={"layer2": 0.5})
    assert_same(backward(model), backward(once))
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in once.named_modules()
    }
    assert ssp.get_controller(model) is not old
    optimizer_step(model)
    assert old.t == 0  # it has nothing left to count
    ssp.revert(model)
    assert type(model.layer1.conv1) is nn.Conv2d


def test_converting_again_with_the_same_controller():
    model = make()
    ssp.convert(model, ssp.LambdaSchedule(lambda t: 0.1 * t, interval="step"))
    controller = ssp.get_controller(model)
    optimizer_step(model)
    ssp.convert(model, controller=controller, exclude="stem")
    assert ssp.get_controller(model) is controller
    optimizer_step(model)
    assert controller.t == 2


def test_a_part_with_a_schedule_of_its_own():
    model = make()
    counting = ssp.LambdaSchedule(lambda t: 0.5, interval="step")
    ssp.convert(model, counting)
    whole = ssp.get_controller(model)
    ssp.convert(model.layer2, 0.75)
    part = ssp.get_controller(model.layer2)
    assert part is not whole and ssp.get_controller(model.layer1) is whole
    with pytest.raises(ValueError, match="2 controllers"):
        ssp.get_controller(model)
    assert all_rows(backward(model)) == {n: 2 if n.startswith("layer2") else 4 for n in NAMES}
    optimizer_step(model)
    assert whole.t == 1
    ssp.revert(model.layer2)
    assert ssp.get_controller(model) is whole


def test_revert_restores_every_module_exactly():
    model = make()
    model.own = make(Standardised, 3, 8, 3)
    model.normed = parametrizations.weight_norm(make(nn.Conv2d, 3, 8, 3))
    before = snapshot(model)
    ssp.convert(model, 0.5, overrides={"stem": 0.25}, selection="random")
    assert snapshot(model) != before
    model.zero_grad()
    loss(model(image())).backward()
    assert ssp.revert(model) is model
    assert snapshot(model) == before
    ssp.revert(model)
    assert snapshot(model) == before


def test_revert_of_a_part():
    model = make()
    ssp.convert(model, 0.5)
    ssp.revert(model.layer1)
    assert all_rows(backward(model)) == {n: 8 if "layer1" in n else 4 for n in NAMES}


def test_revert_of_a_model_that_was_never_converted():
    model = make()
    before = snapshot(model)
    ssp.revert(model)
    assert snapshot(model) == before


def test_a_reverted_model_is_dense_and_no_longer_counts():
    model, dense = make(), make()
    ssp.convert(model, ssp.LambdaSchedule(lambda t: 0.5, interval="step"))
    controller = ssp.get_controller(model)
    ssp.revert(model)
    assert_same(backward(model), backward(dense))
    optimizer_step(model)
    assert controller.t == 0


def test_a_forward_before_revert_goes_back_sparse():
    model = make()
    ssp.convert(model, 0.5)
    out = loss(model(image()))
    ssp.revert(model)
    out.backward()
    assert rows(model.stem.weight.grad) == 4
