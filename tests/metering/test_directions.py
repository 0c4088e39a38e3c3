"""A meter on directions and the remainder: what ran, refreshes among it."""

import pytest
import torch
from patching.by_reference import TYPES, images, loss, make

import ssprop_patch as ssp
from metering.by_hand import quiet_meter

RULES = {
    "coarse": {"remainder": "coarse"},
    "principal": {"selection": "principal"},
    "both": {"selection": "principal", "remainder": "coarse"},
}


def train(model, passes, inputs):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(passes):
        loss(model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("rule", RULES)
def test_a_meter_counts_what_a_summary_says(rule):
    """Of 40 passes 8 refresh, at 0, 1, 2, 4, 8, 12 and 20: the summary's mean is one in 20."""
    how, inputs = RULES[rule], images()
    expected = ssp.summary(make(), inputs=inputs, types=TYPES, drop_rate=0.7, **how)
    model = ssp.convert(make(), 0.7, types=TYPES, **how)
    assert ssp.summary(model, inputs=inputs).sparse_backward == expected.sparse_backward
    rows = {row.name: row for row in expected.layers}
    with quiet_meter(model) as meter:
        train(model, 40, inputs)
        found = {layer.name: layer.totals for layer in meter.report().layers}
    assert found.keys() == rows.keys()
    for name, totals in found.items():
        row = rows[name]
        assert totals.forward_flops == 40 * row.forward
        assert totals.dense_backward_flops == 40 * row.dense_backward
        assert (totals.backwards, totals.channels) == (40, 40 * row.channels)
        if rule == "coarse" or name == "depthwise":
            assert totals.backward_flops == 40 * row.sparse_backward
            continue
        more = totals.backward_flops / (40 * row.sparse_backward)
        assert 1 < more < 1.25, name  # 7 refreshes instead of 2
        assert totals.sparse == 40


def test_refreshes_and_what_is_between_them():
    model = ssp.convert(make(), 0.7, types=TYPES, **RULES["both"])
    costs = []
    with quiet_meter(model) as meter:
        for number in range(10):
            before = meter.totals.backward_flops
            loss(model, images(number)).backward()
            costs.append(meter.totals.backward_flops - before)
    refreshed = {costs[n] for n in (0, 1, 2, 4, 8)}
    usual = {costs[n] for n in (3, 5, 6, 7, 9)}
    assert len(refreshed) == len(usual) == 1 and refreshed.pop() > usual.pop()


def test_energy_counts_the_directions_that_it_took():
    settings = ssp.Principal(energy=0.999999)
    model = ssp.convert(make(), 0.9, types=TYPES, selection=settings)
    fewer = ssp.convert(make(), 0.9, types=TYPES, selection="principal")
    costs = []
    for one in (model, fewer):
        with quiet_meter(one) as meter:
            train(one, 4, images())
            costs.append(meter.totals.backward_flops)
            kept = meter.kept["stem"]
    assert costs[0] > costs[1] and kept == (2, 16)


def test_channels_of_layers_that_keep_some_are_counted():
    model = ssp.convert(make(), 0.7, types=TYPES, **RULES["both"])
    with quiet_meter(model, channels_every=2) as meter:
        train(model, 2, images())
        assert meter.channels is not None
        meter.report()
