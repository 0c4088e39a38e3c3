"""Timing a model that a meter counts in: neither changes what the other one finds."""

import warnings

import pytest
import torch
from metering.by_hand import batch, counted, net, quiet_meter, train

import ssprop_patch as ssp
from ssprop_patch import timing
from ssprop_patch.timing import networks

X = batch(0)


def plan(model):
    ssp.plan(model, inputs=X, measure=True, iterations=1, progress=False)


def layers(model):
    timing.time_layers(model, X, iterations=1)


def steps(model):
    timing.time_steps(model, X, iterations=1)


@pytest.mark.parametrize("converted", [True, False])
@pytest.mark.parametrize("measure", [plan, layers, steps])
def test_what_is_timed_is_not_counted_and_the_meter_goes_on(measure, converted):
    found = []
    for measures in (False, True):
        model = net()
        if converted:
            ssp.convert(model, 0.5)
        with quiet_meter(model) as meter, warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = train(model, 1)
            if measures:
                seconds = dict(meter.report().seconds)
                measure(model)
                assert meter.report().seconds == seconds
            train(model, 2, optimizer, start=1)
            found.append((meter.steps, counted(meter), sorted(meter.kept.items())))
        assert ssp.is_converted(model) == converted
    assert found[0] == found[1] and found[0][0] == 3


def test_a_measurement_that_fails_leaves_the_meter_counting():
    model = net()
    with quiet_meter(model) as meter:
        with pytest.raises(ValueError, match="does not run"):
            timing.time_layers(model, torch.zeros(1))
        train(model, 1)
        assert meter.steps == 1 and counted(meter)[0] > 0


def test_no_hook_of_a_meter_is_timed(monkeypatch):
    model, hooks = ssp.convert(net(), 0.5), []

    def forward_and_backward(model, inputs, autocast):
        return lambda: hooks.extend(h for m in model.modules() for h in m._forward_hooks) or 0.0

    monkeypatch.setattr(networks, "_forward_and_backward", forward_and_backward)
    with quiet_meter(model):
        assert any(m._forward_hooks for m in model.modules())
        networks.time_networks(model, X, {"all": list(model)}, 0.5, iterations=1)
        assert any(m._forward_hooks for m in model.modules())
    assert not hooks
