"""plan: what happens to each convolution and why, as a dry run."""

import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import CondConv2d, StdConv2d
from torch import nn
from torch.nn.utils import parametrizations

import ssprop_patch as ssp


class Own(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias)


class OnlyConvForward(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias)


class OnlyInit(nn.Conv2d):
    pass


class ConvNeXtLikeBlock(nn.Module):
    """Named like a convolution, holds a parameter; but it is a block around one."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(3))
        self.dw = nn.Conv2d(3, 3, 3, groups=3)


TRANSPOSED = "transposed convolution: nn.ConvTranspose2d is not among types"


def row(module):
    """The only row of a module's plan."""
    (row,) = ssp.plan(module)
    return row


def nested():
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 4, 3),
            "layer1": nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 3), "conv2": nn.Conv2d(4, 4, 3)}),
            "layer2": nn.ModuleDict(
                {"conv1": nn.Conv2d(4, 4, 3), "up": nn.ConvTranspose2d(4, 4, 3)}
            ),
        }
    )


@pytest.mark.parametrize(
    ("make", "action", "reason"),
    [
        (lambda: nn.Conv1d(2, 4, 1), "convert", "stock forward"),
        (lambda: nn.Conv2d(2, 4, 1), "convert", "stock forward"),
        (lambda: nn.Conv3d(2, 4, 1), "convert", "stock forward"),
        (lambda: nn.Conv2d(4, 4, 1, groups=4), "convert", "stock forward"),
        (lambda: OnlyInit(2, 4, 1), "convert", "stock forward"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(2, 4, 1)), "convert", "stock forward"),
        (lambda: Own(2, 4, 1), "convert", "own forward"),
        (lambda: OnlyConvForward(2, 4, 1), "convert", "own forward"),
        (lambda: StdConv2d(2, 4, 1), "convert", "own forward"),
        (lambda: nn.Conv2d(2, 1, 1), "skip", "one output channel"),
        (lambda: Own(2, 1, 1), "skip", "one output channel"),
        (lambda: nn.Conv2d(2, 4, 1, dtype=torch.cfloat), "skip", "complex"),
        (lambda: nn.ConvTranspose1d(2, 4, 1), "skip", "transposed"),
        (lambda: nn.ConvTranspose2d(2, 4, 1), "skip", "transposed"),
        (lambda: nn.ConvTranspose3d(2, 4, 1), "skip", "transposed"),
        (lambda: CondConv2d(2, 4, 1), "skip", "in its own way"),
        (lambda: torchvision.ops.DeformConv2d(2, 4, 1), "skip", "in its own way"),
        (lambda: nn.LazyConv2d(4, 1), "refuse", "lazy.*forward"),
    ],
)
def test_actions_and_reasons(make, action, reason):
    module = make()
    found = row(module)
    assert (found.action, found.name, found.drop_rate) == (action, "", None)
    assert found.module is module and found.cls is type(module)
    assert re.search(reason, found.reason), found.reason


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_modules_are_left_alone():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    model = nn.Sequential(scripted, nn.Conv2d(4, 4, 1))
    rows = {r.name: r for r in ssp.plan(model)}
    assert rows["0.0"].action == "skip" and "before scripting" in rows["0.0"].reason
    assert rows["1"].action == "convert"
    ssp.convert(model, 0.5)
    model(torch.randn(2, 3, 4, 4)).pow(2).sum().backward()
    assert int(model[1].weight.grad.flatten(1).ne(0).any(1).sum()) == 2
    scripted_weight = dict(model.named_parameters())["0.0.weight"]
    assert int(scripted_weight.grad.flatten(1).ne(0).any(1).sum()) == 4
    ssp.revert(model)


def test_blocks_are_not_taken_for_convolutions():
    assert [r.name for r in ssp.plan(ConvNeXtLikeBlock())] == ["dw"]
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 8, 8, 8))
    convolutions = [n for n, m in model.named_modules() if type(m) is nn.Conv2d]
    rows = ssp.plan(model)
    assert [r.name for r in rows] == convolutions
    assert {r.action for r in rows} == {"convert"}


