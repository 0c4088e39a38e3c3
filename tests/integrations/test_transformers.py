"""Hugging Face Trainer: whole trainings against the same by hand, logging, wrong uses."""

import warnings

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import ssprop_patch as ssp
from ssprop_patch.integrations.transformers import SsPropCallback

from . import by_hand
from .by_hand import BAR, by_step, data
from .in_transformers import Images, make, train, trainer

pytestmark = pytest.mark.filterwarnings("error:the training goes on at step")


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def reference(schedule, epochs=4, accumulate=1):
    model, groups = make(), by_hand.steps(data(), epochs, accumulate)
    rates = by_hand.rates(schedule, epochs, len(groups) // epochs)
    return by_hand.train(model, groups, rates, loss_of=lambda x, y: model(x, labels=y).loss), rates


# --- a whole training ---------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [BAR, by_step()], ids=["epochs", "steps"])
def test_a_training_is_the_one_by_hand(schedule, tmp_path):
    expected, rates = reference(schedule)
    model, seen, _ = train(tmp_path, SsPropCallback(schedule))
    assert seen == rates
    by_hand.assert_close(model, expected)


@pytest.mark.parametrize("schedule", [BAR, by_step()], ids=["epochs", "steps"])
def test_gradient_accumulation_whose_last_step_of_an_epoch_is_shorter(schedule, tmp_path):
    expected, rates = reference(schedule, accumulate=2)
    model, seen, run = train(tmp_path, SsPropCallback(schedule), gradient_accumulation_steps=2)
    assert run.state.global_step == len(rates) == 12
    passes = [2, 2, 1] * 4
    assert seen == [rate for rate, n in zip(rates, passes, strict=True) for _ in range(n)]
    by_hand.assert_close(model, expected)


def test_epochs_of_a_stream_without_a_length(tmp_path):
    expected, rates = reference(BAR)
    stream = Stream(Images(data()).rows)
    model, seen, _ = train(tmp_path, SsPropCallback(BAR), dataset=stream, max_steps=20)
    assert seen == rates
    by_hand.assert_close(model, expected)


class ShortEpochs(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step % 2 == 0


def test_epochs_that_end_early_are_epochs(tmp_path):
    _, seen, _ = train(tmp_path, SsPropCallback(BAR), ShortEpochs())
    assert seen == [0, 0, 0.6, 0.6] * 2


def test_arguments_of_the_conversion(tmp_path):
    arguments = {"exclude": "resnet.embedder", "overrides": {"resnet.encoder.stages.1": 0.25}}
    model, _, _ = train(tmp_path, SsPropCallback(**arguments), epochs=1)
    assert ssp.get_controller(model).schedule == ssp.BarSchedule(0.8, period=2)
    expected = {row.name: row.drop_rate for row in ssp.plan(make(), **arguments).converted}
    found = {
        name: module._ssprop_policy.override
        for name, module in model.named_modules()
        if hasattr(module, "_ssprop_policy")
    }
    assert found == expected and set(found.values()) == {0.25, None}


def test_evaluation_between_epochs_changes_nothing(tmp_path):
    expected, rates = reference(BAR, epochs=2)
    model, seen, run = train(tmp_path, SsPropCallback(BAR), epochs=2, eval_strategy="epoch")
    assert seen == rates and sum("eval_loss" in entry for entry in run.state.log_history) == 2
    assert not any("ssprop/drop_rate" in e for e in run.state.log_history if "eval_loss" in e)
    by_hand.assert_close(model, expected)


def test_a_model_that_is_made_for_each_training(tmp_path):
    made = []

    def model_init():
        made.append(make())
        return made[-1]

    run = Trainer(
        args=TrainingArguments(
            str(tmp_path),
            num_train_epochs=2,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        model_init=model_init,
        train_dataset=Images(data()),
        callbacks=[SsPropCallback(by_step())],
    )
    for _ in range(2):
        run.train()
        assert run.model is made[-1] and ssp.get_controller(run.model).t == 10


# --- a model that is converted already ----------------------------------------------------------


def converted(path, *callbacks, epochs=4, **arguments):
    model = make()
    ssp.convert(model, BAR, **arguments)
    controller, seen = ssp.get_controller(model), by_hand.watch(model)
    trainer(model, path, *callbacks, epochs=epochs).train()
    assert ssp.get_controller(model) is controller
    return model, seen


@pytest.mark.parametrize(
    ("callbacks", "arguments"),
    [([SsPropCallback()], {}), ([], {"steps_per_epoch": 5})],
    ids=["callback", "steps per epoch and no callback"],
)
def test_a_converted_model_is_told_the_epochs(callbacks, arguments, tmp_path):
    expected, rates = reference(BAR)
    model, seen = converted(tmp_path, *callbacks, **arguments)
    assert seen == rates
    by_hand.assert_close(model, expected)


def test_steps_per_epoch_of_a_conversion_rule(tmp_path):
    _, seen = converted(tmp_path, SsPropCallback(), steps_per_epoch=2, epochs=2)
    assert seen == [0, 0, 0.6, 0.6, 0, 0, 0.6, 0.6, 0, 0]


# --- logging, the end, wrong uses ---------------------------------------------------------------


class Reporter(TrainerCallback):
    """Stands for TensorBoardCallback and the like."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((state.global_step, logs.get("ssprop/drop_rate")))


@pytest.mark.parametrize("schedule", [BAR, by_step()], ids=["epochs", "steps"])
def test_history_and_reporters_show_the_rate_of_every_step(schedule, tmp_path):
    reporter = Reporter()
    _, _, run = train(tmp_path, SsPropCallback(schedule), reporter, epochs=2)
    rates = by_hand.rates(schedule, 2, 5)
    history = [
        (entry["step"], entry["ssprop/drop_rate"])
        for entry in run.state.log_history
        if "loss" in entry
    ]
    assert history == list(zip(range(1, 11), rates, strict=True))
    assert reporter.logged == [*history, (10, None)]  # the last is of the training's time


def test_tensorboard_of_report_to_shows_the_rate_of_every_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run = trainer(make(), tmp_path, epochs=2, report_to="tensorboard")
    callback = SsPropCallback(BAR)
    assert callback.add_to(run) is callback and callback.add_to(run) is callback  # not twice
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*will not show")
        run.train()
    (file,) = (tmp_path / "events").rglob("*tfevents*")
    events = EventAccumulator(str(file))
    events.Reload()
    shown = [(s.step, s.value) for s in events.Scalars("train/ssprop/drop_rate")]
    assert shown == [(i + 1, pytest.approx(r)) for i, r in enumerate(by_hand.rates(BAR, 2, 5))]


@pytest.mark.parametrize("log", [False, True])
def test_a_reporter_that_comes_first_is_named(log, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path, SsPropCallback(BAR, log=log), epochs=1, report_to="tensorboard")
    told = [str(w.message) for w in caught if "will not show ssprop/drop_rate" in str(w.message)]
    assert len(told) == log and all("tensorboard" in t and ".add_to(trainer)" in t for t in told)


def test_no_log_where_none_is_wanted(tmp_path):
    _, _, run = train(tmp_path, SsPropCallback(BAR, log=False), epochs=1)
    assert not any("ssprop/drop_rate" in entry for entry in run.state.log_history)


@pytest.mark.parametrize("revert", [False, True])
def test_the_end_of_a_training(revert, tmp_path):
    model, _, run = train(tmp_path, SsPropCallback(BAR, revert_at_end=revert))
    assert ssp.is_converted(model) is not revert
    run.save_model(str(tmp_path / "end"))
    plain = ResNetForImageClassification.from_pretrained(tmp_path / "end", dtype=torch.float64)
    by_hand.assert_same(plain, model)


def test_a_model_that_is_not_converted_and_no_schedule(tmp_path):
    with pytest.raises(ValueError, match="is not converted: give the callback a schedule"):
        train(tmp_path, SsPropCallback())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"exlude": "stem"}, TypeError, "exlude"),
        ({"schedule": 80}, ValueError, "0.8"),
        ({"schedule": 0.5, "controller": ssp.SparsityController(0.5)}, ValueError, "controller"),
    ],
)
def test_wrong_arguments_fail_at_once(arguments, error, text):
    with pytest.raises(error, match=text):
        SsPropCallback(**arguments)
