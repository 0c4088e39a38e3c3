"""Converting, reverting and copying compiled models, and rates for a while."""

import copy

import oracle
import pytest
import torch

import ssprop_patch as ssp

from .compiled import assert_as_eager, assert_same, few, images, sparse_layers, step


def test_convert_and_revert_after_compile():
    model = few()
    dense = step(model, model)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(step(call, model), dense)
    ssp.convert(call, schedule=0.8)
    assert_as_eager(call, model)
    assert sparse_layers(model)
    ssp.revert(call)
    assert not ssp.is_converted(call)
    assert_same(step(call, model), dense)
    assert not sparse_layers(model)
    ssp.convert(model, schedule=0.5)
    assert_as_eager(call, model)
    assert model.stem.weight.grad.flatten(1).any(1).sum() == 8


def test_convert_again_with_other_arguments():
    model = ssp.convert(few(), schedule=0.8)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    step(call, model)
    for arguments in (
        {"schedule": 0.25},
        {"schedule": 0.8, "selection": "l2"},
        {"schedule": 0.8, "exclude": ["own"]},
    ):
        ssp.convert(model, **arguments)
        assert_as_eager(call, model)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_backward_after_revert_is_still_right(compiled):
    model = few()
    with oracle.network(model, 0.8):
        expected = step(model, model)
    ssp.convert(model, schedule=0.8)
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    y = call(images())
    ssp.revert(model)
    model.zero_grad()
    y.square().sum().backward()
    assert_same([p.grad for p in model.parameters()], expected[1:])


def test_two_models_of_one_class_keep_their_own_rates():
    models = [ssp.convert(few(), schedule=rate) for rate in (0.25, 0.75)]
    calls = [torch.compile(m, backend="aot_eager", fullgraph=True) for m in models]
    for _ in range(2):
        for call, model, kept in zip(calls, models, (12, 4), strict=True):
            assert_as_eager(call, model)
            step(call, model)
            assert model.stem.weight.grad.flatten(1).any(1).sum() == kept


def test_a_deepcopy_of_a_compiled_model_has_its_own_rate():
    call = torch.compile(ssp.convert(few(), schedule=0.75), backend="aot_eager", fullgraph=True)
    step(call, call)
    other = copy.deepcopy(call)
    ssp.get_controller(other).drop_rate = 0.25
    for one, kept in ((call, 4), (other, 12)):
        step(one, one)
        assert one._orig_mod.stem.weight.grad.flatten(1).any(1).sum() == kept


def test_temporary_rates_around_a_compiled_step():
    model = ssp.convert(few(), schedule=0.8)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    with ssp.dense(model):
        assert_as_eager(call, model)
        assert not sparse_layers(model)
        with ssp.sparsity(model, 0.5):
            assert_as_eager(call, model)
            assert model.stem.weight.grad.flatten(1).any(1).sum() == 8
    step(call, model)
    assert model.stem.weight.grad.flatten(1).any(1).sum() == 3