def test_other_layers_have_no_row():
    assert len(ssp.plan(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm2d(2), nn.Unfold(2)))) == 0


def test_rows_in_order_and_parts():
    model = nested()
    plan = ssp.plan(model, exclude="stem")
    assert isinstance(plan, ssp.Plan) and len(plan) == 5
    assert [r.name for r in plan] == [
        "stem", "layer1.conv1", "layer1.conv2", "layer2.conv1", "layer2.up"
    ]  # fmt: skip
    assert [r.name for r in plan.converted] == ["layer1.conv1", "layer1.conv2", "layer2.conv1"]
    assert [r.name for r in plan.skipped] == ["stem", "layer2.up"]
    assert plan.refused == ()
    assert all(model.get_submodule(r.name) is r.module for r in plan)


def test_an_alias_has_one_row_under_its_first_name():
    model = nested()
    model["again"] = model["layer1"]["conv2"]
    assert [r.name for r in ssp.plan(model)].count("layer1.conv2") == 1
    assert "again" not in [r.name for r in ssp.plan(model)]
    (excluded,) = [r for r in ssp.plan(model, exclude="again") if "excluded" in r.reason]
    assert excluded.name == "layer1.conv2"


def test_reasons_name_pattern_and_filter():
    rows = {
        r.name: r
        for r in ssp.plan(
            nested(),
            exclude=("stem", "layer2"),
            overrides={"conv2": 0.25, r"layer1\..*": 0.5},
            filter_fn=lambda module, name: name != "layer1.conv1",
        )
    }
    assert rows["stem"].reason == "excluded by 'stem'"
    assert rows["layer2.conv1"].reason == "excluded by 'layer2'"
    assert rows["layer1.conv1"].action == "skip" and "filter_fn" in rows["layer1.conv1"].reason
    assert rows["layer1.conv2"].action == "convert" and rows["layer1.conv2"].drop_rate == 0.25
    assert "0.25" in rows["layer1.conv2"].reason and "'conv2'" in rows["layer1.conv2"].reason
    assert rows["layer2.up"].reason == TRANSPOSED  # excluded, but never in question


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("stem", ["stem"]),
        ("layer1.conv1", ["layer1.conv1"]),
        ("layer1", ["layer1.conv1", "layer1.conv2"]),
        ("conv1", ["layer1.conv1", "layer2.conv1"]),
        (r".*conv\d", ["layer1.conv1", "layer1.conv2", "layer2.conv1"]),
        (r"layer[12]\.conv1", ["layer1.conv1", "layer2.conv1"]),
        (r"(?!stem).*", ["layer1.conv1", "layer1.conv2", "layer2.conv1"]),
    ],
)
def test_patterns(pattern, names):
    rows = ssp.plan(nested(), exclude=pattern)
    assert [r.name for r in rows if r.reason.startswith("excluded")] == names
    rows = ssp.plan(nested(), overrides={pattern: 0.5})
    assert [r.name for r in rows if r.drop_rate == 0.5] == names


@pytest.mark.parametrize(
    "pattern", ["ste", "tem", "layer", "onv1", "layer1.", "ayer1.conv1", "conv"]
)
def test_a_part_of_a_name_is_no_pattern(pattern):
    with pytest.raises(ValueError, match=r"matches no layer.*nearest.*'"):
        ssp.plan(nested(), exclude=pattern)
    with pytest.raises(ValueError, match=r"matches no layer.*nearest.*'"):
        ssp.plan(nested(), overrides={pattern: 0.5})


