"""The watchdog and eval(), other models, rates that drop nothing; and its manners."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

import ssprop_patch as ssp

from .watched import Foreign, by_bar, forward_and_backward, image, make, said, sgd, train

# --- eval() --------------------------------------------------------------------------------------


def test_training_in_eval_mode():
    model = by_bar().eval()
    (text,) = said(train, model, 4)
    assert "eval() mode" in text and "model.train()" in text
    assert said(train, model, 40) == []


def test_eval_mode_that_was_forgotten_after_a_validation():
    model = by_bar()
    optimizer = sgd(model)
    assert said(train, model, 5, optimizer) == []
    model.eval()
    assert len(said(train, model, 20, optimizer)) == 1


def test_validation_attacks_and_frozen_norms_are_no_fault():
    model = by_bar()
    optimizer = sgd(model)

    def run():
        for _ in range(9):
            model.eval()
            with torch.no_grad():
                model(image())
            model(image().requires_grad_()).sum().backward()
            model.train()
            model[1].eval()
            train(model, 1, optimizer)

    assert said(run) == []


def test_a_frozen_network_in_eval_mode_behind_one_that_is_trained():
    perceptual = make().requires_grad_(False).eval()
    model = by_bar(nn.Sequential(nn.Conv2d(3, 3, 1), perceptual))
    assert said(train, model, 9) == []
    alone = ssp.convert(copy.deepcopy(ssp.revert(perceptual)), 0.5)
    both = nn.Sequential(nn.Conv2d(3, 3, 1), alone)
    assert said(train, both, 20, sgd(both[0])) == []


def test_a_prompt_is_learnt_for_a_frozen_network():
    class Prompt(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.zeros(3, 6, 6))

        def forward(self, x):
            return x + self.value

    model = by_bar(nn.Sequential(Prompt(), make().requires_grad_(False)))
    model[1].eval()
    assert said(train, model, 9, torch.optim.SGD(model[0].parameters(), 0.1)) == []


# --- another model is trained --------------------------------------------------------------------


def test_a_trainer_that_builds_its_own_model():
    by_bar_ = by_bar()
    (text,) = said(train, make(), 9)
    assert "has not run once" in text and "another model is trained" in text
    assert said(train, make(), 40) == [] and ssp.get_controller(by_bar_).t == 0


def test_other_models_are_trained_beside_it():
    """Converted ones, ones of another shape, and before the own one."""
    waiting = by_bar()
    assert said(train, by_bar(), 20) == []
    assert said(train, nn.Sequential(nn.Conv2d(3, 4, 3)), 20) == []
    assert said(train, waiting, 20) == []


def test_a_teacher_of_the_same_shape_is_used():
    teacher, student = by_bar().eval(), make()
    optimizer = sgd(student)

    def run():
        for _ in range(9):
            optimizer.zero_grad()
            x = image()
            with torch.no_grad():
                target = teacher(x)
            (student(x) - target).square().sum().backward()
            optimizer.step()

    assert said(run) == []


def test_copies_of_what_is_trained_are_silent():
    model = by_bar()
    average = copy.deepcopy(model)
    train(model, 1)
    assert said(train, ssp.revert(copy.deepcopy(model)), 20) == []
    assert ssp.get_controller(average).t == 0


# --- dense for another reason -----------------------------------------------------------------


def test_a_rate_that_drops_nothing():
    model = ssp.convert(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 3)), 0.2)
    (text,) = said(train, model, 4)
    assert "0.2 drops no channel of any layer" in text
    asked = ssp.convert(make(), 0.5, align=8)
    assert said(train, asked, 4) == []
    asked = ssp.convert(make(), 0.5, overrides={".*": 0.0})
    assert said(train, asked, 4) == []


def test_a_forward_that_calls_no_convolution_warns_once():
    class Product(nn.Conv2d):
        def forward(self, x):
            return x.mean((2, 3)) @ self.weight[:, :, 0, 0].T

    model = ssp.convert(Product(3, 8, 1), 0.5)
    (text,) = said(train, model, 9)
    assert "Product.forward called no torch.nn.functional.conv1d" in text


# --- manners ------------------------------------------------------------------------------------


def test_ordinary_training_is_silent():
    for schedule in (0.5, ssp.BarSchedule(0.8), ssp.LinearSchedule(0.0, 0.8, 9, interval="step")):
        model = ssp.convert(make(), schedule, steps_per_epoch=3)
        assert said(train, model, 70) == []


def test_an_error_instead_of_a_warning_leaves_a_consistent_state():
    model = by_bar().eval()
    optimizer = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, 1, optimizer)
        with pytest.raises(UserWarning, match="eval"):
            train(model, 1, optimizer)
    assert ssp.get_controller(model).t == 1  # the step counts
    assert said(train, model, 2, optimizer) == []
    assert ssp.get_controller(model).t == 2


def test_it_keeps_nothing_alive():
    model = by_bar()
    own = Foreign(model)
    assert len(said(train, model, 3, own)) == 1
    controller = ssp.get_controller(model)
    gone = [weakref.ref(o) for o in (model, model[0], model[0].weight, model[0]._ssprop_membership)]
    del model, own
    gc.collect()
    assert [r() for r in gone] == [None] * len(gone) and controller.t == 0
    gone = weakref.ref(controller)
    del controller
    gc.collect()
    assert gone() is None


def test_it_disturbs_nothing_that_takes_note_of_operations():
    from torch.utils.flop_counter import FlopCounterMode

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    def operations(model):
        with Names() as mode:
            forward_and_backward(model)
        return mode.names

    model = by_bar()
    with FlopCounterMode(display=False):
        assert [operations(model) for _ in range(4)] == [operations(make())] * 4


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_was_compiled_is_not_counted_and_not_suspected(backend):
    model = ssp.convert(make(), 0.5)
    compiled = torch.compile(model, backend=backend)
    assert said(train, compiled, 9, sgd(model)) == []
    assert "compiled ones not counted" in str(ssp.status(model))
    assert not any("never called" in row.reason for row in ssp.plan(model))
