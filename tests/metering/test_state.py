"""A run that is resumed counts on, and a state that is none is refused before anything changes."""

import copy
import io
import json
import math

import pytest
import timm
import torch

import ssprop_patch as ssp
from metering import by_hand
from metering.by_hand import by_step, counted, quiet_meter, train
from metering.test_energy import Counter


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def through_json(state):
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("stored", [through_a_file, through_json])
def test_a_resumed_run_counts_on(stored):
    whole = ssp.convert(by_hand.net(), by_step())
    with quiet_meter(whole) as meter:
        train(whole, 7)
        expected = meter.report().layers
    first = ssp.convert(by_hand.net(), by_step())
    with quiet_meter(first, energy=Counter()) as meter:
        train(first, 3)
        state = stored(meter.state_dict())
        before = meter.report()
    again = ssp.convert(by_hand.net(), by_step())
    ssp.get_controller(again).load_state_dict(ssp.get_controller(first).state_dict())
    with quiet_meter(again, energy=Counter()) as meter:
        train(again, 1)  # dropped by loading, as what it cost is
        ssp.get_controller(again).load_state_dict(ssp.get_controller(first).state_dict())
        meter.load_state_dict(state)
        assert meter.steps == 3
        loaded = meter.report()
        assert loaded.seconds == state["seconds"]
        assert 0 <= loaded.wall_seconds - state["wall_seconds"] < loaded.wall_seconds
        assert loaded.energy.total == sum(state["joules"].values()) + 1  # by this reading
        train(again, 4, start=3)
        found = meter.report()
    assert found.layers == expected
    assert found.steps == 7
    assert all(found.seconds[phase] > before.seconds[phase] for phase in before.seconds)


def test_a_state_is_plain_and_loading_it_changes_nothing():
    model = ssp.convert(timm.create_model("test_resnet", num_classes=5), 0.5)
    with quiet_meter(model) as meter:
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        state = meter.state_dict()
        meter.load_state_dict(state)
        again = meter.state_dict()
        assert {**again, "wall_seconds": 0} == {**state, "wall_seconds": 0}


def test_a_state_fits_the_same_model_wrapped_or_not():
    wrapped = torch.compile(ssp.convert(by_hand.net(), 0.5), backend="eager")
    with quiet_meter(ssp.convert(by_hand.net(), 0.5)) as one, quiet_meter(wrapped) as other:
        train(one._model, 2)
        other.load_state_dict(one.state_dict())
        assert counted(other) == counted(one)


BAD = {
    "no dict": (lambda s: None, TypeError, "dict"),
    "a part is missing": (lambda s: s.pop("layers") and None, ValueError, "layers missing"),
    "of the future": (lambda s: s.update(version=2), ValueError, "version 2"),
    "another model": (lambda s: s["layers"].pop("4") and None, ValueError, "such as '4'"),
    "steps": (lambda s: s.update(steps=-1), ValueError, "steps"),
    "steps are text": (lambda s: s.update(steps="3"), TypeError, "steps"),
    "no seconds": (lambda s: s.update(seconds=None), TypeError, "seconds"),
    "seconds": (lambda s: s["seconds"].update(forward="1"), TypeError, "seconds of forward"),
    "wall seconds": (lambda s: s.update(wall_seconds=math.nan), ValueError, "wall_seconds"),
    "joules": (lambda s: s.update(joules={"GPU 0": -1.0}), ValueError, "joules of GPU 0"),
    "a layer": (lambda s: s["layers"]["4"].pop("kept") and None, ValueError, "layer '4'"),
    "a layer's count": (lambda s: s["layers"]["4"].update(kept=1.5), TypeError, "kept of layer"),
    "a layer is none": (lambda s: s["layers"].update({"4": 3}), ValueError, "layer '4'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_state_is_refused_before_anything_changes(name):
    spoil, error, message = BAD[name]
    model = ssp.convert(by_hand.net(), 0.5)
    with quiet_meter(model, energy=Counter()) as meter:
        optimizer = train(model, 1)
        good = meter.state_dict()
        bad = copy.deepcopy(good)
        for layer in bad["layers"].values():
            layer["backwards"] = 100
        bad["steps"], bad["seconds"]["forward"] = 1000, 1000.0
        bad["joules"] = {"GPU 0": 1000.0}
        spoil(bad)
        with pytest.raises(error, match=message):
            meter.load_state_dict(None if name == "no dict" else bad)
        train(model, 1, optimizer)
        now = meter.report()
    assert now.steps == 2 and {row.totals.backwards for row in now.layers} == {2}
    assert now.energy.total < 1000 and now.seconds["forward"] < 1000
