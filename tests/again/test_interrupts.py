"""An interrupt anywhere in convert, revert or a context manager: the model is whole, and usable."""

import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from again.interrupting import every
from ssprop_patch.schedule import step_counter, watchdog
from ssprop_patch.schedule.step_counter import _watches


@pytest.fixture(autouse=True)
def no_lock_stays():
    """Release what an interrupt between a lock's ``__enter__`` and its block has left locked.

    Only those that a trace function raises come there, no signal's; later tests would wait for it.
    """
    yield
    for lock in (step_counter._lock, watchdog._lock):
        while lock._is_owned():
            lock.release()


OURS = ("_ssprop_policy", "_ssprop_membership", "_ssprop_root")


class Scaled(nn.Conv2d):
    """A forward of its own."""

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight * 2, self.bias, padding=self.padding)


class Careful(nn.Conv2d):
    """Has an opinion on what is set on it: its class is replaced by Python code."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), Scaled(8, 8, 1), Careful(8, 8, 1), nn.Conv2d(8, 1, 1))


LAYERS = (0, 1, 2)
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def rows(model):
    """How many rows of each weight's gradient are not zero."""
    model.zero_grad()
    model(X).pow(2).sum().backward()
    return [int(model[i].weight.grad.flatten(1).ne(0).any(1).sum()) for i in LAYERS]


def watching(model):
    """Which watches hold a part of the model, and as what."""
    return {
        watch
        for watch in _watches
        if any(m in watch._layers or m in watch._roots for m in model.modules())
    }


def state(model):
    """Return "plain" or the controller, and see to it that all the rest agrees with that."""
    attributes = [[name for name in OURS if name in vars(m)] for m in model.modules()]
    if not any(attributes):
        assert all("_ssprop_original" not in vars(type(m)) for m in model.modules())
        assert not ssp.is_converted(model) and not watching(model)
        return "plain"
    controller = ssp.get_controller(model)
    for module, names in zip(model.modules(), attributes, strict=True):
        layer = module in [model[i] for i in LAYERS]
        assert names == [*OURS[:2]] * layer + [OURS[2]] * (module is model)
        patched = "_ssprop_policy" in names
        assert ("_ssprop_is_layer" in dir(type(module))) == patched
        assert (module in controller.step_counter._layers) == patched
        assert (module in controller.step_counter._roots) == (module is model)
    assert watching(model) == {controller.step_counter}
    return controller


def rate_of(found):
    return 0.0 if found == "plain" else found.drop_rate


def check(model):
    """The model trains and counts as its state says, and goes both ways from here."""
    found = state(model)
    assert rows(model) == [max(1, int((1 - rate_of(found)) * 8 + 0.5))] * 3
    torch.optim.SGD(model.parameters(), 0.0).step()
    assert found == "plain" or (found.t, found._temporary) == (1, [])
    ssp.convert(model, steps(0.875))
    assert state(model).drop_rate == 0.875 and rows(model) == [1] * 3
    ssp.revert(model)
    assert state(model) == "plain"


def check_each(made, full=100):
    """Check the state of each model; all else at each change of it, and now and then."""
    seen, last = [], None
    for i, model in enumerate(made):
        now = rate_of(state(model))
        if now != last or i % full == 0:
            check(model)
        if now != last:
            seen.append(now)
        last = now
    return seen


def steps(rate):
    return ssp.ConstantSchedule(rate, interval="step")


def convert_plain():
    model = make()
    return model, lambda: ssp.convert(model, steps(0.5))


HELD = []  # else a controller that is given up dies, and its watch with it


def convert_again():
    model = ssp.convert(make(), steps(0.25))
    HELD[:] = [ssp.get_controller(model)]
    return model, lambda: ssp.convert(model, steps(0.5))


def revert():
    model = ssp.convert(make(), steps(0.5))
    HELD[:] = [ssp.get_controller(model)]
    return model, lambda: ssp.revert(model)


CHANGES = {
    "convert": (convert_plain, [0.0, 0.5]),
    "convert again": (convert_again, [0.25, 0.5]),
    "revert": (revert, [0.5, 0.0]),
}


# Every so many places; more of them are slow.
PLACES = pytest.mark.parametrize(
    ("event", "step"),
    [
        ("line", 7),
        ("opcode", 97),
        pytest.param("line", 2, marks=pytest.mark.slow),
        pytest.param("opcode", 37, marks=pytest.mark.slow),
    ],
)


@pytest.mark.parametrize("case", CHANGES)
@PLACES
def test_conversions(case, event, step):
    """It is the old state up to one place, and from there on the new one."""
    prepare, rates = CHANGES[case]
    assert check_each(every(prepare, event, step)) == rates


EACH = pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])


