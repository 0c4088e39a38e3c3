"""Which layers hold the FLOPs: in a plan with inputs."""

import pytest
import torch
from torch import nn

import ssprop_patch as ssp

from .networks import Mixed, small


def test_shares_are_those_of_a_dense_step_and_add_up():
    model, x = Mixed(), torch.randn(2, 3, 32, 32)
    plan = ssp.plan(model, inputs=x)
    assert [row.name for row in plan] == ["stem"]
    held = {row.name: row.share for row in (*plan, *plan.others)}
    assert set(held) == {"stem", "", "attention", "proj", "head"}  # "": what is functional
    s = ssp.summary(model, inputs=x, drop_rate=0.0)
    total = s.forward + s.dense_backward
    assert sum(held.values()) == pytest.approx(1)
    assert held["stem"] * total == pytest.approx(2 * s.layers[0].forward)
    assert held["proj"] * total == pytest.approx(3 * 2 * (2 * 64) * 16 * 16)
    assert {row.action for row in plan.others} == {"skip"}


def test_what_holds_more_than_the_convolutions_is_named():
    model, x = Mixed(), torch.randn(2, 3, 32, 32)
    assert ssp.plan(model).suggested_types == () and "types=" not in str(ssp.plan(model))
    plan = ssp.plan(model, inputs=x, exclude="stem")
    assert plan.suggested_types == (nn.Linear,)
    whole = ssp.plan(nn.Sequential(small(), nn.Flatten(), nn.Linear(256, 5)), inputs=x[..., :8, :8])
    assert whole.suggested_types == ()
    up = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 8, 4, 2))
    plan = ssp.plan(up, inputs=x)
    assert plan.suggested_types == (nn.Conv2d, nn.ConvTranspose2d)
    assert str(plan).endswith(
        "types=(nn.Conv2d, nn.ConvTranspose2d) converts the layers that hold more of them"
    )
    assert len(ssp.plan(up, inputs=x, types=plan.suggested_types).converted) == 2


def test_a_plan_without_inputs_lists_what_else_multiplies_matrices():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.LSTM(4, 4))
    model.append(nn.MultiheadAttention(4, 2))
    plan = ssp.plan(model)
    assert [(row.name, row.reason) for row in plan.others] == [
        ("1", "nn.Linear is not among types"),
        ("2", "there is no sparse backward for LSTM"),
        ("3", "there is no sparse backward for MultiheadAttention"),
    ]
    *_, last = str(plan).splitlines()
    assert last == "4 layers: 1 to convert, 3 left dense"
    assert all(row.share is None for row in (*plan, *plan.others))
    named = ssp.plan(model, types=(nn.Conv2d, nn.Linear))
    assert [row.name for row in named.others] == ["2", "3"]


def test_a_converted_model_and_its_counts_are_left_alone():
    model = ssp.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 5)), 0.5)
    before = [dict(vars(m)) for m in model.modules()]
    plan = ssp.plan(model, inputs=torch.randn(2, 3, 8, 8))
    assert plan.rows[0].share > plan.others[0].share > 0
    assert not plan.rows[0].ran
    assert [dict(vars(m)) for m in model.modules()] == before
    with pytest.raises(ValueError, match="does not run on inputs of shapes"):
        ssp.plan(model, inputs=torch.randn(2, 4, 8, 8))
