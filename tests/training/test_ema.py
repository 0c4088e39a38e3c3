"""Averages of the weights: timm's ModelEmaV3, torch's AveragedModel; made before and after."""

import copy

import pytest
import timm.utils
import torch
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import ssprop_patch as ssp

from .by_hand import assert_same, batch, by_step, loss_of, net, run, run_by_hand, sgd

AVERAGES = {
    "timm": lambda m: timm.utils.ModelEmaV3(m, decay=0.6),
    "timm warm-up, one by one": lambda m: timm.utils.ModelEmaV3(
        m, decay=0.6, use_warmup=True, foreach=False
    ),
    "timm without buffers": lambda m: timm.utils.ModelEmaV3(m, decay=0.6, exclude_buffers=True),
    "torch mean": AveragedModel,
    "torch ema": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.6)),
    "torch with buffers": lambda m: AveragedModel(m, use_buffers=True),
}
EACH_AVERAGE = pytest.mark.parametrize("make_average", AVERAGES.values(), ids=AVERAGES)


def update(average, model, step):
    if isinstance(average, AveragedModel):
        average.update_parameters(model)
    else:
        average.update(model, step=step)


def loop(average):
    def train(model):
        optimizer = sgd(model)
        for i in range(3):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            optimizer.step()
            update(average, model, i)
            yield {n: t.detach().clone() for n, t in average.module.state_dict().items()}

    return train


@pytest.mark.parametrize("when", ["before", "after"])
@EACH_AVERAGE
def test_the_average_of_a_converted_network(make_average, when):
    plain = net()
    model = copy.deepcopy(plain)
    if when == "before":
        average = make_average(model)
        ssp.convert(model, by_step())
    else:
        ssp.convert(model, by_step())
        average = make_average(model)
    assert list(average.module.state_dict()) == list(plain.state_dict())
    expected = run_by_hand(plain, loop(make_average(plain)))
    assert_same(run(model, loop(average)), expected)
    assert ssp.is_converted(average) == (when == "after")
    assert ssp.get_controller(model).t == 3
    if when == "after":  # it copied the controller as it was, and no optimizer is its own
        assert ssp.get_controller(average).t == 0


def trained(make_average):
    model = ssp.convert(net(), by_step())
    average = make_average(model)
    run(model, loop(average))
    return model, average


@EACH_AVERAGE
def test_the_state_of_an_average_goes_into_a_plain_network_and_back(make_average, tmp_path):
    _, average = trained(make_average)
    torch.save(average.state_dict(), tmp_path / "average.pt")
    state = torch.load(tmp_path / "average.pt", weights_only=True)
    plain = make_average(net())
    plain.load_state_dict(state)
    images = batch(5)[0]
    assert torch.equal(plain.module.eval()(images), average.module.eval()(images))
    again = make_average(ssp.convert(net(), by_step()))
    again.load_state_dict(plain.state_dict())
    assert torch.equal(again.module.eval()(images), average.module(images))


def test_update_bn_runs_dense_and_counts_nothing():
    model, average = trained(AveragedModel)
    plain = ssp.revert(copy.deepcopy(average))
    loader = [batch(i)[0] for i in range(4)]
    for a in (average, plain):
        update_bn(loader, a)
    for one, two in zip(average.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, two)
    assert (ssp.get_controller(average).t, ssp.get_controller(model).t) == (0, 3)


def test_stochastic_weight_averaging_to_its_end():
    def train(model):
        average, optimizer = AveragedModel(model), sgd(model)
        scheduler = SWALR(optimizer, 0.05, anneal_epochs=2)
        for i in range(3):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            optimizer.step()
            scheduler.step()
            average.update_parameters(model)
            yield
        update_bn([batch(i)[0] for i in range(2)], average)
        for p, q in zip(model.parameters(), average.module.parameters(), strict=True):
            p.data.copy_(q.data)
        for b, q in zip(model.buffers(), average.module.buffers(), strict=True):
            b.copy_(q)

    plain = net()
    model = ssp.convert(copy.deepcopy(plain), by_step())
    expected = run_by_hand(plain, train)
    assert_same(run(model, train), expected)


@EACH_AVERAGE
def test_model_and_average_are_reverted_and_set_apart_from_each_other(make_average):
    model, average = trained(make_average)
    with ssp.sparsity(model, 0.5):
        assert ssp.get_controller(average).drop_rate != 0.5
    ssp.revert(average)
    assert ssp.is_converted(model) and not ssp.is_converted(average)
    model, average = trained(make_average)
    ssp.revert(model)
    assert ssp.is_converted(average) and not ssp.is_converted(model)


def test_an_average_that_is_trained_on_counts_its_own_steps():
    model, average = trained(lambda m: timm.utils.ModelEmaV3(m, decay=0.6))
    student = average.module.train()
    student.requires_grad_(True)
    optimizer = sgd(student)
    for i in range(2):
        optimizer.zero_grad()
        loss_of(student, i).backward()
        optimizer.step()
    assert (ssp.get_controller(student).t, ssp.get_controller(model).t) == (2, 3)


def test_a_mean_teacher():
    """The average as a target in each step."""

    def train(model):
        teacher, optimizer = timm.utils.ModelEmaV3(model, decay=0.6), sgd(model, 0.01)
        for i in range(2):
            images, _ = batch(i)
            with torch.no_grad():
                target = teacher(images)
            optimizer.zero_grad()
            loss = loss_of(model, i) + (model(images) - target).square().mean()
            loss.backward()
            optimizer.step()
            teacher.update(model)
            yield target, loss.detach()

    plain = net()
    model = ssp.convert(copy.deepcopy(plain), by_step())
    expected = run_by_hand(plain, train)
    assert_same(run(model, train), expected)