@EACH
def test_a_shared_controller_does_not_count_for_a_model_that_was_not_converted(step):
    def prepare():
        one, other = ssp.convert(make(), steps(0.5)), make()
        controller = ssp.get_controller(one)
        return (other, controller), lambda: ssp.convert(other, controller=controller)

    seen = set()
    for other, controller in every(prepare, step=step):
        torch.optim.SGD(other.parameters(), 0.0).step()
        assert controller.t == ssp.is_converted(other)
        seen.add(controller.t)
    assert seen == {0, 1}


@EACH
def test_the_same_controller_again(step):
    def prepare():
        model = ssp.convert(make(), steps(0.5))
        controller = ssp.get_controller(model)
        return model, lambda: ssp.convert(model, controller=controller)

    assert check_each(every(prepare, step=step)) == [0.5]


class Stubborn(nn.Conv2d):
    stubborn = True

    def __setattr__(self, name, value):
        if name == "__class__" and self.stubborn:
            raise TypeError("__class__ is mine")
        super().__setattr__(name, value)


@EACH
def test_a_class_that_refuses(step):
    def prepare():
        model = make()
        model[2] = Stubborn(8, 8, 1)

        def action():
            with pytest.raises(TypeError, match="is mine"):
                ssp.convert(model, steps(0.5))

        return model, action

    for i, model in enumerate(every(prepare, step=step)):
        # What two faults leave half done is harmless, and made good by what comes next.
        if i % 25 == 0:
            rows(model)
        model[2].stubborn = False
        ssp.convert(model, steps(0.5))
        assert state(model).drop_rate == 0.5
        ssp.revert(model)
        assert state(model) == "plain"


# --- context managers ---------------------------------------------------------------------------


def enter_and_leave(manager):
    """Enter, look inside, leave: interrupts inside the block belong to the user."""
    with manager:
        pass


@pytest.mark.parametrize("manager", [lambda m: ssp.sparsity(m, 0.75), ssp.dense])
@pytest.mark.parametrize(("event", "step"), [("line", 1), ("opcode", 5)])
def test_a_temporary_rate_ends(manager, event, step):
    def prepare():
        model = make()
        ssp.convert(model[0], steps(0.5))
        ssp.convert(model[1], steps(0.25))
        entered = manager(model)
        return (model, entered), lambda: enter_and_leave(entered)

    left = 0
    for model, entered in every(prepare, event, step):
        controllers = [ssp.get_controller(model[i]) for i in (0, 1)]
        rates = [c.drop_rate for c in controllers]
        if rates != [0.5, 0.25]:  # the interrupt came before anything of __exit__ ran, or after
            left += 1  # all of __enter__: nothing can be done about that, but all rates agree
            assert rates == [entered.drop_rate] * 2
            entered.__exit__()
        assert [c.drop_rate for c in controllers] == [0.5, 0.25]
        assert [c.sparse for c in controllers] == [True, True]
        assert all(c._temporary == [] for c in controllers) and entered._entered == []
        with entered:
            assert [c.drop_rate for c in controllers] == [entered.drop_rate] * 2
    assert left <= (2 if event == "line" else 20 // step + 1)


def test_a_pause_ends():
    def prepare():
        model = make()
        ssp.convert(model[0], steps(0.5))
        ssp.convert(model[1], steps(0.25))
        entered = ssp.paused(model)
        return (model, entered), lambda: enter_and_leave(entered)

    left = 0
    for model, entered in every(prepare):
        watches = [ssp.get_controller(model[i]).step_counter for i in (0, 1)]
        if entered._entered:  # as above
            left += 1
            assert all(watch.paused for watch in watches)
            entered.__exit__()
        assert not any(watch.paused for watch in watches) and entered._entered == []
    assert left <= 2


def test_a_rate_within_a_rate():
    def prepare():
        model = ssp.convert(make(), steps(0.5))
        outer, inner = ssp.sparsity(model, 0.75), ssp.sparsity(model, 0.25)
        outer.__enter__()
        return (model, outer), lambda: enter_and_leave(inner)

    for model, outer in every(prepare):
        controller = ssp.get_controller(model)
        assert controller.drop_rate == controller._temporary[-1].rate
        if controller.drop_rate == 0.75:
            outer.__exit__()
            assert controller.drop_rate == 0.5 and controller._temporary == []


@pytest.mark.parametrize("before", [0.0, 0.25])
@EACH
def test_converted(before, step):
    controllers = []

    def prepare():
        model = make()
        if before:
            ssp.convert(model, steps(before))
            controllers[:] = [ssp.get_controller(model)]
        return model, lambda: enter_and_leave(ssp.converted(model, steps(0.5)))

    def models():
        for model in every(prepare, step=step):
            found = state(model)
            assert rate_of(found) != before or not before or found is controllers[0]
            yield model

    # 0.5 where the interrupt came in __exit__ before anything was changed back.
    assert check_each(models()) == [before, 0.5, before]
