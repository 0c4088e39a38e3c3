"""What the zoo's check is made of: its oracle, its weights, its FLOPs."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import count, models, weights
from zoo import oracle as zoo_oracle


def test_both_oracles_agree(double):
    layers = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, groups=3), nn.Conv2d(12, 12, 3, groups=12)
    model, x = nn.Sequential(*layers), torch.randn(2, 3, 9, 9)

    def gradients(context):
        model.zero_grad()
        with context as record:
            y = model(x)
        y.pow(3).sum().backward()
        return [p.grad for p in model.parameters()], record

    one, mine = gradients(zoo_oracle.network(model, 0.6))
    two, theirs = gradients(oracle.network(model, 0.6))
    assert all(map(torch.equal, one, two))
    assert mine.calls == theirs.calls == 3
    assert mine.gap == theirs.gap > 0


def test_large_draws_are_left_out_and_then_every_parameter_has_a_value():
    def make():
        model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300), nn.Linear(300, 8))
        nn.init.zeros_(model[1].weight)
        return model

    state = torch.get_rng_state()
    with weights.LeaveOutLargeDraws():
        nn.Linear(300, 300, bias=False)
        left_out = torch.full((300, 300), 1e3).normal_()
    assert torch.equal(torch.get_rng_state(), state)  # not one number was drawn
    assert not left_out.any()  # not what was there before: some draw until all are small enough
    one, two = (models.build(seed, make) for seed in (0, 1))
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert p.isfinite().all() and (p != 0).all() and not torch.equal(p, q)
    assert one[0].weight.std().item() == pytest.approx((2 / 300) ** 0.5, rel=0.02)
    assert one[1].weight.min() > 0.5 and one[1].weight.max() < 1.5


def test_no_two_rows_of_a_weight_repeat_each_other():
    layer = models.build(0, nn.Linear, 1024, 2048)
    rows = layer.weight.detach()[:, :8]
    assert len(torch.unique(rows, dim=0)) == 2048


def test_shares_are_those_of_torchs_counter():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 1, 1),
        nn.Conv2d(1, 8, 3, bias=False),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    x = torch.randn(2, 3, 16, 16)
    shares = count.shares(model, (x,))
    with FlopCounterMode(display=False) as counter:
        y = model(x)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    # The layer with one channel stays dense; of biases torch counts nothing.
    sparse = [2 * 2 * 14 * 14 * 8 * 27, 2 * 2 * 12 * 12 * 8 * 9]
    biases = 2 * 14 * 14 * 8
    backward = sparse[0] + 2 * sparse[1] + biases
    all_backward = counter.get_total_flops() + biases + 2 * 14 * 14
    assert shares.backward == pytest.approx(backward / all_backward)
    assert shares.step == pytest.approx((sum(sparse) + backward) / (forward + all_backward))
