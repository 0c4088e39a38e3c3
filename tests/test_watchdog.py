"""The watchdog: says once where a model should train sparsely and does not; else it is silent."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ssprop_patch as ssp
from ssprop_patch import calls


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """As in a process of its own."""
    monkeypatch.setattr(calls, "_compiled", [])


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))


def by_bar(model=None, **arguments):
    return ssp.convert(model or make(), ssp.BarSchedule(0.8), steps_per_epoch=2, **arguments)


def sgd(*modules):
    return torch.optim.SGD([p for m in modules for p in m.parameters()], 1e-3, momentum=0.9)


def image():
    return torch.randn(2, 3, 6, 6)


def forward_and_backward(model):
    model.zero_grad()
    model(image()).square().sum().backward()


def train(model, steps, optimizer=None):
    optimizer = optimizer or sgd(model)
    for _ in range(steps):
        forward_and_backward(model)
        optimizer.step()


def said(function, *args, **kwargs):
    """What the watchdog warns of while a function runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args, **kwargs)
    return [str(w.message) for w in caught if str(w.message).startswith("ssprop_patch:")]


class Foreign:
    """An optimizer that is no torch.optim.Optimizer, as fastai's own."""

    def __init__(self, model):
        self.parameters = list(model.parameters())

    @torch.no_grad()
    def step(self):
        for p in self.parameters:
            p.data.add_(p.grad, alpha=-1e-3)


class Flat:
    """A torch optimizer over one flat copy of the weights, as of DeepSpeed."""

    def __init__(self, model):
        self.parameters = list(model.parameters())
        self.master = self.flat(p.detach() for p in self.parameters).requires_grad_()
        self.optimizer = torch.optim.AdamW([self.master])

    def flat(self, tensors):
        return torch.cat([t.float().flatten() for t in tensors])

    @torch.no_grad()
    def step(self):
        self.master.grad = self.flat(p.grad for p in self.parameters)
        self.optimizer.step()
        parts = self.master.split([p.numel() for p in self.parameters])
        for p, part in zip(self.parameters, parts, strict=True):
            p.copy_(part.view_as(p))


# --- no step is counted ----------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [Foreign, Flat])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_that_are_not_seen(optimizer, dtype):
    model = by_bar(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).to(dtype))
    own = optimizer(model)

    def run():
        for _ in range(12):
            model.zero_grad()
            model(image().to(dtype)).float().square().sum().backward()
            own.step()

    (text,) = said(run)
    for part in ("BarSchedule(0.8, period=2)", "t=0", ".step(epoch)", "torch.optim.Optimizer"):
        assert part in text
    assert ("AdamW" in text) == (optimizer is Flat)
    assert said(run) == [] and ssp.get_controller(model).t == 0


def test_steps_that_are_not_seen_in_eval_mode():
    model = by_bar().eval()
    (text,) = said(train, model, 9, Foreign(model))
    assert "the weights of this model change" in text


def test_it_says_how_to_tell_steps_where_the_schedule_counts_those():
    model = ssp.convert(make(), ssp.BarSchedule(0.8, interval="step"))
    (text,) = said(train, model, 4, Foreign(model))
    assert ".step() after every step" in text


def test_an_optimizer_over_parameters_that_are_no_longer_the_models():
    model = make()
    optimizer = sgd(model)
    model.load_state_dict(make().state_dict(), assign=True)
    (text,) = said(train, by_bar(model), 9, optimizer)
    assert "gets gradients" in text and "SGD: 8" in text


def test_accumulated_gradients_are_no_change():
    model = by_bar()

    def run():
        for _ in range(70):
            model(image()).square().mean().backward()
        sgd(model).step()

    assert said(run) == []


def test_a_checkpoint_loaded_between_two_passes_is_no_training():
    model = by_bar()

    def run():
        forward_and_backward(model)
        model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
        for _ in range(40):
            forward_and_backward(model)

    assert said(run) == []


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_an_optimizer_that_trains_inside_of_its_step(search):
    model = by_bar()
    optimizer = torch.optim.LBFGS(model.parameters(), 1e-3, max_iter=9, line_search_fn=search)

    def closure():
        optimizer.zero_grad()
        loss = model(image()).square().mean()
        loss.backward()
        return loss

    assert said(optimizer.step, closure) == []


@pytest.mark.parametrize("constant", [0.0, 0.8])
def test_a_constant_rate_needs_no_steps(constant):
    model = ssp.convert(make(), constant)
    assert said(train, model, 12, Foreign(model)) == []


def test_steps_told_by_hand():
    model = by_bar()
    ssp.get_controller(model).step(0)
    assert said(train, model, 12, Foreign(model)) == []


def test_a_model_that_is_cast_is_not_trained():
    model = by_bar(nn.Conv2d(3, 8, 3, dtype=torch.float64))

    def run():
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.bfloat16):
            model.to(dtype)(image().to(dtype)).float().sum().backward()

    assert said(run) == []


# --- a layer is never called -------------------------------------------------------------------


class Reads(nn.Module):
    """As Mamba's mixer: the weight goes to a kernel of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.read = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        read = dict(self.named_parameters())  # which nobody can tell from the code
        return F.conv2d(self.stem(x), read["read.weight"], read["read.bias"])


@pytest.mark.parametrize("rate", [0.5, ssp.BarSchedule(0.8, interval="step")])
def test_a_layer_whose_weight_is_read(rate):
    model = ssp.convert(Reads(), rate)
    (text,) = said(train, model, 3)
    assert "'read'" in text and "read by other code" in text and "'stem'" not in text
    assert said(train, model, 20) == []


def test_the_plan_says_that_a_weight_is_read_after_the_first_backward():
    model = ssp.convert(Reads(), 0.5)
    assert not any("never called" in row.reason for row in ssp.plan(model))
    forward_and_backward(model)
    stem, read = ssp.plan(model)
    assert "never called: its weight is read by others" in read.reason
    assert "never" not in stem.reason and (str(stem.ran), bool(read.ran)) == ("1 sparse", False)


def test_a_layer_that_gets_no_gradient_is_merely_unused():
    model = nn.ModuleDict({"used": nn.Conv2d(3, 8, 3), "unused": nn.Conv2d(3, 8, 3)})
    ssp.convert(model, 0.5)
    optimizer = sgd(model)

    def run():
        for _ in range(9):
            optimizer.zero_grad()
            model["used"](image()).sum().backward()
            optimizer.step()

    assert said(run) == []


def test_a_gradient_from_before_the_conversion_is_no_sign():
    model = nn.ModuleDict({"used": nn.Conv2d(3, 8, 3), "unused": nn.Conv2d(3, 8, 3)})
    for layer in model.values():
        layer(image()).sum().backward()
    ssp.convert(model, 0.5)
    assert said(train, model["used"], 9, sgd(model["used"])) == []


def test_tied_weights():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
    model[1].weight = model[0].weight
    ssp.convert(model, 0.5)
    optimizer = sgd(model)

    def run():
        for _ in range(4):
            optimizer.zero_grad()
            model[0](image()).sum().backward()
            optimizer.step()

    assert said(run) == []


def test_reentrant_checkpointing_calls_a_layer():
    model = ssp.convert(make(), 0.5)
    optimizer = sgd(model)

    def run():
        for _ in range(4):
            checkpoint(model, image().requires_grad_(), use_reentrant=True).sum().backward()
            optimizer.step()

    assert said(run) == []


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
