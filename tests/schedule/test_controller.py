"""The controller: steps by hand, schedules that break, finding it, and nothing left behind."""

import copy
import gc
import math
import weakref

import pytest
import timm.optim
import timm.utils
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import ssprop_patch as ssp

from .training import by_step, counting, make, rows, run, sgd, tenths, train

# --- by hand ------------------------------------------------------------------------------------


def test_step_by_hand_owns_the_count():
    model, controller = counting()
    optimizer = sgd(model)
    optimizer.step()
    controller.step()
    assert controller.t == 2
    optimizer.step()
    assert controller.t == 2
    controller.step(7)
    optimizer.step()
    assert (controller.t, controller.drop_rate) == (7, 0.7)
    controller.step(3)  # absolute: back is as good as forth
    assert (controller.t, controller.drop_rate) == (3, 0.3)


def test_step_by_hand_over_steps_per_epoch():
    model, controller = counting(ssp.BarSchedule(0.8), steps_per_epoch=1)
    for epoch in range(4):
        controller.step(epoch)
        sgd(model).step()
        assert (controller.t, controller.drop_rate) == (epoch, 0.8 * (epoch % 2))


@pytest.mark.parametrize(
    ("t", "error"), [(-1, ValueError), (1.0, TypeError), ("1", TypeError), (True, TypeError)]
)
def test_bad_t_changes_nothing(t, error):
    model, controller = counting()
    optimizer = sgd(model)
    optimizer.step()
    with pytest.raises(error, match="t must be"):
        controller.step(t)
    assert controller.t == 1
    optimizer.step()  # and the count is still the optimizer's
    assert controller.t == 2


def test_the_rate_set_by_hand_holds_until_t_next_advances():
    model, controller = counting(ssp.ConstantSchedule(0.5), steps_per_epoch=2)
    optimizer = sgd(model)
    controller.drop_rate = 0.75
    train(model, optimizer)
    assert controller.drop_rate == 0.75 and rows(model[0]) == 2
    optimizer.step()
    assert (controller.t, controller.drop_rate) == (1, 0.5)
    controller.drop_rate = 0
    assert controller.drop_rate == 0.0
    controller.step(1)
    assert controller.drop_rate == 0.5


@pytest.mark.parametrize("rate", [1.0, -0.1, math.nan, 80, "0.5", None, True])
def test_a_bad_rate_changes_nothing(rate):
    _, controller = counting(0.5)
    with pytest.raises((TypeError, ValueError), match="drop_rate"):
        controller.drop_rate = rate
    assert controller.drop_rate == 0.5


@pytest.mark.parametrize("name", ["t", "schedule", "steps_per_epoch"])
def test_the_rest_is_read_only(name):
    _, controller = counting()
    with pytest.raises(AttributeError):
        setattr(controller, name, 1)


def test_schedule_is_what_was_given():
    schedule = ssp.BarSchedule(0.8, period=4)
    _, controller = counting(schedule, steps_per_epoch=2)
    assert controller.schedule == schedule
    assert counting(0.25)[1].schedule == ssp.ConstantSchedule(0.25)
    assert counting(tenths)[1].schedule(3) == 0.3
    assert ssp.get_controller(ssp.convert(make())).schedule == ssp.BarSchedule(0.8, period=2)
    assert "BarSchedule(0.8, period=4)" in repr(controller) and "t=0" in repr(controller)


# --- a schedule that breaks in the middle of training -------------------------------------------


def breaks(value):
    def broken(t):
        return value if t == 3 else t / 10

    return broken


BROKEN = [math.nan, 1.0, -0.5, math.inf, "0.5", None]


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_schedule_that_breaks_raises_out_of_the_step(value, interval):
    schedule = ssp.LambdaSchedule(breaks(value), interval=interval)
    model, controller = counting(schedule, steps_per_epoch=2)
    optimizer = sgd(model)
    for _ in range(2 if interval == "step" else 5):
        optimizer.step()
    state = controller.state_dict()
    assert (controller.t, controller.drop_rate) == (2, 0.2)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=r"(?s)broken.*t=3"):
            optimizer.step()
        assert (controller.t, controller.drop_rate) == (2, 0.2)
        assert controller.state_dict() == state


def test_a_schedule_that_breaks_raises_out_of_a_step_by_hand():
    model, controller = counting(ssp.LambdaSchedule(breaks(math.nan), interval="step"))
    sgd(model).step()
    for t in (3, 3):
        with pytest.raises(ValueError, match=r"(?s)broken.*t=3.*nan"):
            controller.step(t)
    assert (controller.t, controller.drop_rate) == (1, 0.1)
    assert not controller.state_dict()["by_hand"]


