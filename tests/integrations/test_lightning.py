"""Lightning: whole fits against the same training by hand, logging, wrong uses."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import Logger

import ssprop_patch as ssp
from ssprop_patch.integrations.lightning import SsPropCallback

from . import by_hand
from .by_hand import BAR, Net, by_step, data
from .in_lightning import Module, fit, loader, reference, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:lightning", "ignore:.*LeafSpec", "error:the training goes on at step"
)


class Manual(Module):
    """The same training, with the step in the module's own hands."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Late(Module):
    """Makes its network when the trainer asks for it."""

    def __init__(self):
        pl.LightningModule.__init__(self)
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Net()


class Unsized(torch.utils.data.IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Recorder(Logger):
    def __init__(self):
        super().__init__()
        self.logged = []

    name, version = "recorder", 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, metrics))


# --- a whole fit --------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [BAR, by_step()], ids=["epochs", "steps"])
@pytest.mark.parametrize("module", [Module, Manual, Late])
def test_a_fit_is_the_training_by_hand(module, schedule):
    expected, rates = reference(schedule)
    model = module()
    model.configure_model()
    seen = by_hand.watch(model.net)
    trainer(SsPropCallback(schedule)).fit(model, loader())
    assert seen == rates
    by_hand.assert_close(model.net, expected)


@pytest.mark.parametrize("schedule", [BAR, by_step()], ids=["epochs", "steps"])
def test_gradient_accumulation_whose_last_step_of_an_epoch_is_shorter(schedule):
    model = Module()
    seen = by_hand.watch(model.net)
    trainer(SsPropCallback(schedule), accumulate_grad_batches=2).fit(model, loader(5))
    rates = by_hand.rates(schedule, 4, 3)
    passes = [2, 2, 1] * 4
    assert seen == [rate for rate, n in zip(rates, passes, strict=True) for _ in range(n)]
    # Lightning divides by 2 in the shorter step, too.
    expected = Net()
    optimizer = by_hand.sgd(expected)
    for group, rate in zip(by_hand.steps(data(5), 4, 2), rates, strict=True):
        share = len(group) / 2

        def loss_of(x, y, share=share):
            return F.cross_entropy(expected(x), y) * share

        by_hand.train(expected, [group], [rate], optimizer, loss_of)
    by_hand.assert_close(model.net, expected)


def test_epochs_of_a_loader_without_a_length():
    expected, rates = reference(BAR)
    model = Module()
    seen = by_hand.watch(model.net)
    unsized = torch.utils.data.DataLoader(Unsized(data()), batch_size=None)
    trainer(SsPropCallback(BAR)).fit(model, unsized)
    assert seen == rates
    by_hand.assert_close(model.net, expected)


class ShortEpochs(Module):
    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            return -1  # the rest of the epoch is skipped


def test_epochs_that_end_early_are_epochs():
    model = ShortEpochs()
    seen = by_hand.watch(model.net)
    trainer(SsPropCallback(BAR)).fit(model, loader(5))
    assert seen == [0, 0, 0.6, 0.6] * 2


def test_epochs_of_fewer_batches():
    expected, rates = reference(BAR, data(5)[:3])
    model = Module()
    seen = by_hand.watch(model.net)
    trainer(SsPropCallback(BAR), limit_train_batches=3).fit(model, loader(5))
    assert seen == rates
    by_hand.assert_close(model.net, expected)


def test_arguments_of_the_conversion():
    model = Module()
    callback = SsPropCallback(exclude="net.depthwise", overrides={"last": 0.25})
    trainer(callback, epochs=2).fit(model, loader())
    rows = {
        name: int(conv.weight.grad.flatten(1).ne(0).any(1).sum())
        for name, conv in model.net.named_modules()
        if isinstance(conv, torch.nn.Conv2d)
    }
    assert ssp.get_controller(model).schedule == ssp.BarSchedule(0.8, period=2)
    assert rows == {"stem": 2, "depthwise": 8, "last": 9}


def test_a_schedule_may_be_a_text():
    model = Module()
    seen = by_hand.watch(model.net)
    trainer(SsPropCallback("BarSchedule(0.6)"), epochs=2).fit(model, loader())
    assert seen == by_hand.rates(BAR, 2, 5)


def test_a_drop_rate_in_place_of_a_schedule():
    model = Module()
    trainer(SsPropCallback(drop_rate=0.6), epochs=1).fit(model, loader())
    assert ssp.get_controller(model).schedule == ssp.ConstantSchedule(0.6)


def test_a_controller_that_is_given():
    controller, model = ssp.SparsityController(by_step()), Module()
    trainer(SsPropCallback(controller=controller), epochs=1).fit(model, loader())
    assert ssp.get_controller(model) is controller and controller.t == 5


class Validated(Module):
    def validation_step(self, batch, batch_idx):
        with torch.enable_grad(), torch.inference_mode(False):
            x, y = (t.clone() for t in batch)
            loss = F.cross_entropy(self.net(x), y)
            gradients = torch.autograd.grad(loss, self.net.stem.weight)
        self.rows.append(int(gradients[0].flatten(1).ne(0).any(1).sum()))


def test_validation_is_dense():
    model = Validated()
    model.rows = []
    trainer(SsPropCallback(0.6), inference_mode=False).fit(model, loader(), loader(1))
    assert model.rows == [8] * 5  # the sanity check before the training, and four epochs