def test_text_table():
    text = str(ssp.plan(nested(), exclude="stem", overrides={"conv2": 0.25}))
    lines = text.splitlines()
    assert lines[0].split() == ["name", "class", "action", "why"]
    assert len(lines) == 1 + 5 + 1
    assert lines[1].split(None, 3) == ["stem", "Conv2d", "skip", "excluded by 'stem'"]
    assert lines[5].split(None, 3) == [
        "layer2.up", "ConvTranspose2d", "skip", TRANSPOSED
    ]  # fmt: skip
    assert len({line.index(action) for line, action in zip(
        lines[1:6], ["skip", "convert", "convert", "convert", "skip"], strict=True
    )}) == 1  # fmt: skip
    assert lines[-1] == "5 layers: 3 to convert, 2 stay dense"
    assert "(model)" in str(ssp.plan(nn.Conv2d(2, 4, 1)))
    assert str(ssp.plan(nn.LazyConv2d(4, 1))).endswith("1 refused")


def test_works_on_converted_models_and_shows_the_same():
    def shown(plan):
        return [(r.name, r.module, r.cls, r.action, r.reason, r.drop_rate) for r in plan]

    model = nn.Sequential(nested(), Own(3, 4, 1), OnlyInit(3, 4, 1), nn.Conv2d(3, 1, 1))
    before, text = shown(ssp.plan(model)), str(ssp.plan(model))
    ssp.convert(model, 0.5, exclude="0.stem")
    assert shown(ssp.plan(model)) == before and str(ssp.plan(model)) == text
    ssp.revert(model)
    assert shown(ssp.plan(model)) == before


@pytest.mark.parametrize("converted", [False, True])
def test_changes_nothing(converted):
    model = nn.Sequential(nested(), Own(3, 4, 1), nn.LazyConv2d(4, 1))
    if converted:
        ssp.convert(model[0], 0.5, exclude="stem")

    def state():
        return [(m, type(m), dict(vars(m))) for m in model.modules()]

    before = state()
    ssp.plan(model, exclude="0.stem", overrides={"conv2": 0.5}, filter_fn=lambda m, n: False)
    assert state() == before
    assert ssp.is_converted(model) == converted


def test_says_what_a_parametrization_after_conversion_is():
    model = nested()
    ssp.convert(model, 0.5)
    parametrizations.weight_norm(model["stem"])
    (refused,) = ssp.plan(model).refused
    assert refused.name == "stem" and "after conversion" in refused.reason
    assert "remove_parametrizations" in refused.reason


def test_a_plan_and_convert_agree():
    model = nn.Sequential(nested(), Own(3, 4, 1), nn.Conv2d(3, 1, 1), CondConv2d(2, 4, 1))
    choice = dict(
        exclude="stem", overrides={"conv1": 0.25}, filter_fn=lambda m, name: "conv2" not in name
    )
    expected = {r.module for r in ssp.plan(model, **choice).converted}
    classes = {m: type(m) for m in model.modules()}
    ssp.convert(model, 0.5, **choice)
    assert {m for m in model.modules() if type(m) is not classes[m]} == expected
    assert {m for m in model.modules() if m not in expected and ssp.is_converted(m)} == {
        model, model[0], model[0]["layer1"], model[0]["layer2"]
    }  # fmt: skip


def test_bad_input():
    with pytest.raises(TypeError, match="text"):
        ssp.plan(nested(), exclude=[3])
    with pytest.raises(ValueError, match=r"overrides\['stem'\].*1.5"):
        ssp.plan(nested(), overrides={"stem": 1.5})


def test_the_stem_alone_can_be_named():
    model = torchvision.models.resnet18(num_classes=3)
    assert [row.name for row in ssp.plan(model, exclude="^conv1$").skipped] == ["conv1"]
    assert len(ssp.plan(model, exclude="conv1").skipped) == 9  # the stem and one in each block


# --- measured ---------------------------------------------------------------------------------


def two_convolutions():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 1, 1))


