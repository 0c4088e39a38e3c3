"""Directions and the remainder while timing: what runs, and that directions last between runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch import timing
from ssprop_patch.ops import autograd
from ssprop_patch.timing import layers

from .test_layers import once

BOTH = {"selection": "principal", "remainder": "coarse"}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 128, 1), nn.Conv2d(128, 128, 3, groups=128)
    )


X = torch.randn(2, 3, 10, 10)


@pytest.fixture
def rules(monkeypatch):
    """The rule, and how many passes its directions have had, of each sparse backward."""
    seen, real = [], autograd.sparse_backward

    def spy(dy, x, w, p, k, rule, *args):
        subspace = rule.subspace
        seen.append((rule.block, None if subspace is None else subspace.passes))
        return real(dy, x, w, p, k, rule, *args)

    monkeypatch.setattr(autograd, "sparse_backward", spy)
    return seen


def test_layers_say_on_which_side_they_are_projected(monkeypatch, rules):
    once(monkeypatch)
    rows = timing.time_layers(net(), X, 0.8, **BOTH)
    assert [row.kernel for row in rows][:2] == ["output side", "input side"]
    assert rows[2].kernel not in ("output side", "input side", "dense")
    assert {block for block, _ in rules} == {4}
    small = timing.time_layers(nn.Conv2d(8, 16, 1), torch.randn(2, 8, 1, 1), 0.8, **BOTH)
    assert small[0].kernel == "dense"  # the remainder would cost as much


def test_a_norm_is_timed_only_where_its_gradient_is_formed_in_part(monkeypatch):
    once(monkeypatch)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32))
    for rule, with_norm in (({}, True), ({"remainder": "coarse"}, False), (BOTH, False)):
        [row] = timing.time_layers(model, torch.randn(1, 3, 64, 64), **rule)
        assert row.with_norm is with_norm


def test_directions_last_from_step_to_step(rules):
    timing.time_steps(net(), X, 0.8, **BOTH, iterations=4)
    passes = [n for _, n in rules if n is not None]
    assert passes == sorted(passes) and len(set(passes)) > 4


def test_directions_last_between_the_runs_of_a_network(rules):
    model = net()
    found = timing.time_networks(
        model, X, {"none": [], "all": list(model)}, 0.8, **BOTH, iterations=4
    )
    assert set(found) == {"none", "all"} and not ssp.is_converted(model)
    passes = [n for _, n in rules if n is not None]
    assert passes == sorted(passes) and len(set(passes)) > 4


def test_a_measured_plan_says_what_each_layer_gets(monkeypatch):
    monkeypatch.setattr(layers, "_BURST_SECONDS", 0.0)
    plan = ssp.plan(net(), inputs=X, measure=True, iterations=1, drop_rate=0.8, **BOTH)
    assert [row.selected for row in plan] == ["output", "input", "channels"]
    assert "output side" in str(plan) and "input side" in str(plan)


def test_a_remainder_that_does_not_exist_is_refused():
    for call in (timing.time_layers, timing.time_steps):
        with pytest.raises(ValueError, match="remainder must be None, 'coarse'"):
            call(net(), X, remainder="fine")
