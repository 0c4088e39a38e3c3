"""Training loops of other libraries: the rate follows the optimizer's steps, or is told them."""

import pytest
import torch
from torch import nn

import ssprop_patch as ssp

from .common import RATE, batches, check_training, net


def by_step():
    """Sparse from the first step on, for which the controller has to be told of steps."""
    return ssp.LambdaSchedule(_constant, interval="step")


def _constant(t):
    return RATE


def test_skorch():
    skorch = pytest.importorskip("skorch", reason="pip install skorch")
    x = torch.cat([x for x, _ in batches()])
    y = torch.cat([y for _, y in batches()])

    def train(model):
        learner = skorch.NeuralNetClassifier(
            model,
            criterion=nn.CrossEntropyLoss,
            optimizer=torch.optim.SGD,
            lr=0.1,
            max_epochs=2,
            batch_size=4,
            train_split=None,
            iterator_train__shuffle=False,
            verbose=0,
        )
        learner.fit(x, y)
        assert learner.module_ is model

    model = check_training(train, schedule=by_step())
    assert ssp.get_controller(model).t == 6  # skorch steps with a closure


def test_ignite():
    engine = pytest.importorskip("ignite.engine", reason="pip install pytorch-ignite")

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        trainer = engine.create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss())
        trainer.run(batches(), max_epochs=2)

    assert ssp.get_controller(check_training(train, schedule=by_step())).t == 6


def test_ignite_tells_a_schedule_of_its_epochs():
    engine = pytest.importorskip("ignite.engine", reason="pip install pytorch-ignite")
    model = ssp.convert(net(), ssp.BarSchedule(0.8))
    optimizer, rates = torch.optim.SGD(model.parameters(), 0.1), []
    trainer = engine.create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss())

    @trainer.on(engine.Events.EPOCH_STARTED)
    def tell(trainer):
        ssp.get_controller(model).step(trainer.state.epoch - 1)
        rates.append(ssp.get_controller(model).drop_rate)

    trainer.run(batches(), max_epochs=4)
    assert rates == [0.0, 0.8, 0.0, 0.8]


@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree"])
def test_schedulefree(name):
    schedulefree = pytest.importorskip("schedulefree", reason="pip install schedulefree")

    def train(model):
        optimizer = getattr(schedulefree, name)(model.parameters(), lr=0.01)
        optimizer.train()
        for x, y in batches(7):  # RAdam begins with the sixth step
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        optimizer.eval()

    assert ssp.get_controller(check_training(train, schedule=by_step())).t == 7
