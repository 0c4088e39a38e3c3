"""Which optimizer steps count: optimizers made anew, nested, paused, and in other threads."""

import contextlib
import sys
import threading

import pytest
import timm.optim
import torch
from torch import nn

import ssprop_patch as ssp


def tenths(t):
    return min(t, 9) / 10


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))


def counting():
    model = ssp.convert(make(), ssp.LambdaSchedule(tenths, interval="step"))
    return model, ssp.get_controller(model)


def sgd(*modules):
    return torch.optim.SGD([p for m in modules for p in m.parameters()], 0.01)


# --- optimizers made anew ---------------------------------------------------------------------


def test_an_optimizer_made_anew_while_the_older_one_lives():
    model, controller = counting()
    optimizers = []
    for stage in range(3):
        optimizers.append(sgd(model))
        for step in range(2):
            optimizers[-1].step()
            assert controller.t == 2 * stage + step + 1


def test_one_optimizer_takes_the_place_of_two():
    model, controller = counting()
    body, head = sgd(model[0]), sgd(model[1])
    for _ in range(2):
        body.step()
        head.step()
    both = sgd(model)
    both.step()
    assert controller.t == 3
    part = sgd(model[1])
    part.step()
    both.step()
    assert controller.t == 5


def test_two_optimizers_of_an_iteration_that_share_nothing():
    model, controller = counting()
    body, head = sgd(model[0]), sgd(model[1])
    for i in range(4):
        for optimizer in (body, head) if i % 2 else (head, body):
            optimizer.step()
    assert controller.t == 4


# --- steps inside of steps ----------------------------------------------------------------------


class Outer(torch.optim.Optimizer):
    """An optimizer around others, one itself; over ``parameters`` or those of the first."""

    def __init__(self, *inner, parameters=None):
        super().__init__(parameters or inner[0].param_groups[0]["params"], {})
        self.inner = inner

    def step(self, closure=None):
        for optimizer in self.inner:
            optimizer.step()


class Again(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda m: Outer(sgd(m)),
        lambda m: Outer(Outer(sgd(m))),
        lambda m: Outer(Again(m.parameters(), 0.1)),
        lambda m: Outer(sgd(m[0]), sgd(m[1]), parameters=list(m.parameters())),
        lambda m: timm.optim.Lookahead(sgd(m)),
    ],
    ids=["one", "two", "super", "of parts", "lookahead"],
)
def test_a_step_of_several_steps_counts_once(make_optimizer):
    model, controller = counting()
    first, second = make_optimizer(model), make_optimizer(model)
    for t, optimizer in enumerate((first, first, second, second, first), 1):
        optimizer.step()
        assert controller.t == t


def test_a_step_inside_of_one_over_copies_counts():
    model, controller = counting()
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    optimizer = Outer(sgd(model), parameters=copies)
    for t in (1, 2, 3):
        optimizer.step()
        assert controller.t == t


def test_a_critic_trained_in_the_closure_of_a_generator():
    (generator, g), (critic, c) = counting(), counting()
    inner, outer = sgd(critic), torch.optim.LBFGS(generator.parameters(), max_iter=1)

    def closure():
        inner.step()
        return torch.zeros(())

    for _ in range(3):
        outer.step(closure)
    assert (g.t, c.t) == (3, 3)


def test_a_step_that_raises_does_not_count():
    class Fails(torch.optim.SGD):
        fails = True

        def step(self, closure=None):
            if self.fails:
                raise RuntimeError("no step")
            return super().step(closure)

    model, controller = counting()
    optimizer = Fails(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.step()
    assert controller.t == 0
    optimizer.fails = False
    optimizer.step()
    assert controller.t == 1


# --- paused ---------------------------------------------------------------------------------------


def test_paused_counts_nothing_and_leaves_the_rate():
    model, controller = counting()
    optimizer = sgd(model)
    optimizer.step()
    with ssp.paused(model):
        with ssp.paused(model[0]):
            optimizer.step()
        sgd(model).step()
        assert (controller.t, controller.drop_rate) == (1, 0.1)
    optimizer.step()
    assert (controller.t, controller.drop_rate) == (2, 0.2)


def test_paused_ends_with_an_exception():
    model, controller = counting()
    with contextlib.suppress(RuntimeError), ssp.paused(model):
        raise RuntimeError
    sgd(model).step()
    assert controller.t == 1


def test_paused_as_a_decorator_again_and_again():
    model, controller = counting()
    optimizer = sgd(model)

    @ssp.paused(model)
    def range_test(depth):
        optimizer.step()
        if depth:
            range_test(depth - 1)

    range_test(2)
    range_test(0)
    assert controller.t == 0
    optimizer.step()
    assert controller.t == 1


def test_paused_pauses_every_controller_within():
    (first, one), (second, two) = counting(), counting()
    both = nn.ModuleList([first, second])
    with ssp.paused(nn.ModuleDict({"module": both})):
        sgd(both).step()
    assert (one.t, two.t) == (0, 0)
    with pytest.raises(ValueError, match="not converted"), ssp.paused(make()):
        pass


def test_paused_is_no_part_of_an_iteration():
    """Whose last optimizer would take the first step after it for its own iteration's."""
    model, controller = counting()
    body, head = sgd(model[0]), sgd(model[1])
    with ssp.paused(model):
        body.step()
    for _ in range(2):
        head.step()
        body.step()
    assert controller.t == 2


def test_steps_by_hand_still_count_while_paused():
    model, controller = counting()
    with ssp.paused(model):
        controller.step(4)
    assert (controller.t, controller.drop_rate) == (4, 0.4)


def test_a_range_test_that_puts_everything_back():
    schedule = ssp.SequentialSchedule([ssp.ConstantSchedule(0.0), ssp.BarSchedule(0.8)], [5])
    model = ssp.convert(make(), schedule, steps_per_epoch=4)
    controller = ssp.get_controller(model)
    before, weights = controller.state_dict(), model.state_dict()
    weights = {name: t.clone() for name, t in weights.items()}
    with ssp.paused(model):
        optimizer = sgd(model)
        for _ in range(26):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 6, 6)).square().sum().backward()
            optimizer.step()
        model.load_state_dict(weights)
    assert controller.state_dict() == before


# --- threads ------------------------------------------------------------------------------------


@pytest.fixture
def often_switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_steps_while_models_are_converted_in_another_thread(often_switching):
    controller = ssp.SparsityController(ssp.LambdaSchedule(tenths, interval="step"))
    model = ssp.convert(make(), controller=controller)
    optimizers = [torch.optim.SGD(model.parameters(), 0.0) for _ in range(2)]
    done, errors, kept = threading.Event(), [], []

    def convert():
        try:
            while not done.is_set():
                kept.append(ssp.convert(nn.Conv2d(3, 8, 3), 0.5))
                shared = ssp.convert(nn.Conv2d(3, 8, 3), controller=controller)
                ssp.revert(shared)
                del kept[:-20]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=convert) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for i in range(400):
            optimizers[i // 10 % 2].step()
            assert controller.t == i + 1
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert errors == []
