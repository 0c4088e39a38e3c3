"""A meter changes nothing: not the gradients, not the conversion, not what is left behind."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import oracle
import pytest
import timm
import torch
from torch import nn
from torch.optim.optimizer import (
    _global_optimizer_post_hooks as post_hooks,
)
from torch.optim.optimizer import (
    _global_optimizer_pre_hooks as pre_hooks,
)
from torch.optim.swa_utils import AveragedModel

import ssprop_patch as ssp
from metering import by_hand
from metering.by_hand import RATES, by_step, counted, gradients, quiet_meter, train

TIES = ("_ssprop_membership", "_ssprop_root")  # are tied anew; by what, other tests say


def snapshot(model):
    """Everything that a model's modules hold, by identity, and their classes."""
    return {
        name: (
            type(module),
            {k: v for k, v in vars(module).items() if k not in TIES},
            {k: dict(v) for k, v in vars(module).items() if k.endswith("hooks")},
        )
        for name, module in model.named_modules()
    }


def assert_identical(found, expected):
    assert any(t.any() for t in expected.values())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("rate", [0.0, 0.6])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_nfnet"])
def test_gradients_are_bit_identical_to_those_without_a_meter(name, rate):
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=5), torch.randn(2, 3, 64, 64)
    plain = copy.deepcopy(model)
    if rate:
        ssp.convert(plain, rate)
    expected = gradients(plain, x)
    with quiet_meter(ssp.convert(model, rate)):
        assert_identical(gradients(model, x), expected)


def test_gradients_of_an_unconverted_model_stay_bit_identical():
    model, x = by_hand.net(groups=2), by_hand.batch(0)
    expected = gradients(copy.deepcopy(model), x)
    with quiet_meter(model):
        assert_identical(gradients(model, x), expected)


def test_dense_gradients_of_linear_layers_stay_bit_identical():
    make = lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()  # noqa: E731
    torch.manual_seed(0)
    model, x = make(), torch.randn(7, 6, dtype=torch.float64)
    expected = gradients(copy.deepcopy(model), x)
    with quiet_meter(ssp.convert(model, 0.0, types=nn.Linear)) as meter:
        assert_identical(gradients(model, x), expected)
        assert counted(meter)[0] == 2 * 7 * (6 * 9 + 9 * 4)


def test_sparse_gradients_under_a_meter_are_those_of_the_oracle():
    plain, model, x = by_hand.net(), by_hand.net(), by_hand.batch(0)
    with oracle.network(plain, 0.6) as record:
        expected = gradients(plain, x)
    assert record.dropped and record.gap > 1e-6
    with quiet_meter(ssp.convert(model, 0.6), channels_every=1):
        torch.testing.assert_close(gradients(model, x), expected, rtol=1e-9, atol=1e-12)


