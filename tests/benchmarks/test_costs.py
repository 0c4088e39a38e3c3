"""What trainings cost: FLOPs of steps, dense steps for the same FLOPs, seconds."""

from __future__ import annotations

import dataclasses
import itertools
import types

import pytest
import study.runs as runs
import timm
import torch
from classifier import clock, costs, models, table
from study.settings import resolve
from torch import nn

import ssprop_patch as ssp


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "test_vit"])
def test_step_cost_is_what_the_summary_counts_of_the_whole_network(name):
    size = 160 if name == "test_vit" else 64
    model, shape = timm.create_model(name, num_classes=10), (4, 3, size, size)
    cost = costs.StepCost(model, shape)
    for rate in (0.0, 0.03, 0.5, 0.8, 0.97):
        summary = ssp.summary(model, input_size=shape, drop_rate=rate)
        assert (cost.forward, cost.backward(rate)) == (summary.forward, summary.sparse_backward)


@pytest.mark.parametrize(
    "schedule",
    [
        ssp.BarSchedule(0.8),
        ssp.BarSchedule(0.8, period=6, interval="step"),
        ssp.LinearSchedule(0.0, 0.9, total=70, interval="step"),
        ssp.ConstantSchedule(0.0),
    ],
)
def test_plan_gives_equal_compute_to_half_a_step(schedule):
    cost = costs.StepCost(timm.create_model("resnet18", num_classes=10), (8, 3, 32, 32))
    plan = costs.plan(cost, schedule, epochs=7, steps_per_epoch=10)
    assert plan.steps["dense"] == plan.steps["ssprop"] == len(plan.rates) == 70
    per_t = 1 if schedule.interval == "step" else 10
    assert plan.rates == [schedule(step // per_t) for step in range(70)]
    dense = sum(cost.total([0.0]))
    assert abs(sum(cost.total(plan.rates)) - plan.steps["dense-equal"] * dense) <= dense / 2


def test_warm_up_counts_as_the_median_of_its_kind():
    times = clock.Clock(torch.device("cpu"))
    times.begin()
    for step in range(20):
        sparse = step % 10 >= 5
        slow = 100.0 if step in (0, 1, 5, 11) else 0.0  # two of them after a resume
        if step == 10:
            times.begin()
        times.laps.append([0.0, 1.0, (1.0 if sparse else 3.0) + slow, 0.0])
        times.rates.append(0.8 if sparse else 0.0)
    report = clock.summary(times)
    assert report["backward_s"] == 2.0 and report["step_s"] == 3.0
    assert report["dense_backward_median_s"] == 3.0
    assert report["sparse_backward_median_s"] == 1.0
    assert report["train_s"] == 60.0 and report["warm_up_s"] == 400.0


def test_spread():
    assert table.spread([1.0, 2.0, 3.0], ".1f") == "2.0 ± 1.0"
    assert table.spread([2.0, 2.0], ".1f") == table.spread([2.0], ".1f") == "2.0"


class _Cost:
    """100 FLOPs forward, 200 backward at rate 0, 40 at 0.8."""

    def total(self, rates):
        return 100 * len(rates), sum({0.0: 200, 0.8: 40}[rate] for rate in rates)


@pytest.mark.parametrize(
    ("schedule", "epochs", "steps"),
    [
        ("BarSchedule(0.8, period=2)", 4, 15),  # 10 x 300 + 10 x 140 = 4400 = 14.67 x 300
        ("BarSchedule(0.8, period=2)", 1, 5),  # the first epoch is dense
        ("ConstantSchedule(0.8)", 4, 9),  # 20 x 140 = 2800 = 9.33 x 300
        ("BarSchedule(0.8, period=4, interval='step')", 1, 4),  # 3 x 300 + 2 x 140 = 3.93 x 300
    ],
)
def test_steps_of_equal_compute_by_hand(schedule, epochs, steps):
    settings = resolve({"method": "dense-equal-compute", "schedule": schedule, "epochs": epochs})
    assert runs.steps_of(settings, _Cost(), 5) == steps
    sparse = dataclasses.replace(settings, method="ssprop", selection="l1")
    assert runs.steps_of(sparse, _Cost(), 5) == 5 * epochs


def test_cost_of_excluded_layers_and_of_layers_with_own_rates():
    model, shape = timm.create_model("resnet18", num_classes=10), (4, 3, 64, 64)
    layers = {"exclude": ["^conv1$", "layer4"], "overrides": {"layer1": 0.5, "layer2.0": 0.0}}
    cost, plain = costs.StepCost(model, shape, **layers), costs.StepCost(model, shape)
    assert cost.forward == plain.forward and cost.backward(0.0) == plain.backward(0.0)
    ssp.convert(model, 0.8, **layers)
    for rate in (0.8, 0.3, 0.97):
        ssp.get_controller(model).drop_rate = rate
        assert cost.backward(rate) == ssp.summary(model, input_size=shape).sparse_backward


@pytest.mark.parametrize(
    ("selection", "remainder"),
    [("l1", "none"), ("l1", "coarse"), ("principal", "none"), ("principal", "coarse")],
)
def test_cost_of_a_rule_is_what_a_meter_counts(selection, remainder):
    settings = resolve({"network": "resnet11_narrow", "frozen": ["conv1", "bn1", "layer1"]})
    source = types.SimpleNamespace(train=(torch.zeros(1, 3, 16, 16), torch.tensor([9])))
    model, _ = runs.build(settings, source)
    layers = {"exclude": [r"layer3\.0\.conv1"], "overrides": {"layer2": 0.6}}
    shape = (8, 3, 16, 16)
    cost = costs.StepCost(model, shape, **layers, selection=selection, remainder=remainder)
    dense = ssp.summary(model, input_size=shape, drop_rate=0).dense_backward
    assert cost.backward(0.0) == dense
    how = {"selection": selection, "remainder": None if remainder == "none" else remainder}
    ssp.convert(model, 0.8, **layers, **how)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    counted = [0]
    with ssp.Meter(model) as meter:
        for _ in range(4):  # directions are refreshed in the first three
            model(torch.randn(shape)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            counted.append(meter.report().backward_flops)
    refreshed, *_, usual = (b - a for a, b in itertools.pairwise(counted))
    mean = usual + (refreshed - usual) / 20
    assert usual < 0.7 * dense
    assert (refreshed > usual) == (selection == "principal")
    assert abs(cost.backward(0.8) - mean) <= 12  # rounded once a layer


def test_cost_of_linear_layers_counts_each_once():
    model, shape = (
        models.build(
            resolve({"network": "convnext_atto_small"}).options("cpu"),
            classes=10,
            channels=3,
            size=32,
        )[0],
        (2, 3, 32, 32),
    )
    convolutions = costs.StepCost(model, shape)
    both = costs.StepCost(model, shape, types=(nn.Conv2d, nn.Linear), exclude=["head"])
    assert both.forward == convolutions.forward
    bias = []

    def count(module, _, out):
        bias.append(out.numel())

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)
    model(torch.zeros(shape))
    # The package counts the bias' gradient, torch's counter does not.
    assert both.backward(0.0) == convolutions.backward(0.0) + sum(bias)
    # Depthwise and dense convolutions alone cannot save what both can.
    assert both.backward(0.8) < 0.25 * both.backward(0.0) < convolutions.backward(0.8)
