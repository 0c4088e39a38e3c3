"""``report``: the plan and the summary of a model, as text, JSON and CSV."""

from __future__ import annotations

import json
import re

import torch

import ssprop_patch as ssp
from ssprop_patch.cli.models import load_model


def test_report_shows_the_summary_and_each_layer_that_stays_dense_with_its_reason(nets, printed):
    out = printed("report", f"{nets}:build", "--input-size", 2, 3, 8, 8, "--drop-rate", 0.5)
    model = load_model(f"{nets}:build")
    assert str(ssp.summary(model, input_size=(2, 3, 8, 8), drop_rate=0.5)) in out
    assert "6 layers: 3 to convert, 3 left dense" in out
    assert "3 Conv2d: stock forward" in out
    plan = ssp.plan(model, inputs=torch.empty(2, 3, 8, 8))
    assert [row.name for row in plan.others] == ["head"]
    for row in (*plan.skipped, *plan.others):
        line = rf"^{row.name} +{row.cls.__name__} +[\d.]+ % +{re.escape(row.reason)}$"
        assert re.search(line, out, re.M)
    assert plan.where_the_flops_are() in out and "--types" not in out
    parameters = sum(p.numel() for p in model.parameters())
    assert f"{parameters / 1e6:.2f} M parameters, input 2x3x8x8" in out


def test_report_of_a_transformer_says_that_its_linear_layers_hold_the_flops(printed):
    out = printed("report", "timm:vit_tiny_patch16_224", "--input-size", 1, 3, 224, 224)
    assert "--types Conv2d Linear converts the layers that hold more of them" in out
    assert re.search(r"^49 layers +Linear +8\d\.\d % +nn.Linear is not among types$", out, re.M)
    assert re.search(r"^saved: 0\.\d+ % of the backward FLOPs of the whole network", out, re.M)
    types = ("--types", "Conv2d", "Linear")
    both = printed("report", "timm:vit_tiny_patch16_224", "--input-size", 1, 3, 224, 224, *types)
    assert "--types" not in both and "50 to convert" in both


def test_report_as_json_is_plan_and_summary(nets, printed):
    out = printed(
        "report", f"{nets}:build", "--input-size", 2, 3, 8, 8, "--drop-rate", 0.5, "--json"
    )
    model, found = load_model(f"{nets}:build"), json.loads(out)
    expected = ssp.summary(model, input_size=(2, 3, 8, 8), drop_rate=0.5).to_dict()
    assert found["summary"] == json.loads(json.dumps(expected))
    plan = ssp.plan(model, inputs=torch.empty(2, 3, 8, 8))
    rows = [(r["name"], r["class"], r["action"], r["reason"], r["share"]) for r in found["plan"]]
    assert rows == [
        (r.name, r.cls.__name__, r.action, r.reason, r.share) for r in (*plan, *plan.others)
    ]
    assert (found["model"], found["input_size"]) == (f"{nets}:build", [[2, 3, 8, 8]])


def test_report_as_csv_adds_up_to_the_summary_and_names_every_layer(nets, printed, read_csv):
    out = printed("report", f"{nets}:build", "--input-size", 2, 3, 8, 8, "--csv")
    model, rows = load_model(f"{nets}:build"), read_csv(out)
    summary = ssp.summary(model, input_size=(2, 3, 8, 8))
    for column in ("forward", "dense_backward", "sparse_backward"):
        assert sum(int(r[column] or 0) for r in rows) == getattr(summary, column)
    assert rows.pop()["name"] == "(everything else)"
    actions = {r["name"]: (r["action"], r["reason"]) for r in rows}
    plan = ssp.plan(model)
    assert actions == {r.name: (r.action, r.reason) for r in (*plan, *plan.others)}
    by_name = {r["name"]: r for r in rows}
    assert by_name["same"]["calls"] == "2"
    assert by_name["stem"]["output_shape"] == "2x10x6x6"


def test_report_averages_over_a_schedule(nets, printed):
    text = "LinearSchedule(0.0, 0.8, total=6, interval='step')"
    out = printed(
        "report",
        f"{nets}:build",
        "--input-size",
        2,
        3,
        8,
        8,
        "--schedule",
        text,
        "--epochs",
        4,
        "--steps-per-epoch",
        2,
        "--json",
    )
    expected = ssp.summary(
        load_model(f"{nets}:build"),
        input_size=(2, 3, 8, 8),
        epochs=4,
        steps_per_epoch=2,
        schedule=ssp.LinearSchedule(0.0, 0.8, total=6, interval="step"),
    )
    assert json.loads(out)["summary"] == json.loads(json.dumps(expected.to_dict()))


def test_report_counts_the_types_that_are_named(nets, printed, read_csv):
    out = printed(
        "report",
        f"{nets}:build",
        "--input-size",
        2,
        3,
        8,
        8,
        "--drop-rate",
        0.5,
        "--types",
        "Linear",
        "ConvTranspose2d",
        "--csv",
    )
    rows = read_csv(out)
    assert {r["name"] for r in rows if r["action"] == "convert"} == {"up", "head"}
    # What the importance of so small a head costs is more than it saves.
    assert {r["name"] for r in rows if float(r["saved"] or 0) > 0} == {"up"}


def test_report_counts_aligned_channels(nets, printed):
    out = printed(
        "report", f"{nets}:build", "--input-size", 2, 3, 8, 8, "--drop-rate", 0.5, "--align", 4
    )
    model = load_model(f"{nets}:build")
    aligned = str(ssp.summary(model, input_size=(2, 3, 8, 8), drop_rate=0.5, align=4))
    assert aligned in out and "rounded up to multiples of 4" in aligned


def test_report_takes_several_inputs(nets, printed):
    out = printed(
        "report",
        f"{nets}:Two",
        "--input-size",
        2,
        3,
        8,
        8,
        "--input-size",
        1,
        2,
        9,
        "--drop-rate",
        0.5,
    )
    assert "input 2x3x8x8 and 1x2x9" in out and out.count("1x2x9") == 2
