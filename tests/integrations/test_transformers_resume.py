"""Hugging Face Trainer: a resumed training is the one that was never interrupted."""

import functools
import json
import tempfile
import warnings

import pytest
import torch
from transformers import TrainerCallback

import ssprop_patch as ssp
from ssprop_patch.integrations.transformers import SsPropCallback

from . import by_hand
from .by_hand import BAR, by_step
from .in_transformers import make, train, trainer

pytestmark = pytest.mark.filterwarnings("error:the training goes on at step")


class Stop(TrainerCallback):
    """Ends the training after so many steps, with the checkpoint of the last of them."""

    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == self.after

    def on_save(self, *args, **kwargs):
        raise KeyboardInterrupt


# Refreshes before and after each place where a run is interrupted.
FREQUENT = ssp.Principal(refresh_interval=3)

CONVERSIONS = {
    "epochs": lambda: SsPropCallback(BAR),
    "steps": lambda: SsPropCallback(by_step()),
    "steps per epoch": lambda: SsPropCallback(BAR, steps_per_epoch=4),
    "random": lambda: SsPropCallback(BAR, selection="random"),
    "principal": lambda: SsPropCallback(BAR, selection=FREQUENT, remainder="coarse"),
}


@functools.cache
def uninterrupted(conversion, **arguments):
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as path:
        return train(path, CONVERSIONS[conversion](), **arguments)[:2]


@pytest.mark.parametrize("after", [5, 7, 10], ids=["dense end", "within sparse", "sparse end"])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_resumed_training_is_the_uninterrupted_one(conversion, after, tmp_path):
    make, arguments = CONVERSIONS[conversion], {"train_sampling_strategy": "random"}
    expected, rates = uninterrupted(conversion, **arguments)
    _, first, _ = train(tmp_path, make(), Stop(after), **arguments)
    torch.manual_seed(99)  # what selection="random" draws comes from the checkpoint
    checkpoint = str(tmp_path / f"checkpoint-{after}")
    model, second, run = train(tmp_path, make(), resume=checkpoint, **arguments)
    assert run.state.global_step == 20 and len(first) == after
    assert first + second == rates
    by_hand.assert_same(model, expected)


def test_directions_lie_beside_the_trainers_state(tmp_path):
    """JSON does not hold tensors; and a checkpoint may be moved."""
    make = CONVERSIONS["principal"]
    expected, rates = uninterrupted("principal")
    train(tmp_path / "a", make(), Stop(7))
    saved = tmp_path / "a" / "checkpoint-7"
    assert "layers" not in (saved / "trainer_state.json").read_text()
    layers = torch.load(saved / "ssprop_patch.pt", weights_only=True)
    # Those that keep channels at this rate have none.
    assert {layer["passes"] for layer in layers.values()} == {0, 2}
    moved = saved.rename(tmp_path / "moved")
    model, second, _ = train(tmp_path / "b", make(), resume=str(moved))
    assert second == rates[7:]
    by_hand.assert_same(model, expected)
    (moved / "ssprop_patch.pt").unlink()
    with pytest.raises(ValueError, match=r"step 7 has lost ssprop_patch\.pt.*moved"):
        train(tmp_path / "b", make(), resume=str(moved))


def test_without_directions_there_is_no_file_beside_it(tmp_path):
    train(tmp_path, SsPropCallback(BAR, remainder="coarse"), Stop(7))
    assert not list(tmp_path.rglob("ssprop_patch.pt"))


def test_a_resumed_training_of_a_converted_model(tmp_path):
    _, first, _ = train(tmp_path, SsPropCallback(), Stop(7), converted=by_step())
    _, second, _ = train(tmp_path, SsPropCallback(), converted=by_step(), resume=True)
    assert first + second == by_hand.rates(by_step(), 4, 5)


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_checkpoints_of_the_trainer_itself(strategy, restore, tmp_path):
    make, arguments = CONVERSIONS["steps"], {"save_strategy": strategy, "save_steps": 7}
    expected, rates = uninterrupted("steps")
    _, first, _ = train(tmp_path, make(), epochs=2, **arguments)
    arguments["restore_callback_states_from_checkpoint"] = restore
    saved = 10 if strategy == "epoch" else 7
    checkpoint = str(tmp_path / f"checkpoint-{saved}")
    model, second, _ = train(tmp_path, make(), resume=checkpoint, **arguments)
    assert first[:saved] + second == rates
    by_hand.assert_same(model, expected)


class SetsRate(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 6:
            ssp.get_controller(model).drop_rate = 0.3


def test_a_rate_set_by_hand_holds_until_the_epoch_ends(tmp_path):
    _, first, _ = train(tmp_path, SsPropCallback(BAR), SetsRate(), Stop(7))
    _, second, _ = train(tmp_path, SsPropCallback(BAR), resume=str(tmp_path / "checkpoint-7"))
    assert first + second == [0] * 5 + [0.6] + [0.3] * 4 + [0] * 5 + [0.6] * 5


@pytest.mark.parametrize("schedule", [BAR, by_step()], ids=["epochs", "steps"])
def test_a_checkpoint_of_a_dense_training(schedule, tmp_path):
    train(tmp_path, Stop(7))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, seen, _ = train(tmp_path, SsPropCallback(schedule), resume=True, save_strategy="epoch")
    told = [str(w.message) for w in caught if "holds no state" in str(w.message)]
    if schedule is BAR:
        assert told == [] and seen == by_hand.rates(BAR, 4, 5)[7:]
    else:
        assert len(told) == 1 and seen == by_hand.rates(schedule, 4, 5)[:13]


def test_a_checkpoint_of_another_schedule_is_an_error(tmp_path):
    train(tmp_path, SsPropCallback(BAR), Stop(7))
    with pytest.raises(ValueError, match=r"saved with BarSchedule\(0.6, period=2\)"):
        train(tmp_path, SsPropCallback(0.5), resume=True)


def test_a_second_training_starts_anew(tmp_path):
    model = make()
    seen = by_hand.watch(model)
    run = trainer(model, tmp_path, SsPropCallback(by_step()), epochs=1)
    for _ in range(2):
        run.train()
    assert seen == by_hand.rates(by_step(), 1, 5) * 2


def test_the_state_lies_in_the_trainers_own_file(tmp_path):
    model, _, _ = train(tmp_path, SsPropCallback(BAR), epochs=2, save_strategy="epoch")
    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["ssprop_patch"]["attributes"]
    assert saved == ssp.get_controller(model).state_dict()
