"""exclude, filter, overrides, selection: which layers are converted, and how."""

import pytest
import torch
from torch import nn

import ssprop_patch as ssp

from .networks import NAMES, Standardised, all_rows, backward, image, make, rows


@pytest.mark.parametrize(
    ("exclude", "dense"),
    [
        ("stem", ["stem"]),
        ("layer1.conv2", ["layer1.conv2"]),
        ("layer1", ["layer1.conv1", "layer1.conv2"]),
        ("conv1", ["layer1.conv1", "layer2.conv1"]),
        (r"layer\d\.conv2", ["layer1.conv2", "layer2.conv2"]),
        (["stem", "layer2"], ["stem", "layer2.conv1", "layer2.conv2"]),
        ((), []),
        ([], []),
    ],
)
def test_exclude(exclude, dense):
    model = make()
    ssp.convert(model, 0.5, exclude=exclude)
    assert all_rows(backward(model)) == {n: 8 if n in dense else 4 for n in NAMES}
    assert [n for n in NAMES if type(model.get_submodule(n)) is nn.Conv2d] == dense


def test_an_excluded_last_layer_has_the_exact_gradient():
    model, dense = nn.Sequential(make(nn.Conv2d, 3, 8, 3)), nn.Sequential(make(nn.Conv2d, 3, 8, 3))
    for m in (model, dense):
        m.append(make(nn.Conv2d, 8, 8, 3))
    ssp.convert(model, 0.5, exclude="1")
    grads, expected = backward(model), backward(dense)
    assert torch.equal(grads["1.weight"], expected["1.weight"])
    assert rows(grads["0.weight"]) == 4


def test_filter_gets_module_and_name():
    model = make()
    seen = {}

    def keep(module, name):
        seen[name] = module
        return module.kernel_size == (1, 1)

    ssp.convert(model, 0.5, filter_fn=keep)
    assert list(seen) == NAMES
    assert all(model.get_submodule(name) is module for name, module in seen.items())
    assert all_rows(backward(model)) == {n: 4 if n.endswith("conv2") else 8 for n in NAMES}


def test_filter_is_not_asked_about_what_is_dense_anyway():
    model = nn.Sequential(nn.ConvTranspose2d(3, 3, 3), nn.Conv2d(3, 1, 1), nn.Conv2d(1, 4, 1))
    seen = []
    ssp.convert(model, 0.5, filter_fn=lambda module, name: seen.append(name) or True)
    assert seen == ["2"]


def test_overrides():
    model = make()
    ssp.convert(
        model,
        ssp.StepSchedule([0.0, 0.5], milestones=[1]),
        overrides={"layer1": 0.75, "stem": 0.0, "conv1": 0.25},
    )
    controller = ssp.get_controller(model)
    assert all_rows(backward(model)) == dict.fromkeys(NAMES, 8)  # dense: nobody's own rate counts
    controller.step(1)
    own = {"stem": 8, "layer1.conv1": 2, "layer1.conv2": 2, "layer2.conv1": 6, "layer2.conv2": 4}
    assert all_rows(backward(model)) == own  # of two patterns the first counts
    controller.drop_rate = 0.875
    assert all_rows(backward(model)) == {**own, "layer2.conv2": 1}
    with ssp.dense(model):
        assert all_rows(backward(model)) == dict.fromkeys(NAMES, 8)


def test_the_first_pattern_that_matches_counts():
    for overrides in ({"layer1": 0.75, "conv1": 0.25}, {"conv1": 0.25, "layer1": 0.75}):
        model = make()
        ssp.convert(model, 0.5, overrides=overrides)
        kept = 8 * (1 - next(iter(overrides.values())))
        assert all_rows(backward(model))["layer1.conv1"] == kept


@pytest.mark.parametrize("selection", ["l1", "l2", "random", lambda dy: -dy.abs().sum((0, 2, 3))])
@pytest.mark.parametrize("cls", [nn.Conv2d, Standardised])
def test_selection_reaches_the_layers(selection, cls):
    model = make(cls, 3, 8, 6)
    ssp.convert(model, 0.75, selection=selection)
    ssp.get_controller(model).manual_seed(3)
    # Channel 0 has one large entry, channel 1 many middling ones, the others next to nothing.
    dy = torch.full((4, 8, 1, 1), 1e-3) * torch.arange(1, 9).view(-1, 1, 1)
    dy[0, 0], dy[:, 1], dy[:, 2] = 3.0, 1.0, 0.9

    def kept():
        model.zero_grad()
        model(image()).backward(dy)
        return model.weight.grad.flatten(1).ne(0).any(1).nonzero().flatten().tolist()

    if selection == "l1":
        assert kept() == [1, 2]
    elif selection == "l2":
        assert kept() == [0, 1]
    elif selection == "random":
        draws = [kept() for _ in range(12)]
        assert {len(d) for d in draws} == {2} and len({tuple(d) for d in draws}) > 4
        ssp.get_controller(model).manual_seed(3)
        assert [kept() for _ in range(12)] == draws
    else:
        assert kept() == [3, 4]


def test_random_selection_leaves_the_default_generator_alone():
    model = make(nn.Conv2d, 3, 8, 3)
    ssp.convert(model, 0.5, selection="random")
    state = torch.get_rng_state()
    backward(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_controller_for_two_models():
    generator, discriminator = make(), make()
    controller = ssp.SparsityController(0.5)
    for model in (generator, discriminator):
        ssp.convert(model, controller=controller)
        assert ssp.get_controller(model) is controller
    assert ssp.get_controller(nn.ModuleList([generator, discriminator])) is controller
    controller.drop_rate = 0.75
    for model in (generator, discriminator):
        assert all_rows(backward(model)) == dict.fromkeys(NAMES, 2)
    ssp.revert(generator)
    assert all_rows(backward(discriminator)) == dict.fromkeys(NAMES, 2)
