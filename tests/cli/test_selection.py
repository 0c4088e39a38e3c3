"""``--selection`` and ``--remainder``: how they reach the summary, the plan and the timing."""

from __future__ import annotations

import json

import pytest

import ssprop_patch as ssp
from ssprop_patch.cli import measure
from ssprop_patch.cli.models import load_model

SIZE = ("--input-size", 2, 3, 8, 8, "--drop-rate", 0.6)
BOTH = ("--selection", "principal", "--remainder", "coarse")


@pytest.fixture(autouse=True)
def counter(monkeypatch):
    monkeypatch.setattr(measure.energy, "find_counter", lambda: (None, "none"))


def test_report_counts_and_plans_with_them(nets, printed):
    model = load_model(f"{nets}:build")
    found = json.loads(printed("report", f"{nets}:build", *SIZE, *BOTH, "--json"))
    how = {"selection": "principal", "remainder": "coarse", "drop_rate": 0.6}
    expected = ssp.summary(model, input_size=(2, 3, 8, 8), **how).to_dict()
    assert found["summary"] == json.loads(json.dumps(expected))
    plain = ssp.summary(model, input_size=(2, 3, 8, 8), drop_rate=0.6)
    assert found["summary"]["sparse_backward"] != plain.sparse_backward
    reasons = {row["name"]: row["reason"] for row in found["plan"]}
    assert reasons["same"] == "stock forward, principal, output side"
    out = printed("report", f"{nets}:build", *SIZE, *BOTH)
    assert "3 Conv2d: stock forward, principal, output side" in out


def test_without_them_it_is_the_papers_choice(nets, printed):
    text = printed("report", f"{nets}:build", *SIZE)
    assert text == printed(
        "report", f"{nets}:build", *SIZE, "--selection", "l1", "--remainder", "none"
    )
    assert "principal" not in text


def test_measure_times_them(nets, printed, read_csv):
    rows = read_csv(printed("measure", f"{nets}:build", *SIZE, *BOTH, "--iterations", 1, "--csv"))
    layers = [row for row in rows if row["kind"] == "layer"]
    assert {row["kernel"] for row in layers} == {"output side"}
    assert {(row["selection"], row["remainder"]) for row in rows} == {("principal", "coarse")}


@pytest.mark.parametrize("command", ["report", "measure"])
@pytest.mark.parametrize(
    "wrong, words",
    [(("--selection", "pca"), "principal"), (("--remainder", "fine"), "coarse")],
    ids=["selection", "remainder"],
)
def test_what_does_not_exist_is_one_line(command, wrong, words, nets, refused):
    message, code = refused(command, f"{nets}:build", *SIZE, *wrong)
    assert code == 2 and wrong[1] in message and words in message
