"""Optimizers, in all the ways they can be run; clipping; and what hangs on to gradients."""

import functools

import pytest
import timm.optim
import timm.utils
import torch
from torch import nn

import ssprop_patch as ssp

from .by_hand import compare, loss_of, net, sgd

# eps: where the true gradient is zero, Adam and its like would make a step out of rounding.
OPTIMIZERS = {
    "SGD nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "SGD for loop": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=False),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "SGD maximize": lambda p: torch.optim.SGD(p, 0.1, maximize=True),
    "SGD weight decay": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1),
    "Adam foreach": lambda p: torch.optim.Adam(p, 1e-2, eps=1e-2, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, 1e-2, eps=1e-2, fused=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, 1e-2, eps=1e-2, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 1e-2, eps=1e-2, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-2, eps=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, 1e-2, eps=1e-2),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, 1e-2, eps=1e-2, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-2, eps=1e-2),
    "ASGD": lambda p: torch.optim.ASGD(p, 1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 1e-2, eps=(1e-2, 1e-2)),
    "timm lars": lambda p: timm.optim.Lars(p, 0.1),
    "timm larc": lambda p: timm.optim.Lars(p, 0.1, momentum=0.9, trust_clip=True),
    "timm lamb": lambda p: timm.optim.Lamb(p, 1e-2, eps=1e-2),
    "timm adan": lambda p: timm.optim.Adan(p, 1e-2, eps=1e-2),
    "timm nadamw": lambda p: timm.optim.NAdamW(p, 1e-2, eps=1e-2),
    "timm rmsprop of tensorflow": lambda p: timm.optim.RMSpropTF(p, 1e-2, eps=1e-2),
    "timm lookahead": lambda p: timm.optim.Lookahead(torch.optim.SGD(p, 0.1), k=2),
}


def loop(make_optimizer, before_step=None, steps=3):
    def train(model):
        optimizer = make_optimizer(model.parameters())
        for i in range(steps):
            optimizer.zero_grad()
            loss = loss_of(model, i)
            loss.backward()
            if before_step is not None:
                before_step(model)
            optimizer.step()
            yield loss.detach()

    return train


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers(make_optimizer):
    """Each counts its steps once, and makes of the gradients what it makes of masked ones."""
    compare(net, loop(make_optimizer), steps=3)


def test_parameter_groups_of_timm():
    """No decay for norms and biases, a rate for each layer."""

    def make_optimizer(model):
        return timm.optim.create_optimizer_v2(
            model, "adamw", lr=1e-2, weight_decay=0.1, layer_decay=0.7, eps=1e-2
        )

    def train(model):
        optimizer = make_optimizer(model)
        for i in range(2):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            optimizer.step()
            yield [group["lr"] for group in optimizer.param_groups]

    compare(net, train)


def test_the_rows_that_were_dropped_move_by_momentum_and_decay_alone():
    """A gradient of zero is a gradient: what the optimizer does with it is its own affair."""
    model = ssp.convert(nn.Conv2d(3, 8, 3), 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, weight_decay=0.25)
    before = model.weight.detach().clone()
    model(torch.randn(2, 3, 6, 6)).square().sum().backward()
    dropped = ~model.weight.grad.flatten(1).any(1)
    optimizer.step()
    assert dropped.sum() == 4
    torch.testing.assert_close(model.weight[dropped], before[dropped] * (1 - 0.5 * 0.25))


# --- clipping -----------------------------------------------------------------------------------

CLIPS = {
    "norm": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.05),
    "norm foreach": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.05, foreach=True),
    "infinity norm": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.01, float("inf")),
    "value": lambda m: nn.utils.clip_grad_value_(m.parameters(), 1e-3),
    "adaptive": lambda m: timm.utils.dispatch_clip_grad(m.parameters(), 0.01, mode="agc"),
}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_clipping(clip):
    def before_step(model):
        unclipped = [p.grad.clone() for p in model.parameters()]
        clip(model)
        assert not all(map(torch.equal, unclipped, (p.grad for p in model.parameters())))

    make_optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    compare(net, loop(make_optimizer, before_step), steps=3)


# --- gradients that stay, and hooks on them -------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    """Where it keeps the tensors, they are the same ones in each step."""

    def train(model):
        optimizer, kept = sgd(model), None
        for i in range(3):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(model, i).backward()
            kept = kept or [p.grad for p in model.parameters()]
            same = [p.grad is g for p, g in zip(model.parameters(), kept, strict=True)]
            assert all(same) == (i == 0 or not set_to_none)
            optimizer.step()
            yield

    compare(net, train, steps=3)


def test_gradients_belong_to_the_parameter():
    """Nothing else holds them: an optimizer may change them in place."""
    model = ssp.convert(net(), 0.5)
    loss_of(model, 0).backward()
    storages = [p.grad.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages)
    for p in model.parameters():
        assert p.grad.is_leaf and not p.grad.requires_grad and p.grad.shape == p.shape


def test_hooks_on_parameters_see_the_sparse_gradient_and_may_change_it():
    def train(model):
        seen = {}
        for name, p in model.named_parameters():
            p.register_hook(lambda grad, name=name: seen.update({name: grad.clone()}) or 2 * grad)
        optimizer = sgd(model, 0.05)
        for i in range(2):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            for name, p in model.named_parameters():
                assert torch.equal(p.grad, 2 * seen[name])
            optimizer.step()
            yield dict(seen)

    compare(net, train)


def test_an_optimizer_in_the_backward():
    """One for each parameter, stepping as soon as its gradient is there: an iteration is one."""

    def train(model):
        optimizers = {p: torch.optim.SGD([p], 0.05, momentum=0.9) for p in model.parameters()}

        def step(p):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        for i in range(3):
            loss = loss_of(model, i)
            loss.backward()
            assert all(p.grad is None for p in model.parameters())
            yield loss.detach()

    compare(net, train, steps=3)


def test_hooks_of_the_optimizer_see_the_rate_of_their_step():
    """The rate advances after the step, when the optimizer's own hooks have run."""
    model = ssp.convert(net(), ssp.LambdaSchedule(lambda t: t / 10, interval="step"))
    controller, seen = ssp.get_controller(model), []
    optimizer = sgd(model)
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", controller.t)))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", controller.t)))
    for i in range(2):
        optimizer.zero_grad()
        loss_of(model, i).backward()
        optimizer.step()
    assert seen == [("before", 0), ("after", 0), ("before", 1), ("after", 1)]
    assert controller.t == 2


def test_learning_rate_schedulers_have_nothing_to_do_with_it():
    def train(model):
        optimizer = sgd(model)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4)
        for i in range(3):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            optimizer.step()
            scheduler.step()
            yield scheduler.get_last_lr()

    compare(net, train, steps=3)
