"""What a checkpoint of the controller continues, and which states are refused."""

import io
import math

import pytest
import torch

import ssprop_patch as ssp

from .training import counting, make, run, sgd, train


def saved(state):
    """Through a file, as safely as torch reads one."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("selection", ["l1", "random"])
def test_the_state_is_plain_scalars(selection):
    model, controller = counting(ssp.BarSchedule(0.8), steps_per_epoch=2, selection=selection)
    train(model, sgd(model), 3)
    state = controller.state_dict()
    assert {type(v) for v in state.values()} <= {int, float, bool, str, type(None)}
    assert saved(state) == state


RUNS = {
    "step": dict(schedule=ssp.LinearSchedule(0.0, 0.8, 6, interval="step")),
    "epoch": dict(schedule=ssp.BarSchedule(0.75), steps_per_epoch=3),
    "constant": dict(schedule=0.75),
}


@pytest.mark.parametrize("stop", [1, 4, 7])
@pytest.mark.parametrize("case", RUNS)
def test_a_resumed_run_continues_exactly(case, stop):
    def start():
        model = make()
        # Momentum, so that the resumed run needs its optimizer back too.
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        ssp.convert(model, **RUNS[case], selection="random")
        torch.manual_seed(5)
        return model, optimizer

    whole = run(*start(), 10)
    model, optimizer = start()
    log = run(model, optimizer, stop)
    checkpoint = saved(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ssprop": ssp.get_controller(model).state_dict(),
            "rng": torch.get_rng_state(),
        }
    )
    torch.manual_seed(99)  # as in another process
    model = make()
    ssp.convert(model, **RUNS[case], selection="random")
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    ssp.get_controller(model).manual_seed(42)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    ssp.get_controller(model).load_state_dict(checkpoint["ssprop"])
    torch.set_rng_state(checkpoint["rng"])
    log += run(model, optimizer, 10 - stop)
    assert log == whole
    assert len({str(kept) for *_, kept in whole}) > 3


def test_what_the_state_brings_back():
    _, controller = counting(ssp.BarSchedule(0.8), steps_per_epoch=5)
    controller.step(3)
    controller.drop_rate = 0.25
    model, other = counting(ssp.BarSchedule(0.8), steps_per_epoch=1)
    other.load_state_dict(saved(controller.state_dict()))
    assert (other.t, other.drop_rate) == (3, 0.25)
    sgd(model).step()
    assert other.t == 3  # counted by hand, as before
    assert other.steps_per_epoch == 1  # another batch size is another number of steps


def test_loading_inside_a_context_manager_shows_after_it():
    _, controller = counting(0.5)
    controller.drop_rate = 0.25
    state = controller.state_dict()
    model, other = counting(0.5)
    with ssp.dense(model):
        other.load_state_dict(state)
        assert other.drop_rate == 0.0
        assert other.state_dict()["drop_rate"] == 0.25
    assert other.drop_rate == 0.25


def test_the_state_of_another_schedule_is_an_error_that_shows_both():
    _, controller = counting(ssp.BarSchedule(0.8))
    controller.step(3)
    _, other = counting(ssp.LinearSchedule(0.0, 0.5, 7))
    before = other.state_dict()
    with pytest.raises(ValueError) as caught:
        other.load_state_dict(controller.state_dict())
    assert "BarSchedule(0.8, period=2)" in str(caught.value)
    assert "LinearSchedule(0.0, 0.5, total=7)" in str(caught.value)
    assert other.state_dict() == before


@pytest.mark.parametrize("key", list(ssp.SparsityController(0.5).state_dict()))
def test_a_truncated_state_is_an_error_that_names_what_is_missing(key):
    _, controller = counting(0.5)
    before = controller.state_dict()
    state = {k: v for k, v in before.items() if k != key}
    with pytest.raises(ValueError, match=key):
        controller.load_state_dict({**state})
    assert controller.state_dict() == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": 2},
        {"version": "1"},
        {"schedule": None},
        {"t": -1},
        {"t": "3"},
        {"t": 1.5},
        {"t": None},
        {"steps": -1},
        {"steps": None},
        {"drop_rate": 1.0},
        {"drop_rate": math.nan},
        {"drop_rate": "0.5"},
        {"seed": "x"},
        {"seed": None},
        {"draws": -1},
        {"draws": "many"},
    ],
    ids=str,
)
def test_a_garbled_state_changes_nothing(wrong):
    _, controller = counting(0.5)
    before = controller.state_dict()
    with pytest.raises((TypeError, ValueError)):
        controller.load_state_dict({**before, "t": 7, "draws": 3, "drop_rate": 0.25, **wrong})
    assert controller.state_dict() == before
    assert (controller.t, controller.drop_rate) == (0, 0.5)


@pytest.mark.parametrize("state", [{}, None, [], "state", {"model": 1}, 7])
def test_what_is_no_state_changes_nothing(state):
    _, controller = counting(0.5)
    before = controller.state_dict()
    with pytest.raises((TypeError, ValueError)):
        controller.load_state_dict(state)
    assert controller.state_dict() == before
