"""``convert(..., selection="principal", remainder="coarse")`` on whole networks and odd layers."""

import copy
import pickle

import pytest
import torch
from timm.layers import CondConv2d, ScaledStdConv2d
from torch import nn
from torch.nn.utils import parametrizations

import ssprop_patch as ssp

from . import by_reference as ref
from .by_reference import TYPES, images, loss, make, passes, subspaces

RULES = {
    "coarse": {"remainder": "coarse"},
    "principal": {"selection": "principal"},
    "both": {"selection": "principal", "remainder": "coarse"},
    "settings": {
        "selection": ssp.Principal(refresh_interval=2, momentum=0.3, energy=0.6),
        "remainder": ssp.Coarse(2),
    },
}
BOTH = RULES["both"]


def converted(rate=0.7, rule=BOTH, **more):
    return ssp.convert(make(), rate, types=TYPES, **rule, **more)


def assert_close(found, expected, rtol=1e-8):
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=rtol, atol=1e-12, msg=name.__add__)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert not [n for n, g in found.items() if not torch.equal(g, expected[n])]


@pytest.mark.parametrize("number", [1, 2, 4])  # of which the last does not refresh
@pytest.mark.parametrize("rule", RULES)
def test_a_network_goes_by_the_reference(rule, number):
    model = converted(rule=RULES[rule])
    found = passes(model, number)
    plain = make()
    expected = ref.gradients(plain, model, lambda m: loss(m, images(number - 1)))
    assert_close(found, expected)
    if "selection" in RULES[rule]:
        assert {"output", "input", "channels"} <= set(ref.kinds)
    else:
        assert set(ref.kinds) <= {"channels", "all"}


@pytest.mark.parametrize("rule", RULES)
def test_at_rate_0_all_is_as_it_was(rule):
    expected = passes(make(), 2)
    model = converted(0.0, RULES[rule])
    assert_equal(passes(model, 2), expected)
    model = converted(0.7, RULES[rule])
    with ssp.dense(model):
        assert_equal(passes(model, 2), expected)
    assert all(s.passes == 0 for s in subspaces(model).values())
    # The forward is anyway, and evaluation.
    assert torch.equal(model(images()), make()(images()))
    plain = ssp.revert(copy.deepcopy(model))
    assert torch.equal(model.eval()(images()), plain.eval()(images()))


def test_rates():
    """Overrides and context managers, and a schedule: as many directions as channels."""
    model = converted(0.75, overrides={"grouped": 0.5, "up": 0.0})
    passes(model, 1)
    bases = {name: s.bases for name, s in subspaces(model).items()}
    assert bases["grouped"]["dy"].vectors.shape == (2, 12, 6)
    assert bases["stem"]["dy"].vectors.shape == (1, 16, 4)
    assert bases["up"] == {}
    with ssp.sparsity(model, 0.5):
        passes(model, 1)
        assert bases["stem"]["dy"].vectors.shape == (1, 16, 8)
        assert bases["expand"]["dx"].vectors.shape == (1, 16, 8)
    aligned = converted(0.8, align=8)
    passes(aligned, 1)
    assert subspaces(aligned)["stem"].bases["dy"].vectors.shape == (1, 16, 8)


def test_each_layer_has_directions_of_its_own_and_only_where_it_can():
    model = converted()
    assert set(subspaces(model)) == {"stem", "expand", "grouped", "up", "head"}
    assert len({id(s) for s in subspaces(model).values()}) == 5
    shared = ssp.Subspace()
    model = ssp.convert(make(), 0.7, selection=shared)
    assert shared not in subspaces(model).values()


def test_revert_drops_the_directions():
    model = converted()
    passes(model)
    controller = ssp.get_controller(model)
    assert controller.state_dict()["layers"]["stem"]["passes"] == 4
    ssp.revert(model)
    assert "layers" not in controller.state_dict()
    assert_equal(passes(model, 1), passes(make(), 1))
    assert not subspaces(model)
    ssp.convert(model, 0.7, types=TYPES, **BOTH)
    assert all(s.passes == 0 and not s.bases for s in subspaces(model).values())


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_go_on_alike_and_apart(again):
    model = converted()
    passes(model, 3)
    twin = again(model)
    expected = passes(model, 6)
    assert_equal(passes(twin, 6), expected)
    passes(twin, 1)
    assert all(s.passes == 9 for s in subspaces(model).values())
    assert all(s.passes == 10 for s in subspaces(twin).values())
    assert ssp.get_controller(twin).state_dict()["layers"].keys() == subspaces(twin).keys()


def test_the_models_own_state_has_no_new_keys():
    model = converted()
    passes(model)
    assert model.state_dict().keys() == make().state_dict().keys()