def test_a_schedule_that_raises():
    def fails(t):
        if t == 1:
            raise RuntimeError("no rate today")
        return 0.5

    model, controller = counting(ssp.LambdaSchedule(fails, interval="step"))
    with pytest.raises(RuntimeError, match="no rate today"):
        sgd(model).step()
    assert (controller.t, controller.drop_rate) == (0, 0.5)


def test_a_schedule_that_breaks_does_not_stop_another_model_from_counting():
    """All are trained by one optimizer; whichever is told first."""
    broken = ssp.LambdaSchedule(breaks(math.nan), interval="step")
    models = [nn.Conv2d(1, 2, 1) for _ in range(16)]
    for i, model in enumerate(models):
        ssp.convert(model, broken if i % 2 else by_step())
    optimizer = sgd(*models)
    for _ in range(2):
        optimizer.step()
    with pytest.raises(ValueError, match="broken"):
        optimizer.step()
    assert [ssp.get_controller(m).t for m in models] == [3, 2] * 8


# --- finding the controller ---------------------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def test_get_controller_from_wrappers_and_parts():
    model, controller = counting()
    wrappers = Wrapper(model), Wrapper(Wrapper(model)), torch.compile(model)
    for holder in (*wrappers, model[:1], model[0]):
        assert ssp.get_controller(holder) is controller


@pytest.mark.parametrize("average", [timm.utils.ModelEmaV3, AveragedModel, copy.deepcopy])
def test_an_average_has_a_controller_of_its_own(average):
    model, controller = counting()
    train(model, optimizer := sgd(model), 2)
    averaged = average(model)
    own = ssp.get_controller(averaged)
    assert own is not controller and (own.t, own.schedule) == (2, controller.schedule)
    train(model, optimizer)
    assert (controller.t, own.t) == (3, 2)


def test_get_controller_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"not converted.*convert\(model\)"):
        ssp.get_controller(make())
    model, _ = counting()
    with pytest.raises(ValueError, match="not converted"):
        ssp.get_controller(model[4])
    with pytest.raises(ValueError, match="2 controllers"):
        ssp.get_controller(nn.ModuleList([counting()[0], counting()[0]]))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        ssp.get_controller("model")


# --- nothing stays behind -----------------------------------------------------------------------


def test_a_deleted_model_takes_its_controller_with_it():
    model, controller = counting(selection="random")
    optimizer = sgd(model)
    train(model, optimizer, 2)
    with ssp.sparsity(model, 0.5):
        train(model, optimizer)
    refs = [
        weakref.ref(o)
        for o in (
            model,
            model[0],
            controller,
            controller.step_counter,
            model[0]._ssprop_policy,
            optimizer,
        )
    ]
    del model, controller, optimizer
    gc.collect()
    assert [r() for r in refs] == [None] * len(refs)
    sgd(make()).step()


def test_a_controller_keeps_no_model_and_no_optimizer():
    model, controller = counting()
    optimizer = sgd(model)
    train(model, optimizer)
    refs = [weakref.ref(o) for o in (model, model[0], model[0].weight, optimizer)]
    del model, optimizer
    gc.collect()
    assert [r() for r in refs] == [None] * len(refs)
    assert controller.t == 1


@pytest.mark.parametrize("again", [lambda m: ssp.convert(m, 0.5), ssp.revert])
def test_converting_again_and_reverting_free_the_controller(again):
    model, controller = counting()
    train(model, sgd(model))
    gone = weakref.ref(controller)
    del controller
    again(model)
    gc.collect()
    assert gone() is None


# --- made by hand -------------------------------------------------------------------------------


def test_a_controller_of_its_own_without_a_model():
    controller = ssp.SparsityController(ssp.BarSchedule(0.8), steps_per_epoch=2, seed=7)
    assert (controller.t, controller.drop_rate) == (0, 0.0)
    controller.step()
    assert (controller.t, controller.drop_rate) == (1, 0.8)
    assert controller.state_dict()["seed"] == 7
    assert ssp.SparsityController().schedule == ssp.BarSchedule(0.8, period=2)


def test_the_seed_of_random_selection():
    def kept(seed=None, manual=None):
        torch.manual_seed(11)
        controller = ssp.SparsityController(0.75, seed=seed)
        model = ssp.convert(make(), controller=controller, selection="random")
        if manual is not None:
            controller.manual_seed(manual)
        return run(model, sgd(model), 6)

    assert kept(seed=1) == kept(seed=1) == kept(manual=1) == kept(seed=2, manual=1)
    assert kept(seed=1) != kept(seed=2)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(schedule=1.0),
        dict(schedule="bar"),
        dict(steps_per_epoch=0),
        dict(steps_per_epoch=-3),
        dict(steps_per_epoch=2.5),
        dict(schedule=lambda t: math.nan),
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises((TypeError, ValueError)):
        ssp.SparsityController(**arguments)
