"""sparsity and dense: rates for a while, and what is in force when they end."""

import copy

import pytest
import torch
from torch import nn

import ssprop_patch as ssp


def tenths(t):
    return min(t, 9) / 10


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))


def converted(rate=0.5, **arguments):
    model = ssp.convert(make(), rate, **arguments)
    return model, ssp.get_controller(model)


def forward(model):
    return model(torch.randn(2, 3, 6, 6)).pow(2).sum()


def rows(model):
    return [int(m.weight.grad.flatten(1).ne(0).any(1).sum()) for m in (model[0], model[2])]


def kept(model):
    """How many channels of each layer a pass keeps now."""
    model.zero_grad()
    forward(model).backward()
    return rows(model)


def test_sparsity():
    model, controller = converted(0.5)
    with ssp.sparsity(model, 0.75):
        assert controller.drop_rate == 0.75 and kept(model) == [2, 2]
    assert controller.drop_rate == 0.5 and kept(model) == [4, 4]


def test_sparsity_over_a_dense_schedule():
    model, _ = converted(0.0)
    with ssp.sparsity(model, 0.75):
        assert kept(model) == [2, 2]
    assert kept(model) == [8, 8]


def test_dense_is_bit_identical():
    model, dense = converted(0.5)[0], make()
    x = torch.randn(2, 3, 6, 6)
    with ssp.dense(model):
        assert ssp.get_controller(model).drop_rate == 0.0
        model(x).pow(2).sum().backward()
    dense(x).pow(2).sum().backward()
    for p, q in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_the_innermost_counts():
    model, controller = converted(0.5)
    seen = []

    def look():
        seen.append((controller.drop_rate, kept(model)[0]))

    with ssp.sparsity(model, 0.75):
        look()
        with ssp.dense(model):
            look()
            with ssp.sparsity(model, 0.25):
                look()
            look()
        look()
    look()
    assert seen == [(0.75, 2), (0.0, 8), (0.25, 6), (0.0, 8), (0.75, 2), (0.5, 4)]


def test_one_manager_entered_twice():
    model, controller = converted(0.5)
    manager = ssp.sparsity(model, 0.75)
    for _ in range(2):
        with manager:
            with manager:
                assert controller.drop_rate == 0.75
            assert controller.drop_rate == 0.75
        assert controller.drop_rate == 0.5


@pytest.mark.parametrize("manager", [lambda m: ssp.sparsity(m, 0.75), ssp.dense])
def test_on_exception(manager):
    model, controller = converted(0.5)
    with pytest.raises(KeyError), manager(model):
        with pytest.raises(ZeroDivisionError), ssp.sparsity(model, 0.25):
            raise ZeroDivisionError
        assert controller.drop_rate == manager(model).drop_rate
        raise KeyError
    assert controller.drop_rate == 0.5


# --- the schedule goes on meanwhile -------------------------------------------------------------


def test_t_advances_inside():
    model, controller = converted(ssp.LambdaSchedule(tenths, interval="step"))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with ssp.sparsity(model, 0.75):
        for _ in range(3):
            optimizer.step()
            assert controller.drop_rate == 0.75
    assert (controller.t, controller.drop_rate) == (3, 0.3)
    with ssp.dense(model):
        controller.step(6)
        assert controller.drop_rate == 0.0
    assert controller.drop_rate == 0.6


def test_setting_the_rate_inside_shows_after():
    model, controller = converted(0.5)
    with ssp.sparsity(model, 0.75):
        controller.drop_rate = 0.25
        assert controller.drop_rate == 0.75 and kept(model) == [2, 2]
    assert controller.drop_rate == 0.25 and kept(model) == [6, 6]


def test_the_checkpoint_does_not_hold_a_temporary_rate():
    model, controller = converted(0.5)
    state = controller.state_dict()
    with ssp.sparsity(model, 0.75):
        assert controller.state_dict() == state


def test_a_copy_made_inside_is_outside():
    model, controller = converted(0.5)
    with ssp.sparsity(model, 0.75):
        twin = copy.deepcopy(model)
        assert ssp.get_controller(twin).drop_rate == 0.5 and kept(twin) == [4, 4]
        assert controller.drop_rate == 0.75
    assert ssp.get_controller(twin).drop_rate == controller.drop_rate == 0.5


# --- which layers -------------------------------------------------------------------------------


def test_a_part_stands_for_all_layers_of_its_controller():
    model, _ = converted(0.5)
    with ssp.sparsity(model[0], 0.75):
        assert kept(model) == [2, 2]
    with ssp.dense(model[:1]):
        assert kept(model) == [8, 8]
    assert kept(model) == [4, 4]


