"""Seconds of forward, backward and optimizer, by a clock that is moved by hand."""

import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from metering import by_hand
from metering.by_hand import quiet_meter
from ssprop_patch.metering import stopwatch


class HandMoved:
    time = 0.0

    def now(self):
        return self.time

    def elapsed(self, start, end):
        return end - start

    def is_past(self, point):
        return True


class Moves(torch.autograd.Function):
    """The identity, which takes time."""

    @staticmethod
    def forward(ctx, x, hands, forward, backward):
        hands.time += forward
        ctx.hands, ctx.backward_takes = hands, backward
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.hands.time += ctx.backward_takes
        return dy, None, None, None


class Slow(nn.Module):
    """One second forward, two backward."""

    def __init__(self, hands):
        super().__init__()
        self.conv, self.hands = nn.Conv2d(3, 4, 1).double(), hands

    def forward(self, x):
        return Moves.apply(self.conv(x), self.hands, 1.0, 2.0)


class SlowSGD(torch.optim.SGD):
    """Five seconds a step, besides its closure."""

    def __init__(self, params, hands):
        super().__init__(params, 0.1)
        self.hands = hands

    def step(self, closure=None):
        if closure is not None:
            closure()
        self.hands.time += 5.0
        return super().step()


@pytest.fixture
def hands(monkeypatch):
    hands = HandMoved()
    monkeypatch.setattr(stopwatch, "HostClock", lambda: hands)
    return hands


def loss_of(model, hands, loss_takes=16.0):
    """A loss that takes 16 seconds forward, and 16 backward before the model's."""
    return Moves.apply(model(by_hand.batch(0)).sum(), hands, loss_takes, loss_takes)


def test_each_phase_has_its_seconds_and_loss_data_and_logging_have_none(hands):
    model = ssp.convert(Slow(hands), 0.5)
    optimizer = SlowSGD(model.parameters(), hands)
    with quiet_meter(model) as meter:
        meter.log_to(lambda scalars, step: setattr(hands, "time", hands.time + 64.0))
        for _ in range(3):
            hands.time += 32.0  # data
            loss_of(model, hands).backward()
            optimizer.step()
        assert meter.report().seconds == {"forward": 3.0, "backward": 6.0, "optimizer": 15.0}


def test_evaluation_has_no_seconds(hands):
    model = ssp.convert(Slow(hands), 0.5).eval()
    with quiet_meter(model) as meter:
        loss_of(model, hands).backward()
        assert meter.report().seconds == {}


def test_an_optimizer_that_calls_forward_and_backward_does_not_count_them_as_its_own(hands):
    model = ssp.convert(Slow(hands), 0.5)
    optimizer = SlowSGD(model.parameters(), hands)
    with quiet_meter(model) as meter:
        optimizer.step(lambda: loss_of(model, hands, 0.0).backward())
        assert meter.report().seconds == {"forward": 1.0, "backward": 2.0, "optimizer": 5.0}


@pytest.mark.parametrize("by_name", [True, False])
def test_what_else_a_closure_does_is_no_part_of_the_optimizer(hands, by_name):
    """In Lightning all of a training step runs in it."""
    model = ssp.convert(Slow(hands), 0.5)
    optimizer = SlowSGD(model.parameters(), hands)

    def closure():
        hands.time += 32.0  # augments the batch
        loss_of(model, hands, 0.0).backward()
        hands.time += 64.0  # logs
        return 7.0

    with quiet_meter(model) as meter:
        for _ in range(2):
            optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert meter.report().seconds == {"forward": 2.0, "backward": 4.0, "optimizer": 10.0}
    assert torch.optim.SGD(model.parameters(), 0.1).step(closure) == 7.0


def test_the_step_of_another_models_optimizer_has_no_seconds(hands):
    model = ssp.convert(Slow(hands), 0.5)
    with quiet_meter(model) as meter:
        SlowSGD(nn.Linear(2, 2).parameters(), hands).step()
        assert (meter.report().seconds, meter.steps) == ({}, 0)


def test_passes_that_an_exception_leaves_are_forgotten_and_the_next_ones_count(hands):
    model = ssp.convert(Slow(hands), 0.5)

    def fail(*args):
        hands.time += 128.0
        raise RuntimeError("out of memory")

    with quiet_meter(model) as meter:
        handle = model.conv.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            loss_of(model, hands)
        handle.remove()
        loss = loss_of(model, hands)
        handle = model.conv.weight.register_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            loss.backward()
        handle.remove()
        hands.time += 256.0
        loss_of(model, hands).backward()
        model.eval()(by_hand.batch(0))
        assert meter.report().seconds == {"forward": 2.0, "backward": 2.0}


def test_two_forwards_and_one_backward(hands):
    model = ssp.convert(Slow(hands), 0.5)
    with quiet_meter(model) as meter:
        (loss_of(model, hands, 0.0) + loss_of(model, hands, 0.0)).backward()
        assert meter.report().seconds == {"forward": 2.0, "backward": 4.0}


def test_outputs_in_dicts_and_outputs_that_are_parameters():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 4, 1).double(), nn.Parameter(torch.ones(()))

        def forward(self, x):
            return {"out": [self.conv(x)], "scale": self.scale, "note": "text"}

    model = ssp.convert(Net(), 0.5)
    with quiet_meter(model) as meter:
        for _ in range(3):
            found = model(by_hand.batch(0))
            (found["out"][0].sum() * found["scale"]).backward()
        assert meter.report().seconds["backward"] > 0
        assert not model.scale._backward_hooks


def test_wall_seconds_run_from_the_making_to_the_closing():
    model = ssp.convert(by_hand.net(), 0.5)
    meter = ssp.Meter(model, energy=False)
    first = meter.report().wall_seconds
    second = meter.close().wall_seconds
    assert 0 < first < second == meter.report().wall_seconds
