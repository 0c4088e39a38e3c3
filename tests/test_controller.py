"""The controller: when t advances, what sets the rate, and what a checkpoint continues."""

import copy
import gc
import io
import math
import warnings
import weakref

import pytest
import timm.optim
import timm.utils
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks as step_hooks
from torch.optim.swa_utils import AveragedModel

import ssprop_patch as ssp


def tenths(t):
    return min(t, 9) / 10


def by_step():
    """t counts optimizer steps, and the rate shows t."""
    return ssp.LambdaSchedule(tenths, interval="step")


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 2)
    )


def counting(schedule=None, **arguments):
    """A converted model and its controller."""
    model = ssp.convert(make(), by_step() if schedule is None else schedule, **arguments)
    return model, ssp.get_controller(model)


def sgd(*modules):
    return torch.optim.SGD([p for m in modules for p in m.parameters()], 0.01)


def image():
    return torch.randn(2, 3, 6, 6)


def train(model, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        model(image()).pow(2).sum().backward()
        optimizer.step()


def rows(conv):
    return int(conv.weight.grad.flatten(1).ne(0).any(1).sum())


# --- the optimizer's steps advance t ------------------------------------------------------------


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
    ours = [h for h in step_hooks.values() if h.__module__ == "ssprop_patch.iterations"]
    assert len(added) <= 1 and len(ours) == 1


# --- epochs -------------------------------------------------------------------------------------


def test_steps_per_epoch():
    model, controller = counting(ssp.BarSchedule(0.8, period=2), steps_per_epoch=3)
    optimizer = sgd(model)
    seen = []
    for _ in range(8):
        optimizer.step()
        seen.append((controller.t, controller.drop_rate))
    assert seen == [(0, 0.0)] * 2 + [(1, 0.8)] * 3 + [(2, 0.0)] * 3
    assert controller.steps_per_epoch == 3


def test_steps_per_epoch_of_one():
    model, controller = counting(ssp.BarSchedule(0.8), steps_per_epoch=1)
    optimizer = sgd(model)
    rates = [(optimizer.step(), controller.drop_rate)[1] for _ in range(4)]
    assert rates == [0.8, 0.0, 0.8, 0.0]


def test_steps_per_epoch_means_nothing_to_a_schedule_of_steps():
    model, controller = counting(by_step(), steps_per_epoch=10)
    sgd(model).step()
    assert controller.t == 1


def steps(model, n=5):
    """The warnings of n optimizer steps."""
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(n):
            optimizer.step()
    return [str(w.message) for w in caught]


def test_epochs_that_nobody_tells_warn_once():
    model, controller = counting(ssp.BarSchedule(0.8))
    (text,) = steps(model)
    for part in ("BarSchedule(0.8, period=2)", "steps_per_epoch", ".step(epoch)", "'step'"):
        assert part in text
    assert controller.t == 0 and steps(model) == []


@pytest.mark.parametrize(
    ("schedule", "arguments"),
    [
        (0.5, {}),
        (0.0, {}),
        (ssp.ConstantSchedule(0.8), {}),
        (ssp.BarSchedule(0.8), {"steps_per_epoch": 2}),
        (ssp.BarSchedule(0.8, interval="step"), {}),
    ],
)
def test_no_warning_where_nothing_is_amiss(schedule, arguments):
    model, _ = counting(schedule, **arguments)
    assert steps(model) == []


@pytest.mark.parametrize("t", [0, 1, None])
def test_no_warning_when_the_epoch_was_told(t):
    model, controller = counting(ssp.BarSchedule(0.8))
    controller.step(t)
    assert steps(model) == [] and controller.t == (1 if t is None else t)


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


# --- checkpoints --------------------------------------------------------------------------------


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


def run(model, optimizer, steps):
    """What each step was: t, the rate, and the channels kept in each convolution."""
    controller, log = ssp.get_controller(model), []
    for _ in range(steps):
        before = controller.t, controller.drop_rate
        train(model, optimizer)
        kept = [m.weight.grad.flatten(1).ne(0).any(1).tolist() for m in (model[0], model[2])]
        log.append((*before, kept))
    return log


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
        {"version": 2}, {"version": "1"}, {"schedule": None}, {"t": -1}, {"t": "3"}, {"t": 1.5},
        {"t": None}, {"steps": -1}, {"steps": None}, {"drop_rate": 1.0}, {"drop_rate": math.nan},
        {"drop_rate": "0.5"}, {"seed": "x"}, {"seed": None}, {"draws": -1}, {"draws": "many"},
    ],
    ids=str,
)  # fmt: skip
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
        for o in (model, model[0], controller, controller.watch, model[0]._ssprop_policy, optimizer)
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
        dict(schedule=1.0), dict(schedule="bar"), dict(steps_per_epoch=0),
        dict(steps_per_epoch=-3), dict(steps_per_epoch=2.5), dict(schedule=lambda t: math.nan),
    ],
)  # fmt: skip
def test_bad_arguments(arguments):
    with pytest.raises((TypeError, ValueError)):
        ssp.SparsityController(**arguments)
