"""``align``: the number of kept channels rounded up, where it is asked for."""

import copy

import oracle
import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch.core.selection import kept_channels


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 20, 3),
        nn.BatchNorm2d(20),
        nn.ReLU(),
        nn.Conv2d(20, 24, 3, groups=2),
        nn.Tanh(),
        nn.Conv2d(24, 6, 1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6 * 25, 10),
    ).double()


def images():
    return torch.randn(4, 3, 9, 9, dtype=torch.double)


def gradients(model, x, call=None):
    model.zero_grad(set_to_none=True)
    (call or model)(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def kept_rows(model):
    """How many rows of each convolution's weight have a gradient."""
    return [
        int(m.weight.grad.flatten(1).any(1).sum())
        for m in model.modules()
        if isinstance(m, nn.Conv2d)
    ]


@pytest.mark.parametrize("channels", [1, 6, 64, 100])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8, 0.99])
@pytest.mark.parametrize("align", [1, 4, 8, 16, 1000])
def test_the_number_is_the_next_multiple(channels, rate, align):
    k, plain = kept_channels(channels, rate, align), kept_channels(channels, rate)
    assert k == min(channels, min(n for n in range(0, 10**4, align) if n >= plain))


def test_the_gradient_is_that_of_so_many_channels():
    # 4 of 20 become 8; 2 of each 12 become 8; 1 of 6 all of them: dense.
    model, x = net(), images()
    dense = copy.deepcopy(model)
    ssp.convert(model, 0.8, align=8)
    got = gradients(model, x)
    assert kept_rows(model) == [8, 16, 6]
    rates = {dense[0]: 1 - 8 / 20, dense[3]: 1 - 8 / 12, dense[5]: 0.0}
    expected = oracle_gradients(dense, rates, x)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def oracle_gradients(model, rates, x):
    handles = []
    for layer, rate in rates.items():

        def mask(module, args, y, rate=rate):
            y.register_hook(lambda dy: oracle.mask(dy, oracle.choose(dy, module.groups, rate).keep))

        handles.append(layer.register_forward_hook(mask))
    # dW and db of a masked dy; dX is what goes on to the layer before.
    return gradients(model, x)


def test_compiled_too():
    model, x = ssp.convert(net(), 0.8, align=8), images()
    eager = gradients(model, x)
    compiled = gradients(model, x, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert kept_rows(model) == [8, 16, 6]
    for one, two in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_the_reports_say_the_true_rate():
    model, x = net(), images()
    summary = ssp.summary(model, inputs=x, drop_rate=0.8, align=8)
    assert [row.kept for row in summary.layers] == [8, 16, 6]
    assert [row.drop_rate for row in summary.layers] == pytest.approx([0.6, 1 / 3, 0.0])
    assert "drop rate 0.8; kept channels rounded up to multiples of 8" in str(summary)
    assert "rounded" not in str(ssp.summary(model, inputs=x, drop_rate=0.8))
    ssp.convert(model, 0.8, align=8)
    assert ssp.summary(model, inputs=x).layers == summary.layers
    with ssp.Meter(model) as meter:
        gradients(model, x)
        report = meter.report()
    assert report.backward_flops == summary.sparse_backward
    unaligned = ssp.summary(model, inputs=x, align=1)
    assert [row.kept for row in unaligned.layers] == [4, 4, 1]


def test_over_a_schedule_the_rate_is_the_mean_of_the_true_ones():
    schedule = ssp.BarSchedule(0.8, period=2)
    row = ssp.summary(net(), inputs=images(), schedule=schedule, epochs=4, align=8).layers[0]
    assert row.drop_rate == pytest.approx(0.3)


def test_a_measured_plan_times_aligned_layers(monkeypatch):
    from ssprop_patch.timing import layers

    seen, real = [], layers.convert
    monkeypatch.setattr(
        layers,
        "convert",
        lambda *args, **kwargs: seen.append(kwargs["align"]) or real(*args, **kwargs),
    )
    ssp.plan(net(), inputs=images(), measure=True, align=8, iterations=1)
    assert set(seen) == {8}


def test_copies_keep_it():
    model, x = ssp.convert(net(), 0.8, align=8), images()
    gradients(twin := copy.deepcopy(model), x)
    assert kept_rows(twin) == [8, 16, 6]


@pytest.mark.parametrize(
    "align, error",
    [(0, ValueError), (-8, ValueError), (1.5, TypeError), (True, TypeError), ("8", TypeError)],
)
def test_what_is_no_count_is_refused_before_anything_is_changed(align, error):
    model = net()
    with pytest.raises(error, match="align must be an integer >= 1"):
        ssp.convert(model, 0.8, align=align)
    assert not ssp.is_converted(model)
    with pytest.raises(error, match="align must be an integer >= 1"):
        ssp.summary(model, inputs=images(), align=align)
