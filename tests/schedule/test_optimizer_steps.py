"""The optimizer's steps advance t."""

import copy
import inspect
import math

import pytest
import timm.optim
import timm.utils
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks as step_hooks

import ssprop_patch as ssp
from ssprop_patch.schedule import step_counter

from .training import by_step, counting, image, make, rows, sgd, train


@pytest.mark.parametrize("before", [True, False], ids=["optimizer first", "convert first"])
def test_the_loop_is_unchanged(before):
    model = make()
    optimizer = sgd(model) if before else None
    ssp.convert(model, by_step())
    optimizer = optimizer or sgd(model)
    controller = ssp.get_controller(model)
    assert (controller.t, controller.drop_rate) == (0, 0.0)
    seen = []
    for _ in range(4):
        train(model, optimizer)
        seen.append((controller.t, controller.drop_rate, rows(model[0])))
    # The rows of a step are those of the rate before it.
    assert seen == [(1, 0.1, 8), (2, 0.2, 7), (3, 0.3, 6), (4, 0.4, 6)]


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimizer(cls):
    model, controller = counting()
    train(model, cls(model.parameters(), 1e-3), 3)
    assert controller.t == 3


def test_an_optimizer_with_a_closure_counts_once():
    model, controller = counting()
    optimizer = torch.optim.LBFGS(model.parameters(), 1e-3, max_iter=3)
    x, calls = image(), []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = model(x).pow(2).sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert controller.t == 2 and len(calls) > 2


class Outer(torch.optim.Optimizer):
    """An optimizer around an optimizer that is one itself, as SAM and others."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base = base

    def step(self, closure=None):
        return self.base.step(closure)


@pytest.mark.parametrize("wrap", [timm.optim.Lookahead, Outer])
def test_an_optimizer_around_an_optimizer_counts_once(wrap):
    model, controller = counting()
    train(model, wrap(sgd(model)), 4)
    assert controller.t == 4


def test_an_optimizer_that_calls_the_step_of_its_base_class_counts_once():
    class Mine(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    sgd(nn.Linear(2, 2))  # torch hooks the step of a class when its first optimizer is made
    model, controller = counting()
    train(model, Mine(model.parameters(), 1e-3), 3)
    assert controller.t == 3


def test_several_optimizers_over_one_model():
    model, controller = counting()
    optimizers = [sgd(model[0]), sgd(model[2]), sgd(model[4])]
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.step()
    assert controller.t == 5
    for _ in range(2):
        for optimizer in reversed(optimizers):
            optimizer.step()
    assert controller.t == 7


def test_of_several_optimizers_one_may_step_more_often():
    """One step of the critic a batch, one of the generator every third."""
    both = nn.ModuleDict({"generator": make(), "critic": make()})
    ssp.convert(both, by_step())
    generator, critic = sgd(both["generator"]), sgd(both["critic"])
    for i in range(9):
        critic.step()
        if i % 3 == 2:
            generator.step()
    assert ssp.get_controller(both).t == 9


def test_two_models_with_an_optimizer_each():
    (generator, g), (discriminator, d) = counting(), counting()
    step_g, step_d = sgd(generator), sgd(discriminator)
    for _ in range(3):
        step_d.step()
        step_d.step()
        step_g.step()
    assert (g.t, d.t) == (3, 6)


def test_two_models_that_share_a_controller():
    controller = ssp.SparsityController(by_step())
    models = [ssp.convert(make(), controller=controller) for _ in range(2)]
    optimizers = [sgd(m) for m in models]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    assert controller.t == 3


def test_a_model_reverted_no_longer_counts_for_a_shared_controller():
    controller = ssp.SparsityController(by_step())
    kept, reverted = (ssp.convert(make(), controller=controller) for _ in range(2))
    optimizers = sgd(kept), sgd(reverted)
    for optimizer in optimizers:
        optimizer.step()
    ssp.revert(reverted)
    assert controller.t == 1
    for _ in range(3):
        optimizers[1].step()
    sgd(reverted).step()
    assert controller.t == 1
    optimizers[0].step()
    assert controller.t == 2


def test_an_unrelated_optimizer_does_not_count():
    model, controller = counting()
    other = make()
    train(other, sgd(other), 2)
    sgd(nn.ModuleList([other, nn.Linear(2, 2)])).step()
    assert controller.t == 0
    train(model, sgd(model))
    assert controller.t == 1


def test_an_optimizer_over_a_part_counts():
    model, controller = counting()
    sgd(model[2]).step()
    assert controller.t == 1


def test_parameters_added_to_an_optimizer_later():
    model, controller = counting()
    optimizer = sgd(make())
    optimizer.step()
    assert controller.t == 0
    optimizer.add_param_group({"params": model[0].parameters()})
    optimizer.step()
    assert controller.t == 1


def test_parameters_replaced_after_conversion():
    """As FSDP2 does, and loading with assign=True."""
    model, controller = counting()
    old = list(model.parameters())
    model.load_state_dict(make().state_dict(), assign=True)
    assert not {id(p) for p in old} & {id(p) for p in model.parameters()}
    optimizer = sgd(model)
    for _ in range(2):
        optimizer.step()
    assert controller.t == 2


def test_all_convolutions_frozen_and_only_the_head_trained():
    model, controller = counting()
    for conv in (model[0], model[2]):
        conv.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    train(model, optimizer, 2)
    assert controller.t == 2


def test_gradient_accumulation_counts_steps_not_passes():
    model, controller = counting()
    optimizer = sgd(model)
    for i in range(6):
        model(image()).sum().backward()
        if i % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert controller.t == 2


def test_a_step_that_the_gradient_scaler_skips_does_not_count():
    model, controller = counting()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu")
    for i in range(4):
        optimizer.zero_grad()
        loss = model(image()).sum() * (math.inf if i in (0, 2) else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert controller.t == 2


def test_converting_often_leaves_one_hook():
    before = dict(step_hooks)
    for _ in range(3):
        model, _ = counting()
        ssp.convert(model, 0.5)
        copy.deepcopy(model)
        ssp.revert(model)
    added = set(step_hooks) - set(before)
    # Of this import of the package: tests that import it anew leave hooks of theirs.
    here = vars(step_counter)
    ours = [h for h in step_hooks.values() if inspect.unwrap(h).__globals__ is here]
    assert len(added) <= 1 and len(ours) == 1
