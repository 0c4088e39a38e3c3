"""Tools that count or time what a network does, with a converted one.

What a counter knows a layer by decides: by its exact class, and a converted layer is unknown; by
the functions it calls, and nothing differs.
"""

import copy
import warnings

import fvcore.nn
import ptflops
import pytest
import thop
import torch
import torchinfo
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import ssprop_patch as ssp

from .networks import assert_equal, assert_trains_sparsely, gradients, images, small

RATE = 0.5
SIZE = (2, 3, 8, 8)


def convolutions(model):
    return {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}


# --- known by class: revert first ---------------------------------------------------------------


def by_thop(model):
    return thop.profile(model, (torch.zeros(SIZE),), verbose=False)


def by_ptflops(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ptflops.get_model_complexity_info(
            model, SIZE[1:], as_strings=False, print_per_layer_stat=False, backend="pytorch"
        )


@pytest.mark.parametrize("count", [by_thop, by_ptflops])
def test_counters_that_know_layers_by_class_need_revert(count):
    model = ssp.convert(small(torch.float32), RATE)
    operations, _ = count(copy.deepcopy(model))
    expected = count(small(torch.float32))
    assert 0 < operations < expected[0]  # without a word: this is why to revert
    assert count(ssp.revert(model)) == expected


def test_thop_may_be_told_the_classes():
    hooks = thop.vision.basic_hooks
    known = {nn.Conv2d: hooks.count_convNd, nn.BatchNorm2d: hooks.count_normalization}

    def counted(model):
        of_class = {
            type(m): count
            for m in model.modules()
            for base, count in known.items()
            if isinstance(m, base)
        }
        return thop.profile(model, (torch.zeros(SIZE),), of_class, verbose=False)

    plain, model = small(torch.float32), ssp.convert(small(torch.float32), RATE)
    assert counted(plain) == counted(model)


def test_thop_forgets_its_buffers_in_layers_it_does_not_know():
    """Whatever they are: converted ones are among them, so count a copy, or revert first."""
    plain, model = small(torch.float32), ssp.convert(small(torch.float32), RATE)
    for m, unknown in ((plain, {"own"}), (model, convolutions(model))):
        by_thop(m)
        left = {name.removesuffix(".total_ops") for name in m.state_dict() if "total_ops" in name}
        assert left & convolutions(m) == unknown


@pytest.mark.parametrize("count", [by_thop, by_ptflops])
def test_a_count_does_not_disturb_the_training(count):
    model = ssp.convert(small(torch.float32), RATE)
    count(model)
    assert_trains_sparsely(model.double(), small, images(), RATE)


# --- known by what is called: works -------------------------------------------------------------


def by_fvcore(model):
    analysis = fvcore.nn.FlopCountAnalysis(model, torch.zeros(SIZE))
    analysis.unsupported_ops_warnings(False)
    activations = fvcore.nn.ActivationCountAnalysis(model, torch.zeros(SIZE))
    activations.unsupported_ops_warnings(False)
    return (
        analysis.by_module(),
        analysis.by_operator(),
        activations.by_module(),
        fvcore.nn.parameter_count(model),
        fvcore.nn.flop_count_table(analysis),
    )


def by_ptflops_aten(model):
    return ptflops.get_model_complexity_info(
        model, SIZE[1:], as_strings=False, print_per_layer_stat=False, backend="aten"
    )


def by_torchinfo(model):
    return str(
        torchinfo.summary(
            model,
            SIZE,
            verbose=0,
            mode="train" if model.training else "eval",
            depth=5,
            col_names=("input_size", "output_size", "num_params", "kernel_size", "mult_adds"),
        )
    )


def by_torch(model):
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(SIZE))
    return counter.get_flop_counts()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("count", [by_fvcore, by_ptflops_aten, by_torchinfo, by_torch])
def test_counters_that_look_at_calls_count_a_converted_model_as_the_plain_one(count, train):
    plain = small(torch.float32).train(train)
    model = ssp.convert(copy.deepcopy(plain), RATE)
    expected = count(plain)
    assert count(model) == expected
    assert_trains_sparsely(model.double(), small, images(), RATE)


# --- the clock ----------------------------------------------------------------------------------


def events(model, x):
    with profile(activities=[ProfilerActivity.CPU], with_stack=True) as p:
        found = gradients(model, x)
    return found, {row.key: row.count for row in p.key_averages()}


def test_the_profiler_names_the_sparse_backward_and_disturbs_nothing():
    x, model = images(), ssp.convert(small(), RATE)
    expected = gradients(model, x)
    found, count = events(model, x)
    assert_equal(found, expected)
    assert any("SparseConvBackward" in name for name in count)
    assert "ConvolutionBackward0" not in count

    _, count = events(ssp.revert(model), x)
    assert count["ConvolutionBackward0"] == len(convolutions(model))
    assert not any("Sparse" in name for name in count)
