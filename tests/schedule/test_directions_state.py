"""Directions in the controller's state: what a checkpoint continues, and which are refused."""

import copy

import pytest
import torch
from patching.by_reference import TYPES, images, loss, make, subspaces
from torch import nn

import ssprop_patch as ssp

from .test_controller_state import saved

BOTH = {"selection": ssp.Principal(refresh_interval=3), "remainder": "coarse"}
USED = ["stem", "expand", "grouped", "up", "head"]


def start(schedule=0.7, **more):
    model = ssp.convert(make(), schedule, types=TYPES, **{**BOTH, **more})
    return model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def train(model, optimizer, steps):
    log = []
    for seed in steps:
        optimizer.zero_grad()
        value = loss(model, images(seed))
        value.backward()
        optimizer.step()
        log.append(value.item())
    return log


@pytest.mark.parametrize("schedule", [0.7, ssp.LinearSchedule(0.2, 0.8, 6, interval="step")])
@pytest.mark.parametrize("stop", [1, 5, 7])
def test_a_resumed_run_continues_exactly(stop, schedule):
    whole = train(*start(schedule), range(10))
    model, optimizer = start(schedule)
    log = train(model, optimizer, range(stop))
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ssprop": ssp.get_controller(model).state_dict(),
    }
    assert state["model"].keys() == make().state_dict().keys()
    checkpoint = saved(state)
    model, optimizer = start(schedule)
    train(model, optimizer, [50, 51])  # whatever it has seen
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    ssp.get_controller(model).load_state_dict(checkpoint["ssprop"])
    assert log + train(model, optimizer, range(stop, 10)) == whole


def test_without_them_a_run_is_another():
    whole = train(*start(), range(10))
    model, optimizer = start()
    train(model, optimizer, range(5))
    for subspace in subspaces(model).values():
        subspace.load_state_dict(ssp.Subspace().state_dict())
    assert train(model, optimizer, range(5, 10)) != whole[5:]


def test_the_state_by_layer():
    model, optimizer = start()
    train(model, optimizer, range(2))
    controller = ssp.get_controller(model)
    layers = controller.state_dict()["layers"]
    assert list(layers) == USED
    assert {n: set(layer["bases"]) for n, layer in layers.items()} == {
        "stem": {"dy"},
        "expand": {"dx", "dw"},
        "grouped": {"dy"},
        "up": {"dy"},
        "head": {"dx", "dw"},
    }
    # A snapshot: training goes on with tensors of its own.
    before = copy.deepcopy(layers)
    train(model, optimizer, range(2, 4))
    for name, layer in layers.items():
        for key, basis in layer["bases"].items():
            assert torch.equal(basis["vectors"], before[name]["bases"][key]["vectors"])


def test_before_the_first_pass_there_is_a_state_too():
    model, _ = start()
    state = saved(ssp.get_controller(model).state_dict())
    assert all(layer == {"passes": 0, "bases": {}} for layer in state["layers"].values())
    other, optimizer = start()
    train(other, optimizer, range(2))
    ssp.get_controller(other).load_state_dict(state)
    assert all(s.passes == 0 and not s.bases for s in subspaces(other).values())


def changed(state, change):
    state = copy.deepcopy(state)
    change(state["layers"])
    return state


def widen(layers):
    basis = layers["stem"]["bases"]["dy"]
    basis["covariance"] = torch.zeros(1, 17, 17)


def narrow(layers):
    basis = layers["grouped"]["bases"]["dy"]
    basis["vectors"] = basis["vectors"][:, :5]