def timed(monkeypatch, seconds, networks=(3.0, 2.0, 1.0)):
    """Make the timing return what is given.

    For layers ``seconds[name] = [(calls, dense, sparse)]``; for the whole network with none, those
    that pay alone, or all of them converted: ``networks``, in this order.
    """
    from ssprop_patch import timing

    asked = {}

    def time_layers(model, inputs, drop_rate, *, types, filter_fn, **settings):
        rows = ssp.plan(model, types=types, filter_fn=filter_fn).converted
        asked.update(drop_rate=drop_rate, names=[row.name for row in rows], layers=settings)
        return [
            timing.LayerTime(
                row.name, "Conv2d", calls, (1, 3, 8, 8), (4, 3, 3, 3), (1, 4, 6, 6),
                timing.Quantiles(dense, dense, dense), timing.Quantiles(sparse, sparse, sparse),
                "gather",
            )
            for row in rows
            for calls, dense, sparse in seconds.get(row.name, ())
        ]  # fmt: skip

    def time_networks(model, inputs, choices, drop_rate, *, types, **settings):
        asked["networks"] = settings
        names = {m: name for name, m in model.named_modules()}
        asked["choices"] = {k: [names[m] for m in layers] for k, layers in choices.items()}
        ms = dict(zip(("none", "those that pay alone", "all"), networks, strict=True))
        return {choice: timing.Quantiles(*[ms[choice]] * 3) for choice in choices}

    monkeypatch.setattr(timing, "time_layers", time_layers)
    monkeypatch.setattr(timing, "time_networks", time_networks)
    return asked


def test_measured_says_which_layers_pay(monkeypatch):
    asked = timed(monkeypatch, {"0": [(1, 2.0, 1.0)], "1": [(1, 1.0, 0.98)]}, (3.0, 1.0, 2.0))
    model = two_convolutions()
    plan = ssp.plan(model, inputs=torch.randn(1, 3, 8, 8), drop_rate=0.7, measure=True)
    assert asked["drop_rate"] == 0.7 and asked["names"] == ["0", "1"]
    assert asked["choices"] == {"none": [], "those that pay alone": ["0"], "all": ["0", "1"]}
    assert [row.pays for row in plan] == [True, False, False]  # 0.98: may be chance
    lines = str(plan).splitlines()
    head = "name input weight dense ms sparse ms share kernel pays alone"
    assert lines[0].split() == head.split()
    assert lines[1].split() == "0 1x3x8x8 4x3x3x3 2.000 1.000 0.50 gather yes".split()
    assert "one output channel" in lines[3]
    assert lines[-2] == "3 layers: 2 to convert, 1 stay dense; 1 pay alone"
    assert lines[-1].endswith(
        "converted: none 3.000 ms, those that pay alone 1.000 ms, all 2.000 ms; "
        "convert those that pay alone"
    )
    ssp.convert(model, filter_fn=plan.pays)
    assert [ssp.is_converted(m) for m in model] == [True, False, False]
    twin = ssp.convert(two_convolutions(), filter_fn=plan.pays)  # found by name
    assert [ssp.is_converted(m) for m in twin] == [True, False, False]


@pytest.mark.parametrize(
    ("networks", "best", "converted"),
    [
        ((3.0, 2.0, 1.0), "all", [True, True, False]),
        ((1.0, 0.995, 0.992), "none", [False] * 3),  # may be chance
        ((1.0, 0.98, 2.0), "those that pay alone", [True, False, False]),
        ((1.0, 2.0, 3.0), "none", [False] * 3),
    ],
)
def test_measured_the_whole_network_decides(monkeypatch, networks, best, converted):
    timed(monkeypatch, {"0": [(1, 2.0, 1.0)], "1": [(1, 1.0, 1.0)]}, networks)
    model = two_convolutions()
    plan = ssp.plan(model, inputs=torch.randn(1, 3, 8, 8), measure=True)
    assert plan.best.choice == best
    assert [plan.pays(m) for m in model] == converted
    if any(converted):
        ssp.convert(model, filter_fn=plan.pays)
    assert [ssp.is_converted(m) for m in model] == converted