def test_double_backward_works_under_a_meter_at_rate_0():
    def second(model):
        x = by_hand.batch(0).requires_grad_()
        (dx,) = torch.autograd.grad(by_hand.loss_of(model(x)), x, create_graph=True)
        dx.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = second(by_hand.net())
    with quiet_meter(by_hand.net()) as meter:
        torch.testing.assert_close(second(meter._model), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("converted", ["all", "but the stem", "nothing"])
def test_close_leaves_everything_as_it_was_before(converted):
    model = by_hand.net()
    if converted != "nothing":
        ssp.convert(model, by_step(), exclude="^0$" if converted != "all" else ())
    before, hooks = snapshot(model), (dict(pre_hooks), dict(post_hooks))
    meter = ssp.Meter(model, energy=False, channels_every=1)
    train(model, 2)
    meter.close()
    model.zero_grad(set_to_none=True)
    assert snapshot(model) == before
    assert (dict(pre_hooks), dict(post_hooks)) == hooks
    assert ssp.is_converted(model) == (converted != "nothing")
    assert gradients(model, by_hand.batch(0))


def test_after_close_nothing_counts_and_the_report_stays():
    model = ssp.convert(by_hand.net(), 0.5)
    meter = ssp.Meter(model, energy=False)
    optimizer = train(model, 2)
    last = meter.close()
    train(model, 2, optimizer)
    assert str(meter.report()) == str(last)
    assert meter.steps == 2
    meter.close()  # as often as one likes
    with quiet_meter(model) as other:
        meter.close()  # and leaves another meter alone
        train(model, 1, optimizer)
        assert (other.steps, other.report().layers[0].totals.backwards) == (1, 1)


@pytest.mark.parametrize("second", ["the model", "a part", "a wrapper"])
@pytest.mark.parametrize("converted", [True, False])
def test_a_second_meter_takes_over(second, converted):
    """As where the cell of a notebook runs twice."""
    model = ssp.convert(by_hand.net(), 0.5) if converted else by_hand.net()
    before = snapshot(model)
    first = ssp.Meter(model, energy=False)
    optimizer = train(model, 1)
    with pytest.raises(TypeError):  # nothing has changed then
        ssp.Meter(model, energy="yes")
    train(model, 1, optimizer)
    assert (first.steps, first.totals.backwards) == (2, 6)
    named = {"the model": model, "a part": model[:3], "a wrapper": nn.ModuleDict({"module": model})}
    with pytest.warns(UserWarning, match="metered already: that Meter is closed"):
        meter = ssp.Meter(named[second], energy=False)
    train(model, 3, optimizer)
    assert (first.steps, first.totals.backwards) == (2, 6)
    layers = 2 if second == "a part" else 3
    assert (meter.steps, meter.totals.backwards) == (3, 3 * layers)
    meter.close()
    model.zero_grad(set_to_none=True)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.ReLU(),), ValueError, "no layer to count in this ReLU"),
        (("resnet18",), TypeError, "nn.Module"),
        ((nn.Sequential(nn.LazyConv2d(3, 1)),), ValueError, "lazy"),
    ],
)
def test_what_cannot_be_metered_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ssp.Meter(*arguments, energy=False)


@pytest.mark.parametrize(
    "arguments", [{"energy": "yes"}, {"channels_every": 0}, {"channels_every": 1.5}]
)
def test_a_wrong_argument_changes_nothing(arguments):
    model = ssp.convert(by_hand.net(), 0.5)
    before, hooks = snapshot(model), dict(pre_hooks)
    with pytest.raises((TypeError, ValueError)):
        ssp.Meter(model, **{"energy": False, **arguments})
    assert snapshot(model) == before and dict(pre_hooks) == hooks


# --- the conversion goes on as it would ---------------------------------------------------------


def test_the_controller_is_found_and_its_schedule_advances_as_without_a_meter():
    model = ssp.convert(by_hand.net(), by_step(), exclude="^0$")
    controller = ssp.get_controller(model)
    with quiet_meter(model):
        assert ssp.get_controller(model) is controller
        assert ssp.get_controller(model[2]) is controller
        optimizer = train(model, 2)
        assert (controller.t, controller.drop_rate) == (2, RATES[2])
    train(model, 1, optimizer)
    assert controller.t == 3


def test_each_part_keeps_its_controller():
    parts = nn.ModuleDict({"a": by_hand.net(), "b": by_hand.net()})
    for part in parts.values():
        ssp.convert(part, by_step(), exclude="^0$")
    own = {name: ssp.get_controller(part) for name, part in parts.items()}
    with quiet_meter(parts):
        assert {name: ssp.get_controller(part) for name, part in parts.items()} == own


def test_steps_of_a_part_that_is_not_converted_do_not_advance_another_parts_schedule():
    """A generator is converted, its discriminator is not, and trains more often."""
    gan = nn.ModuleDict({"g": by_hand.net(), "d": by_hand.net()})
    controller = ssp.get_controller(ssp.convert(gan["g"], by_step()))
    with quiet_meter(gan) as meter:
        optimizer = train(gan["d"], 3)
        train(gan["d"], 2, optimizer)
        assert controller.t == 0
        train(gan["g"], 1)
        assert controller.t == 1
        assert meter.steps == 5  # once an iteration: five of the discriminator's, one with both