WRONG = {
    "a layer less": (lambda layers: layers.pop("up"), "what 4 layers remember.*'up'"),
    "a layer more": (lambda layers: layers.update(more=layers["up"]), "'more' is in the state"),
    "another name": (lambda layers: layers.update(up2=layers.pop("up")), "'up"),
    "other shapes": (widen, r"stem: .*another layer.*17, 17.*Conv2d\(3, 16"),
    "other vectors": (narrow, "grouped: .*another layer"),
    "no passes": (lambda layers: layers["stem"].pop("passes"), "stem: not the state"),
    "passes": (lambda layers: layers["stem"].update(passes=-1), "stem: not the state"),
    "no bases": (lambda layers: layers["stem"].update(bases=None), "stem: not the state"),
    "a basis": (lambda layers: layers["stem"]["bases"].update(dy={}), "stem: not the state"),
    "another basis": (
        lambda layers: layers["stem"]["bases"].update(db=layers["stem"]["bases"]["dy"]),
        "stem: .*another layer",
    ),
    "no layer": (lambda layers: layers.update(up=3), "up: not the state"),
    "asked": (lambda layers: layers["up"]["bases"]["dy"].update(asked=0), "up: not the state"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_state_that_does_not_fit_changes_nothing(case):
    change, words = WRONG[case]
    model, optimizer = start()
    train(model, optimizer, range(2))
    controller = ssp.get_controller(model)
    wrong = changed(controller.state_dict(), change)
    wrong["t"] = 17
    before = {name: s.state_dict() for name, s in subspaces(model).items()}
    with pytest.raises(ValueError, match=words):
        controller.load_state_dict(wrong)
    assert controller.t == 0
    for name, subspace in subspaces(model).items():
        assert subspace.passes == before[name]["passes"]
        for key, basis in subspace.bases.items():
            assert torch.equal(basis.covariance, before[name]["bases"][key]["covariance"])


@pytest.mark.parametrize("layers", [[], 7, "state", None])
def test_what_is_no_state_of_layers(layers):
    model, _ = start()
    controller = ssp.get_controller(model)
    with pytest.raises(ValueError, match="state of the layers must be a dict"):
        controller.load_state_dict({**controller.state_dict(), "layers": layers})


def test_a_state_of_another_selection():
    model, optimizer = start()
    train(model, optimizer, range(2))
    plain = ssp.convert(make(), 0.7, types=TYPES)
    states = [ssp.get_controller(m).state_dict() for m in (model, plain)]
    assert "layers" not in states[1]
    with pytest.raises(ValueError, match="what 5 layers remember, in this model 0 do"):
        ssp.get_controller(plain).load_state_dict(states[0])
    with pytest.raises(ValueError, match="what 0 layers remember, in this model 5 do"):
        ssp.get_controller(model).load_state_dict(states[1])


def test_models_that_share_a_controller():
    controller = ssp.SparsityController(0.7)
    models = [
        ssp.convert(nn.Sequential(nn.Conv2d(3, 8, 3)).double(), controller=controller, **BOTH)
        for _ in range(2)
    ]
    for model, number in zip(models, (1, 2), strict=True):
        for seed in range(number):
            model(images(seed)).pow(2).sum().backward()
    state = saved(controller.state_dict())
    assert {name: layer["passes"] for name, layer in state["layers"].items()} == {
        "0:0": 1,
        "1:0": 2,
    }
    controller.load_state_dict(state)
    assert [subspaces(m)["0"].passes for m in models] == [1, 2]


def test_the_name_of_a_single_layer_and_of_one_that_has_left():
    layer = ssp.convert(nn.Conv2d(3, 8, 3), 0.5, **BOTH)
    assert list(ssp.get_controller(layer).state_dict()["layers"]) == ["(model)"]
    model, _ = start()
    gone, model.up = model.up, nn.Identity()
    state = ssp.get_controller(model).state_dict()
    assert sorted(state["layers"]) == ["expand", "grouped", "head", "layer 3", "stem"]
    assert gone is not None


def test_a_checkpoint_of_a_model_in_a_wrapper_is_that_of_the_model():
    model, optimizer = start()
    train(model, optimizer, range(2))
    state = ssp.get_controller(model).state_dict()
    wrapper = ssp.convert(nn.Sequential(make()), 0.7, types=TYPES, **BOTH)
    with pytest.raises(ValueError, match="only"):  # names are those of the model converted
        ssp.get_controller(wrapper).load_state_dict(state)
    parallel = nn.DataParallel(model)
    assert ssp.get_controller(parallel).state_dict()["layers"].keys() == state["layers"].keys()