def test_several_controllers():
    model = make()
    ssp.convert(model[0], 0.5)
    ssp.convert(model[2], 0.25)
    with ssp.sparsity(model, 0.75):
        assert kept(model) == [2, 2]
        with ssp.dense(model[0]):
            assert kept(model) == [8, 2]
        assert kept(model) == [2, 2]
    assert kept(model) == [4, 6]


def test_models_that_share_a_controller():
    controller = ssp.SparsityController(0.5)
    one, other = (ssp.convert(make(), controller=controller) for _ in range(2))
    with ssp.dense(one):
        assert kept(other) == [8, 8]
    assert kept(other) == [4, 4]


def test_layers_with_a_rate_of_their_own():
    model, _ = converted(0.0, overrides={"2": 0.75})
    with ssp.sparsity(model, 0.5):
        assert kept(model) == [4, 2]
        with ssp.dense(model):
            assert kept(model) == [8, 8]
    assert kept(model) == [8, 8]


# --- decorators and generators ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manager", "inside"), [(lambda m: ssp.sparsity(m, 0.75), [2, 2]), (ssp.dense, [8, 8])]
)
def test_as_decorator(manager, inside):
    model, controller = converted(0.5)

    @manager(model)
    def look(depth=2):
        """Looks."""
        found = kept(model)
        return [found, *(look(depth - 1) if depth else [])]

    assert look.__name__ == "look" and look.__doc__ == "Looks."
    for _ in range(2):
        assert look() == [inside] * 3
        assert controller.drop_rate == 0.5

    @manager(model)
    def fails():
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert controller.drop_rate == 0.5


def test_decorating_before_conversion():
    model = make()

    @ssp.sparsity(model, 0.75)
    def look():
        return kept(model)

    with pytest.raises(ValueError, match="not converted"):
        look()
    ssp.convert(model, 0.5)
    assert look() == [2, 2]
    ssp.convert(model, 0.25)
    assert look() == [2, 2] and kept(model) == [6, 6]
    ssp.revert(model)
    with pytest.raises(ValueError, match="not converted"):
        look()


def test_decorating_a_generator_function():
    """The rate is in force while the generator runs, and not while it waits."""
    model, controller = converted(0.5)

    @ssp.sparsity(model, 0.75)
    def steps(n):
        for _ in range(n):
            yield controller.drop_rate

    seen = []
    for rate in steps(3):
        seen.append((rate, controller.drop_rate))
    assert seen == [(0.75, 0.5)] * 3
    waiting = steps(3)
    next(waiting)
    waiting.close()
    assert controller.drop_rate == 0.5


def hold(manager):
    with manager:
        yield


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (2, 0, 1)])
def test_generators_left_in_any_order(order):
    model, controller = converted(0.5)
    rates = [0.75, 0.0, 0.25]
    waiting = [hold(ssp.sparsity(model, rate)) for rate in rates]
    for generator in waiting:
        next(generator)
    left = list(rates)
    for i in order:
        waiting[i].close()
        left.remove(rates[i])
        assert controller.drop_rate == (left[-1] if left else 0.5)


# --- when the rate is read ----------------------------------------------------------------------


def test_a_forward_inside_keeps_its_rate_for_a_backward_outside():
    model, controller = converted(0.5)
    with ssp.sparsity(model, 0.75):
        loss = forward(model)
    loss.backward()
    assert rows(model) == [2, 2]

    model.zero_grad()
    with ssp.dense(model):
        loss = forward(model)
    loss.backward()
    assert rows(model) == [8, 8]

    model.zero_grad()
    loss = forward(model)
    controller.drop_rate = 0.75
    with ssp.dense(model):
        loss.backward()
    assert rows(model) == [4, 4]


def test_each_layer_keeps_the_rate_of_its_own_forward():
    model, _ = converted(0.5)
    with ssp.sparsity(model, 0.75):
        y = model[:2](torch.randn(2, 3, 6, 6))
    model[2](y).pow(2).sum().backward()
    assert rows(model) == [2, 4]


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan"), 80, "0.5", None, True])
def test_bad_rates(rate):
    model, controller = converted(0.5)
    with pytest.raises((TypeError, ValueError), match="drop_rate"):
        ssp.sparsity(model, rate)
    assert controller.drop_rate == 0.5


@pytest.mark.parametrize("manager", [lambda m: ssp.sparsity(m, 0.75), ssp.dense])
def test_not_converted(manager):
    with (
        pytest.raises(ValueError, match=r"not converted.*convert\(model\)"),
        manager(make()),
    ):
        pytest.fail("never entered")


def test_reverted_inside():
    model, controller = converted(0.5)
    with ssp.sparsity(model, 0.75):
        ssp.revert(model)
        assert kept(model) == [8, 8]
    assert controller.drop_rate == 0.5
