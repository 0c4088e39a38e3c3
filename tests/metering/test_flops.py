"""The FLOPs of a meter: against the closed form, and against torch's counter, as rates change."""

import pytest
import timm
import torch
from torch import nn

import ssprop_patch as ssp
from metering import by_hand
from metering.by_hand import (
    RATES,
    by_step,
    counted,
    layers_counted,
    quiet_meter,
    rate_at,
    train,
)


def test_a_run_whose_rate_changes_costs_what_the_closed_form_says():
    model = by_hand.net()
    expected = by_hand.by_summary(model, by_hand.batch(0), RATES)
    ssp.convert(model, by_step())
    with quiet_meter(model) as meter:
        train(model, len(RATES))
        assert counted(meter) == expected
        report = meter.report()
    assert (report.forward_flops, report.dense_backward_flops, report.backward_flops) == expected
    assert report.steps == len(RATES)
    saved = expected[1] - expected[2]
    assert report.backward_saved == saved / expected[1] > 0
    assert report.total_saved == saved / (expected[0] + expected[1])


def test_each_layer_costs_what_the_summary_says_of_it():
    model = timm.create_model("test_resnet", num_classes=5)
    x = torch.randn(2, 3, 32, 32)
    rates = (0.0, 0.8, 0.6)
    rows = [ssp.summary(model, inputs=x, drop_rate=rate).layers for rate in rates]
    schedule = ssp.LambdaSchedule(lambda t: rates[t % 3], interval="step")
    with quiet_meter(ssp.convert(model, schedule)) as meter:
        train(model, 3, call=lambda _: model(x))
        found = {layer.name: layer.totals for layer in meter.report().layers}
    assert set(found) == {row.name for row in rows[0]}
    for same in zip(*rows, strict=True):
        totals = found[same[0].name]
        assert totals.forward_flops == sum(row.forward for row in same)
        assert totals.dense_backward_flops == sum(row.dense_backward for row in same)
        assert totals.backward_flops == sum(row.sparse_backward for row in same)
        assert totals.kept == sum(row.kept for row in same)
        assert totals.channels == 3 * same[0].channels
        assert (totals.forwards, totals.backwards, totals.sparse) == (3, 3, 2)


def test_a_schedule_of_epochs_agrees_with_its_summary_on_a_whole_network():
    model = timm.create_model("test_resnet", num_classes=5)
    x, schedule, epochs, steps = torch.randn(2, 3, 32, 32), ssp.BarSchedule(0.8), 4, 2
    mean = ssp.summary(model, inputs=x, schedule=schedule, epochs=epochs)
    ssp.convert(model, schedule, steps_per_epoch=steps)
    with quiet_meter(model) as meter:
        train(model, epochs * steps, call=lambda _: model(x))
        assert counted(meter)[0] == mean.forward * epochs * steps
        assert meter.report().backward_saved == pytest.approx(mean.backward_saved, rel=1e-6)


def test_agrees_with_torchs_counter_as_the_rate_changes():
    model = by_hand.net()
    model[2] = nn.Conv2d(8, 12, 3, stride=2, bias=False).double()  # torch counts no bias
    outputs = [2 * 8 * 16 * 16, 2 * 12 * 7 * 7, 2 * 6 * 7 * 7]
    ssp.convert(model, by_step())
    with quiet_meter(model) as meter:
        by_torch = by_hand.by_torch(lambda: train(model, len(RATES)))
        by_torch -= len(RATES) * 3 * 2 * 2 * (6 * 7 * 7) * 5  # the classifier
        importance = sum(2 * sum(outputs) for rate in RATES if rate)
        forward, _, backward = layers_counted(meter)
        assert "TorchDispatchMode" in meter.report().unknown  # torch's: only one counts at a time
    assert forward + backward == by_torch + importance


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_layers_cost_what_the_closed_form_says(groups):
    model = by_hand.net(groups=groups)
    expected = by_hand.by_summary(model, by_hand.batch(0), RATES)
    with quiet_meter(ssp.convert(model, by_step())) as meter:
        train(model, len(RATES))
        assert counted(meter) == expected


def test_linear_and_transposed_layers_cost_what_the_closed_form_says():
    types = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 3, 2), nn.Flatten(), nn.Linear(6 * 841, 10)
    ).double()
    x = by_hand.batch(0)
    parts = [ssp.summary(model, inputs=x, drop_rate=rate, types=types) for rate in RATES]
    ssp.convert(model, by_step(), types=types)
    with quiet_meter(model) as meter:
        train(model, len(RATES))
        assert [row.name for row in meter.report().layers] == ["0", "1", "3"]
        assert counted(meter) == (
            sum(p.forward for p in parts),
            sum(p.dense_backward for p in parts),
            sum(p.sparse_backward for p in parts),
        )


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 3, 16, 16)])
def test_batched_and_unbatched_inputs(shape):
    model = nn.Conv2d(3, 8, 3).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = by_hand.by_summary(model, x, [0.5])
    with quiet_meter(ssp.convert(model, 0.5)) as meter:
        by_hand.gradients(model, x)
        assert counted(meter) == expected
        assert meter.kept == {"(model)": (4, 8)}


def test_images_of_ever_new_sizes_are_counted_and_the_notes_stay_few():
    model = ssp.convert(nn.Conv2d(3, 8, 3).double(), 0.5)
    dense = nn.Conv2d(3, 8, 3).double()
    sizes = range(5, 25)
    expected = [by_hand.by_summary(dense, by_hand.batch(0, size=n), [0.5]) for n in sizes]
    with quiet_meter(model) as meter:
        record = meter._records["(model)"]
        record._ENOUGH = 7
        for n in sizes:
            by_hand.gradients(model, by_hand.batch(0, size=n))
            assert len(record._calls) < 7
        assert counted(meter) == tuple(map(sum, zip(*expected, strict=True)))


def test_a_summary_of_a_metered_model_is_no_run():
    model = ssp.convert(by_hand.net(), 0.5)
    with quiet_meter(model) as meter:
        train(model, 2)
        before = counted(meter), meter.report().layers
        of_metered = ssp.summary(model, inputs=by_hand.batch(0))
        assert (counted(meter), meter.report().layers) == before
        assert meter.report().seconds.keys() == {"forward", "backward", "optimizer"}
    assert of_metered.layers == ssp.summary(model, inputs=by_hand.batch(0)).layers


def test_the_channels_kept_latest_are_those_of_the_rate():
    model = ssp.convert(by_hand.net(), by_step(), overrides={"4": 0.9})
    with quiet_meter(model) as meter:
        assert meter.kept == {}
        for t in range(len(RATES)):
            train(model, 1, start=t)
            rate = rate_at(t)
            k = max(1, int((1 - rate) * 8 + 0.5)), max(1, int((1 - rate) * 12 + 0.5))
            assert meter.kept == {"0": (k[0], 8), "2": (k[1], 12), "4": (1 if rate else 6, 6)}