@pytest.mark.parametrize("sparse", [0.5, 2.0])
def test_measured_no_choice_is_timed_twice(monkeypatch, sparse):
    asked = timed(monkeypatch, {"0": [(1, 1.0, sparse)], "1": [(1, 1.0, sparse)]})
    ssp.plan(two_convolutions(), inputs=torch.randn(1, 3, 8, 8), measure=True)
    assert asked["choices"] == {"none": [], "all": ["0", "1"]}


def test_measured_a_layer_pays_by_all_its_calls(monkeypatch):
    timed(monkeypatch, {"0": [(1, 10.0, 5.0), (9, 1.0, 1.9)], "1": [(1, 1.0, 1.5), (9, 1.0, 0.5)]})
    plan = ssp.plan(two_convolutions(), inputs=torch.randn(1, 3, 8, 8), measure=True)
    assert [row.pays for row in plan] == [False, True, False]
    assert "(9 times)" in str(plan)


def test_measured_leaves_out_what_stays_dense(monkeypatch):
    asked = timed(monkeypatch, {"1": [(1, 2.0, 1.0)]})
    plan = ssp.plan(two_convolutions(), exclude="^0$", inputs=torch.randn(1, 3, 8, 8), measure=True)
    assert asked["names"] == ["1"]
    assert [row.pays for row in plan] == [False, True, False]


def test_measured_as_it_will_be_converted(monkeypatch):
    asked = timed(monkeypatch, {"0": [(1, 2.0, 1.0)]})
    settings = dict(
        overrides={"^1$": 0.25}, align=2, selection="l2", autocast=torch.bfloat16, iterations=7
    )
    ssp.plan(two_convolutions(), inputs=torch.randn(1, 3, 8, 8), measure=True, **settings)
    assert asked["layers"] == asked["networks"] == settings


@pytest.mark.parametrize("measure", [False, True])
def test_an_unknown_selection_is_an_error(monkeypatch, measure):
    timed(monkeypatch, {})
    inputs = torch.randn(1, 3, 8, 8) if measure else None
    with pytest.raises(ValueError, match="selection must be one of"):
        ssp.plan(two_convolutions(), inputs=inputs, measure=measure, selection="l3")


def test_measured_for_real():
    model = two_convolutions()
    before = copy.deepcopy(model.state_dict())
    plan = ssp.plan(model, inputs=torch.randn(2, 3, 8, 8), measure=True, iterations=1)
    assert [len(row.times) for row in plan] == [1, 1, 0]
    assert all(t.dense_ms.p50 > 0 and t.sparse_ms.p50 > 0 for row in plan for t in row.times)
    assert plan.networks[0].choice == "none" and not plan.networks[0].converted
    assert plan.networks[-1].choice == "all" and plan.networks[-1].converted == {"0", "1"}
    assert all(network.ms.p50 > 0 for network in plan.networks)
    assert sum(plan.pays(m) for m in model) == len(plan.best.converted)
    assert not ssp.is_converted(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_layer_without_a_gradient_does_not_pay():
    model = two_convolutions().requires_grad_(False)
    plan = ssp.plan(model, inputs=torch.randn(2, 3, 8, 8), measure=True, iterations=1)
    assert not any(row.pays for row in plan) and "needs no gradient" in str(plan)
    assert plan.best is None and not plan.networks and not any(plan.pays(m) for m in model)


def test_measuring_and_inputs_need_each_other():
    with pytest.raises(ValueError, match="measuring needs inputs"):
        ssp.plan(two_convolutions(), measure=True)
    with pytest.raises(ValueError, match="inputs are for measuring"):
        ssp.plan(two_convolutions(), inputs=torch.randn(1, 3, 8, 8))
    with pytest.raises(RuntimeError, match="has no times"):
        ssp.convert(two_convolutions(), filter_fn=ssp.plan(two_convolutions()).pays)