def test_temporary_rates_are_counted_with():
    model = ssp.convert(by_hand.net(), 0.0)
    x = by_hand.batch(0)
    expected = by_hand.by_summary(by_hand.net(), x, [0.5, 0.0])
    with quiet_meter(model) as meter:
        with ssp.sparsity(model, 0.5):
            gradients(model, x)
        gradients(model, x)
        assert counted(meter) == expected


def test_converting_again_is_followed():
    model, x = ssp.convert(by_hand.net(), 0.5), by_hand.batch(0)
    rates = [0.5, 0.75, 0.25]
    expected = by_hand.by_summary(by_hand.net(), x, rates)
    meter = ssp.Meter(model, energy=False)
    gradients(model, x)
    ssp.convert(model, 0.75)
    gradients(model, x)
    with ssp.converted(model, 0.25):
        gradients(model, x)
    assert counted(meter) == expected
    ssp.convert(model, 0.9, exclude="^0$", types=(nn.Conv2d, nn.Linear))
    gradients(model, x)
    assert [row.name for row in meter.report().layers] == ["0", "2", "4", "6"]
    assert meter.kept == {"0": (8, 8), "2": (1, 12), "4": (1, 6), "6": (1, 5)}
    meter.close()
    assert not ssp.is_converted(model[0]) and ssp.is_converted(model[6])
    assert ssp.get_controller(model).drop_rate == 0.9
    assert set(ssp.get_controller(model).step_counter._layers) == {model[2], model[4], model[6]}


def test_reverting_while_metered_is_said_once_and_holds():
    model = ssp.convert(by_hand.net(), 0.5)
    meter = ssp.Meter(model, energy=False)
    optimizer = train(model, 1)
    before = counted(meter)
    ssp.revert(model)
    with pytest.warns(UserWarning, match="reverted while a Meter counts"):
        train(model, 1, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, 1, optimizer)
    assert not ssp.is_converted(model)
    assert counted(meter) == before
    meter.close()
    assert not ssp.is_converted(model) and all(type(m) is not nn.Module for m in model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- copies -------------------------------------------------------------------------------------


def loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_converted_but_not_metered(copied):
    model = ssp.convert(by_hand.net(), 0.5, exclude="^0$")
    with quiet_meter(model, channels_every=1) as meter:
        train(model, 1)
        before = counted(meter), meter.steps
        twin = copied(model)
        assert_identical(gradients(twin, by_hand.batch(0)), gradients(model, by_hand.batch(0)))
        before_steps = meter.steps
        train(twin, 2)
        assert meter.steps == before_steps
        assert counted(meter) == tuple(2 * n for n in before[0])  # the model's own two passes
        with quiet_meter(twin) as other:
            train(twin, 1)
            assert other.steps == 1
        assert ssp.get_controller(twin) is not ssp.get_controller(model)
        assert list(twin.state_dict()) == list(model.state_dict())


def test_an_average_of_a_metered_model():
    model = ssp.convert(by_hand.net(), 0.5)
    with quiet_meter(model) as meter:
        average = AveragedModel(model)
        train(model, 2)
        average.update_parameters(model)
        average(by_hand.batch(0))
        assert {row.totals.forwards for row in meter.report().layers} == {2}


def test_state_dict_keys_stay():
    model = ssp.convert(by_hand.net(), 0.5)
    keys = list(model.state_dict())
    with quiet_meter(model):
        assert list(model.state_dict()) == keys


def test_a_closed_meter_holds_no_model():
    model = ssp.convert(by_hand.net(), 0.5)
    meter = ssp.Meter(model, energy=False)
    train(model, 1)
    meter.close()
    gone = weakref.ref(meter)
    del meter
    gc.collect()
    assert gone() is None
