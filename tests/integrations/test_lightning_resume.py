"""Lightning: a fit that goes on is the fit that was never interrupted."""

import contextlib
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

import ssprop_patch as ssp
from ssprop_patch.integrations.lightning import SsPropCallback

from . import by_hand
from .by_hand import BAR, by_step
from .in_lightning import Module, Stop, fit, loader, reference, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:lightning", "ignore:.*LeafSpec", "error:the training goes on at step"
)

# Refreshes before and after each place where a run is interrupted.
FREQUENT = ssp.Principal(refresh_interval=3)

CONVERSIONS = {
    "epochs": lambda: SsPropCallback(BAR),
    "steps": lambda: SsPropCallback(by_step()),
    "steps per epoch": lambda: SsPropCallback(BAR, steps_per_epoch=4),
    "random": lambda: SsPropCallback(BAR, selection="random"),
    "principal": lambda: SsPropCallback(BAR, selection=FREQUENT, remainder="coarse"),
}


@pytest.mark.parametrize("after", [5, 7, 10], ids=["dense end", "within sparse", "sparse end"])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_resumed_fit_is_the_uninterrupted_one(conversion, after, tmp_path):
    make = CONVERSIONS[conversion]
    expected, rates, _ = fit(tmp_path, make())
    _, first, _ = fit(tmp_path, make(), Stop(after))
    torch.manual_seed(99)  # what "random" draws comes from the checkpoint
    model, second, run = fit(tmp_path, make(), ckpt_path=tmp_path / "stopped.ckpt")
    assert run.global_step == 20 and len(first) == after
    assert first + second == rates
    by_hand.assert_same(model, expected)


def test_a_resumed_fit_of_a_converted_module(tmp_path):
    _, first, _ = fit(tmp_path, SsPropCallback(), Stop(7), converted=by_step())
    checkpoint = tmp_path / "stopped.ckpt"
    _, second, _ = fit(tmp_path, SsPropCallback(), converted=by_step(), ckpt_path=checkpoint)
    assert first + second == by_hand.rates(by_step(), 4, 5)


def test_epochs_that_were_told_are_told_on_whatever_steps_per_epoch(tmp_path):
    _, first, _ = fit(tmp_path, SsPropCallback(BAR), Stop(7))
    callback = SsPropCallback(BAR, steps_per_epoch=3)
    _, second, _ = fit(tmp_path, callback, ckpt_path=tmp_path / "stopped.ckpt")
    assert first + second == by_hand.rates(BAR, 4, 5)


def test_a_checkpoint_of_an_epoch_by_the_trainer_itself(tmp_path):
    expected, rates, _ = fit(tmp_path, SsPropCallback(by_step()))
    keep = ModelCheckpoint(tmp_path, save_last=True)
    arguments = {"enable_checkpointing": True}
    _, first, _ = fit(tmp_path, SsPropCallback(by_step()), keep, epochs=2, **arguments)
    model, second, _ = fit(tmp_path, SsPropCallback(by_step()), ckpt_path=tmp_path / "last.ckpt")
    assert first + second == rates
    by_hand.assert_same(model, expected)


def test_a_second_fit_of_one_trainer_goes_on():
    expected, rates = reference(by_step())
    model = Module()
    seen = by_hand.watch(model.net)
    callback = SsPropCallback(by_step(), revert_at_end=True)
    run = trainer(callback, epochs=2)
    optimizer = by_hand.sgd(model.net)
    model.configure_optimizers = lambda: optimizer
    run.fit(model, loader())
    assert not ssp.is_converted(model)
    run.fit_loop.max_epochs = 4
    run.fit(model, loader())
    assert seen == rates
    by_hand.assert_close(model.net, expected)


def test_another_trainer_starts_anew():
    callback = SsPropCallback(by_step())
    for _ in range(2):
        model = Module()
        seen = by_hand.watch(model.net)
        trainer(callback, epochs=1).fit(model, loader())
        assert seen == by_hand.rates(by_step(), 1, 5)


class RestoresLate(SingleDeviceStrategy):
    """As the strategies that shard the module do."""

    restore_checkpoint_after_setup = True


def test_a_strategy_that_restores_after_the_fit_has_started(tmp_path):
    arguments = {"strategy": RestoresLate("cpu"), "accelerator": "auto"}
    _, first, _ = fit(tmp_path, SsPropCallback(by_step()), Stop(7))
    checkpoint = tmp_path / "stopped.ckpt"
    _, second, _ = fit(tmp_path, SsPropCallback(by_step()), ckpt_path=checkpoint, **arguments)
    assert first + second == by_hand.rates(by_step(), 4, 5)


class ByHand(Module):
    """Sets the rate of the second epoch's rest itself."""

    def on_train_batch_start(self, batch, batch_idx):
        if (self.trainer.current_epoch, batch_idx) == (1, 2):
            ssp.get_controller(self).drop_rate = 0.3


def test_a_rate_set_by_hand_holds_until_the_epoch_ends():
    model = ByHand()
    seen = by_hand.watch(model.net)
    trainer(SsPropCallback(BAR), epochs=3).fit(model, loader())
    assert seen == [0] * 5 + [0.6, 0.6, 0.3, 0.3, 0.3] + [0] * 5


class WithTest(Module):
    def test_step(self, batch, batch_idx):
        self.net(batch[0])


def test_testing_an_earlier_checkpoint_does_not_set_the_schedule_back(tmp_path):
    model = WithTest()
    run = trainer(SsPropCallback(by_step()), Stop(3), default_root_dir=str(tmp_path))
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        run.fit(model, loader())
    controller = ssp.get_controller(model)
    controller.load_state_dict({**controller.state_dict(), "t": 8})
    run.test(model, loader(1), ckpt_path=tmp_path / "stopped.ckpt")
    assert controller.t == 8
    done, run.fit_loop.max_epochs = run.global_step, 2
    run.fit(model, loader())
    assert ssp.get_controller(model) is controller
    assert controller.t - 8 == run.global_step - done > 0


def test_a_checkpoint_of_another_schedule_is_an_error(tmp_path):
    fit(tmp_path, SsPropCallback(BAR), Stop(7))
    with pytest.raises(ValueError, match=r"saved with BarSchedule\(0.6, period=2\)"):
        fit(tmp_path, SsPropCallback(0.5), ckpt_path=tmp_path / "stopped.ckpt")


@pytest.mark.parametrize("schedule", [BAR, by_step()], ids=["epochs", "steps"])
def test_a_checkpoint_of_a_dense_fit(schedule, tmp_path):
    fit(tmp_path, Stop(7))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, seen, _ = fit(tmp_path, SsPropCallback(schedule), ckpt_path=tmp_path / "stopped.ckpt")
    told = [str(w.message) for w in caught if "holds no state" in str(w.message)]
    if schedule is BAR:
        assert told == [] and seen == by_hand.rates(BAR, 4, 5)[7:]
    else:
        assert len(told) == 1 and seen == by_hand.rates(schedule, 4, 5)[:13]
