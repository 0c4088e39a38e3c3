"""The comparison itself: it holds for an ordinary loop, and breaks where a training is wrong."""

import copy

import pytest

import ssprop_patch as ssp

from .by_hand import (
    assert_same,
    by_step,
    compare,
    falling,
    net,
    ordinary,
    run,
    run_by_hand,
    tiny,
)

NETS = [
    "test_resnet",
    "test_efficientnet",
    "test_convnext",
    "test_nfnet",
    "test_byobnet",
    "test_mambaout",
]


@pytest.mark.parametrize("name", NETS)
def test_an_ordinary_loop(name):
    compare(lambda: net(name), lambda m: ordinary(m, 4), steps=4)


def test_an_ordinary_loop_with_every_kind_of_convolution():
    compare(tiny, ordinary)


@pytest.mark.parametrize("name", ["test_resnet", "test_nfnet"])
def test_with_the_kernel_of_the_oracle_a_training_is_equal_bit_for_bit(name):
    compare(lambda: net(name), ordinary, exact=True)


def one_late(t):
    return falling(max(t - 1, 0))


WRONG = {
    "not converted": lambda m: m,
    "always sparse": lambda m: ssp.convert(m, 0.75),
    "one step behind": lambda m: ssp.convert(m, ssp.LambdaSchedule(one_late, interval="step")),
    "one layer dense": lambda m: ssp.convert(m, by_step(), exclude="conv_stem"),
    "another choice": lambda m: ssp.convert(m, by_step(), selection="random"),
    "in eval": lambda m: ssp.convert(m, by_step()).eval(),
}


@pytest.mark.parametrize("convert", WRONG.values(), ids=WRONG)
def test_the_comparison_sees_a_wrong_training(convert):
    plain = net("test_efficientnet")
    model = convert(copy.deepcopy(plain))
    expected = run_by_hand(plain, ordinary)
    with pytest.raises(AssertionError):
        assert_same(run(model, ordinary), expected)
