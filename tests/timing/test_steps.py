"""Taking turns, and whole training steps in seconds and joules."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

import ssprop_patch as ssp
from ssprop_patch import timing

from .networks import X, net


def test_quantiles_are_numpys():
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.0]
    expected = np.quantile(values, [0.2, 0.5, 0.8])
    assert timing.Quantiles.of(values) == pytest.approx(tuple(expected))


def test_each_side_runs_once_an_iteration_in_changing_order_and_the_warm_up_does_not_count():
    ran = []

    def side(name):
        def measure():
            ran.append(name)
            n = ran.count(name)
            return [1000.0 if n <= 2 else n, -n]  # the first two would show

        return measure

    before = random.getstate()
    taken = timing.alternate({name: side(name) for name in "abc"}, iterations=5, warmup=2)
    assert random.getstate() == before
    turns = ["".join(ran[i : i + 3]) for i in range(0, len(ran), 3)]
    assert len(turns) == 7 and all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) > 1
    for name in "abc":
        assert taken[name][0] == pytest.approx(tuple(np.quantile([3, 4, 5, 6, 7], [0.2, 0.5, 0.8])))
        assert taken[name][1].p50 == -5


def test_a_training_step_is_the_step_of_the_optimizer():
    model, x = net(), X
    by_hand = copy.deepcopy(model)
    for m in (model, by_hand):
        m.drop.p = 0.0
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, by_hand)]
    step = timing.training_step(lambda: model(x).square().mean(), optimizers[0], x.device)
    for _ in range(2):
        seconds = step()
        assert len(seconds) == len(timing.MODES) and seconds[0] + seconds[1] <= seconds[2]
        optimizers[1].zero_grad()
        by_hand(x).square().mean().backward()
        optimizers[1].step()
    for name, p in model.named_parameters():
        assert torch.equal(p, by_hand.get_parameter(name)), name


@pytest.mark.parametrize("rate_before", [None, 0.3])
def test_steps_are_dense_and_sparse_in_turns_and_the_model_stays(rate_before):
    model, rates = net(), []
    model.register_forward_pre_hook(
        lambda m, args: rates.append(ssp.get_controller(m).drop_rate if ssp.is_converted(m) else 0)
    )
    if rate_before is not None:
        ssp.convert(model, rate_before)
    before = {name: p.clone() for name, p in model.named_parameters()}
    rows = timing.time_steps(model, {"x": X}, 0.7, iterations=2)
    assert [row.mode for row in rows] == ["forward", "backward", "step"]
    assert all(0 < q.p20 <= q.p50 <= q.p80 for row in rows for q in (row.dense_s, row.sparse_s))
    assert sorted(rates) == [0] * 5 + [0.7] * 5  # with three warm-up rounds
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert ssp.is_converted(model) == (rate_before is not None)
    if rate_before is not None:
        assert ssp.get_controller(model).drop_rate == rate_before


def test_joules_are_those_of_a_step():
    model = net()

    class Counter:
        """Counts 2 J for each dense and 1 J for each sparse forward between begin and end."""

        joules, windows = None, 0

        def begin(self):
            assert self.joules is None
            self.joules, self.windows = 0.0, self.windows + 1

        def end(self):
            joules, self.joules = self.joules, None
            return {"GPU 0": joules * 0.75, "DRAM 0": joules * 0.25}

        def count(self, model, args):
            if self.joules is not None:
                self.joules += 1.0 if ssp.is_converted(model) else 2.0

    counter = Counter()
    model.register_forward_pre_hook(counter.count)
    joules = timing.joules_per_step(counter, model, X, 0.7, seconds=0.02)
    assert joules == pytest.approx({"dense": 2.0, "sparse": 1.0})
    assert counter.windows == 4 and counter.joules is None
