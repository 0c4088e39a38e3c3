"""plan: what convert would do with each layer, and why."""

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
        "stem",
        "layer1.conv1",
        "layer1.conv2",
        "layer2.conv1",
        "layer2.up",
    ]
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
    plan = ssp.plan(nested(), exclude="stem", overrides={"conv2": 0.25})
    lines = str(plan).splitlines()
    assert lines[0].split() == ["name", "class", "action", "why"]
    lines[5:7] = [f"{lines[5]} {lines[6].strip()}"]  # wrapped to fit a screen
    assert len(lines) == 1 + 5 + 1
    assert lines[1].split(None, 3) == ["stem", "Conv2d", "skip", "excluded by 'stem'"]
    assert lines[5].split(None, 3) == ["layer2.up", "ConvTranspose2d", "skip", TRANSPOSED]
    assert (
        len(
            {
                line.index(action)
                for line, action in zip(
                    lines[1:6], ["skip", "convert", "convert", "convert", "skip"], strict=True
                )
            }
        )
        == 1
    )
    assert lines[-1] == "5 layers: 3 to convert, 2 left dense"
    assert repr(plan) == f"Plan({lines[-1]})"
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
        model,
        model[0],
        model[0]["layer1"],
        model[0]["layer2"],
    }


def test_bad_input():
    with pytest.raises(TypeError, match="text"):
        ssp.plan(nested(), exclude=[3])
    with pytest.raises(ValueError, match=r"overrides\['stem'\].*1.5"):
        ssp.plan(nested(), overrides={"stem": 1.5})


def test_the_stem_alone_can_be_named():
    model = torchvision.models.resnet18(num_classes=3)
    assert [row.name for row in ssp.plan(model, exclude="^conv1$").skipped] == ["conv1"]
    assert len(ssp.plan(model, exclude="conv1").skipped) == 9  # the stem and one in each block