# --- several optimizers -------------------------------------------------------------------------


class Gan(pl.LightningModule):
    """A generator and its critic: every batch both step, the critic first."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.generator, self.critic = torch.nn.Conv2d(3, 3, 3, padding=1).double(), Net()

    def critic_loss(self, x, y):
        return F.cross_entropy(self.critic(self.generator(x).detach()), y)

    def generator_loss(self, x, y):
        return -F.cross_entropy(self.critic(self.generator(x)), y)

    def training_step(self, batch, batch_idx):
        for optimizer, loss_of in zip(
            self.optimizers(), [self.critic_loss, self.generator_loss], strict=True
        ):
            optimizer.zero_grad()
            self.manual_backward(loss_of(*batch))
            optimizer.step()

    def configure_optimizers(self):
        return by_hand.sgd(self.critic), by_hand.sgd(self.generator)


def gan():
    torch.manual_seed(0)
    return Gan()


def test_two_optimizers_over_epochs_are_the_training_by_hand():
    model, expected = gan(), gan()
    trainer(SsPropCallback(BAR)).fit(model, loader(3))
    optimizers = expected.configure_optimizers()
    losses = expected.critic_loss, expected.generator_loss
    for epoch in range(4):
        for batch in data(3):
            for optimizer, loss_of in zip(optimizers, losses, strict=True):
                by_hand.train(expected, [[batch]], [BAR(epoch)], optimizer, loss_of)
    by_hand.assert_close(model, expected)


def test_two_optimizers_count_one_step_an_iteration():
    model = gan()
    fit = trainer(SsPropCallback(by_step()), epochs=2)
    fit.fit(model, loader(3))
    assert fit.global_step == 12  # Lightning counts each optimizer's
    assert ssp.get_controller(model).t == 6


# --- a model that is converted already ----------------------------------------------------------


def test_a_converted_module_is_told_the_epochs():
    expected, rates = reference(BAR)
    model = Module()
    ssp.convert(model, BAR)
    controller, seen = ssp.get_controller(model), by_hand.watch(model.net)
    trainer(SsPropCallback()).fit(model, loader())
    assert ssp.get_controller(model) is controller and seen == rates
    by_hand.assert_close(model.net, expected)


def test_steps_per_epoch_of_a_conversion_rule():
    model = Module()
    ssp.convert(model, BAR, steps_per_epoch=2)
    seen = by_hand.watch(model.net)
    trainer(SsPropCallback(), epochs=2).fit(model, loader(4))
    assert seen == [0, 0, 0.6, 0.6] * 2


def test_without_any_callback_the_steps_are_counted():
    expected, rates = reference(BAR)
    model = Module()
    ssp.convert(model, BAR, steps_per_epoch=5)
    seen = by_hand.watch(model.net)
    trainer().fit(model, loader())
    assert seen == rates
    by_hand.assert_close(model.net, expected)


# --- logging, the end, wrong uses ---------------------------------------------------------------


@pytest.mark.parametrize("schedule", [BAR, by_step()], ids=["epochs", "steps"])
def test_the_log_shows_the_rate_of_every_step(schedule):
    recorder = Recorder()
    trainer(SsPropCallback(schedule), epochs=2, logger=recorder, log_every_n_steps=1).fit(
        Module(), loader()
    )
    logged = [(s, m["ssprop/drop_rate"]) for s, m in recorder.logged if "ssprop/drop_rate" in m]
    assert [step for step, _ in logged] == list(range(10))
    assert [rate for _, rate in logged] == pytest.approx(by_hand.rates(schedule, 2, 5))


@pytest.mark.parametrize("arguments", [{"log": False}, {"barebones": True}])
def test_no_log_where_none_is_wanted(arguments):
    run = trainer(
        SsPropCallback(0.5, log=arguments.get("log", True)),
        epochs=1,
        **{name: value for name, value in arguments.items() if name != "log"},
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*self.log")
        run.fit(Module(), loader())
    assert run.logged_metrics == {}


@pytest.mark.parametrize("revert", [False, True])
def test_the_end_of_a_fit(revert, tmp_path):
    model, _, run = fit(tmp_path, SsPropCallback(BAR, revert_at_end=revert))
    assert ssp.is_converted(model) is not revert
    run.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    plain = Module()
    plain.load_state_dict(saved["state_dict"])
    by_hand.assert_same(plain, model)
    assert saved["callbacks"]["SsPropCallback"]["t"] == 3


def test_a_module_that_is_not_converted_and_no_schedule():
    with pytest.raises(ValueError, match="this Module is not converted: give the callback a sch"):
        trainer(SsPropCallback()).fit(Module(), loader())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"exlude": "stem"}, TypeError, "exlude"),
        ({"schedule": 80}, ValueError, "0.8"),
        ({"schedule": "BarSchedul(0.8)"}, ValueError, "did you mean BarSchedule"),
        ({"schedule": 0.5, "drop_rate": 0.5}, ValueError, "not both"),
        ({"steps_per_epoch": 0}, ValueError, "steps_per_epoch"),
        ({"schedule": 0.5, "controller": ssp.SparsityController(0.5)}, ValueError, "controller"),
    ],
)
def test_wrong_arguments_fail_at_once(arguments, error, text):
    with pytest.raises(error, match=text):
        SsPropCallback(**arguments)