def test_a_temporary_conversion_leaves_the_directions_of_before():
    model = converted()
    passes(model, 3)
    before = subspaces(model)
    with ssp.converted(model, 0.5, **BOTH):
        assert all(s.passes == 0 for s in subspaces(model).values())
        passes(model, 1)
    assert subspaces(model) == before and all(s.passes == 3 for s in before.values())


# --- odd layers -------------------------------------------------------------------------------


def test_an_own_forward_is_projected_where_its_weight_is_its_own():
    torch.manual_seed(0)
    model = ssp.convert(nn.Sequential(ScaledStdConv2d(3, 16, 3)), 0.75, **BOTH)
    for _ in range(3):
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    (subspace,) = subspaces(model).values()
    assert subspace.passes == 3 and subspace.bases["dy"].vectors.shape == (1, 16, 4)


def test_a_layer_that_makes_its_weight_anew_in_each_call_keeps_channels():
    torch.manual_seed(0)
    layer = CondConv2d(4, 16, 3, padding=1, num_experts=2)
    ssp.convert(layer, 0.75, types=CondConv2d, **BOTH)
    assert not subspaces(layer)
    routing = torch.rand(3, 2)
    layer(torch.randn(3, 4, 8, 8), routing).square().mean().backward()
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.any()
    plan = ssp.plan(layer, types=CondConv2d, selection="principal")
    (row,) = plan
    assert "the paper's choice: its weight may have another shape in each call" in row.reason


class Slim(nn.Conv2d):
    """Some of its channels, as in networks that are trained in several widths at once."""

    width = 16

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight[: self.width], self.bias[: self.width])


def test_a_part_of_the_weight_keeps_channels():
    torch.manual_seed(0)
    layer = Slim(3, 16, 3)
    ssp.convert(layer, 0.75, selection="principal")
    for width in (16, 8, 16, 12):
        layer.width = width
        layer.zero_grad()
        layer(torch.randn(2, 3, 8, 8)).square().mean().backward()
        rows = int(layer.weight.grad.flatten(1).any(1).sum())
        assert rows == (16 if width == 16 else width // 4)
    assert subspaces(layer)[""].passes == 2


def test_a_parametrized_layer():
    torch.manual_seed(0)
    layer = parametrizations.weight_norm(nn.Conv2d(3, 16, 3))
    ssp.convert(layer, 0.75, **BOTH)
    layer(torch.randn(2, 3, 8, 8)).square().mean().backward()
    assert subspaces(layer)[""].passes == 1
    state = ssp.get_controller(layer).state_dict()
    ssp.get_controller(layer).load_state_dict(state)


def test_a_layer_that_is_pruned_begins_anew():
    layer = ssp.convert(nn.Conv2d(3, 16, 3), 0.75, **BOTH)
    layer(torch.randn(2, 3, 8, 8)).square().mean().backward()
    layer.weight = nn.Parameter(layer.weight.detach()[:12])
    layer.bias, layer.out_channels = nn.Parameter(layer.bias.detach()[:12]), 12
    layer(torch.randn(2, 3, 8, 8)).square().mean().backward()
    assert subspaces(layer)[""].bases["dy"].vectors.shape == (1, 12, 3)


# --- the plan ---------------------------------------------------------------------------------


def test_the_plan_says_what_each_layer_gets():
    rows = {r.name: r for r in ssp.plan(make(), types=TYPES, selection="principal", drop_rate=0.7)}
    assert {name: row.selected for name, row in rows.items()} == {
        "stem": "output",
        "expand": "input",
        "depthwise": "channels",
        "grouped": "output",
        "up": "output",
        "head": "input",
    }
    assert rows["stem"].reason == "stock forward, principal, output side"
    assert rows["expand"].reason == "stock forward, principal, input side"
    assert "the paper's choice: depthwise" in rows["depthwise"].reason
    dear = ssp.plan(nn.Conv2d(32, 32, 1), selection="principal", drop_rate=0.3).rows[0]
    assert dear.selected == "channels"
    assert "would cost 1.03 of the dense gradient at drop rate 0.3" in dear.reason
    model = nn.Sequential(nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1))
    first, second = ssp.plan(model, selection="principal", overrides={"0": 0.3})
    assert (first.selected, second.selected) == ("channels", "output")


def test_a_plan_of_the_papers_choice_says_nothing_of_directions():
    for remainder in (None, "coarse"):
        plan = ssp.plan(make(), remainder=remainder)
        assert {r.selected for r in plan.converted} == {"channels"}
        assert {r.selected for r in plan.skipped} <= {None}
        assert "principal" not in str(plan) and "paper" not in str(plan)


@pytest.mark.parametrize("wrong", [{"selection": "pca"}, {"remainder": "fine"}], ids=str)
def test_arguments_that_mean_nothing_change_nothing(wrong):
    layer = nn.Conv2d(3, 8, 3)
    for function in (ssp.plan, ssp.convert):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            function(layer, **wrong)
    assert type(layer) is nn.Conv2d
