"""plan(measure=True): which layers pay."""

import copy

import pytest
import torch
from torch import nn

import ssprop_patch as ssp


def two_convolutions():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 1, 1))


def timed(monkeypatch, seconds, networks=(3.0, 2.0, 1.0)):
    """Make the timing return what is given.

    For layers ``seconds[name] = [(calls, dense, sparse)]``; for the whole network with none, those
    that pay alone, or all of them converted: ``networks``, in this order.
    """
    from ssprop_patch import timing
    from ssprop_patch.timing import measured_plan

    asked = {}

    def time_layers(model, inputs, drop_rate, *, types, filter_fn, **settings):
        rows = ssp.plan(model, types=types, filter_fn=filter_fn).converted
        asked.update(drop_rate=drop_rate, names=[row.name for row in rows], layers=settings)
        return [
            timing.LayerTime(
                row.name,
                "Conv2d",
                calls,
                (1, 3, 8, 8),
                (4, 3, 3, 3),
                (1, 4, 6, 6),
                timing.Quantiles(dense, dense, dense),
                timing.Quantiles(sparse, sparse, sparse),
                "gather",
            )
            for row in rows
            for calls, dense, sparse in seconds.get(row.name, ())
        ]

    def time_networks(model, inputs, choices, drop_rate, *, types, **settings):
        asked["networks"] = settings
        names = {m: name for name, m in model.named_modules()}
        asked["choices"] = {k: [names[m] for m in layers] for k, layers in choices.items()}
        ms = dict(zip(("none", "those that pay alone", "all"), networks, strict=True))
        return {choice: timing.Quantiles(*[ms[choice]] * 3) for choice in choices}

    monkeypatch.setattr(measured_plan, "time_layers", time_layers)
    monkeypatch.setattr(measured_plan, "time_networks", time_networks)
    return asked


def test_measured_says_which_layers_pay(monkeypatch):
    asked = timed(monkeypatch, {"0": [(1, 2.0, 1.0)], "1": [(1, 1.0, 0.98)]}, (3.0, 1.0, 2.0))
    model = two_convolutions()
    plan = ssp.plan(model, inputs=torch.randn(1, 3, 8, 8), drop_rate=0.7, measure=True)
    assert asked["drop_rate"] == 0.7 and asked["names"] == ["0", "1"]
    assert asked["choices"] == {"none": [], "those that pay alone": ["0"], "all": ["0", "1"]}
    assert [row.pays for row in plan] == [True, False, False]  # 0.98: may be chance
    lines = str(plan).splitlines()
    head = "name input weight dense ms sparse ms share kernel pays alone"
    assert lines[0].split() == head.split()
    assert lines[1].split() == [
        "0",
        "1x3x8x8",
        "4x3x3x3",
        "2.000",
        "1.000",
        "0.50",
        "gather",
        "yes",
    ]
    assert "one output channel" in lines[3]
    assert lines[-4] == "3 layers: 2 to convert, 1 left dense; 1 pays alone"
    assert lines[-3] == plan.where_the_flops_are()
    assert lines[-2].endswith("converted:")
    assert lines[-1] == (
        "  none 3.000 ms, those that pay alone 1.000 ms, all 2.000 ms; convert those that pay alone"
    )
    ssp.convert(model, filter_fn=plan.pays)
    assert [ssp.is_converted(m) for m in model] == [True, False, False]
    twin = ssp.convert(two_convolutions(), filter_fn=plan.pays)  # found by name
    assert [ssp.is_converted(m) for m in twin] == [True, False, False]


@pytest.mark.parametrize(
    ("networks", "best", "converted"),
    [
        ((3.0, 2.0, 1.0), "all", [True, True, False]),
        ((1.0, 0.995, 0.992), "none", [False] * 3),  # may be chance
        ((1.0, 0.98, 2.0), "those that pay alone", [True, False, False]),
        ((1.0, 2.0, 3.0), "none", [False] * 3),
    ],
)
def test_measured_the_whole_network_decides(monkeypatch, networks, best, converted):
    timed(monkeypatch, {"0": [(1, 2.0, 1.0)], "1": [(1, 1.0, 1.0)]}, networks)
    model = two_convolutions()
    plan = ssp.plan(model, inputs=torch.randn(1, 3, 8, 8), measure=True)
    assert plan.best.choice == best
    assert [plan.pays(m) for m in model] == converted
    if any(converted):
        ssp.convert(model, filter_fn=plan.pays)
    assert [ssp.is_converted(m) for m in model] == converted


@pytest.mark.parametrize("sparse", [0.5, 2.0])
def test_measured_no_choice_is_timed_twice(monkeypatch, sparse):
    asked = timed(monkeypatch, {"0": [(1, 1.0, sparse)], "1": [(1, 1.0, sparse)]})
    ssp.plan(two_convolutions(), inputs=torch.randn(1, 3, 8, 8), measure=True)
    assert asked["choices"] == {"none": [], "all": ["0", "1"]}


def test_measured_a_layer_pays_by_all_its_calls(monkeypatch):
    timed(monkeypatch, {"0": [(1, 10.0, 5.0), (9, 1.0, 1.9)], "1": [(1, 1.0, 1.5), (9, 1.0, 0.5)]})
    plan = ssp.plan(two_convolutions(), inputs=torch.randn(1, 3, 8, 8), measure=True)
    assert [row.pays for row in plan] == [False, True, False]
    assert "(9 times)" in str(plan)


def test_measured_leaves_out_what_stays_dense(monkeypatch):
    asked = timed(monkeypatch, {"1": [(1, 2.0, 1.0)]})
    plan = ssp.plan(two_convolutions(), exclude="^0$", inputs=torch.randn(1, 3, 8, 8), measure=True)
    assert asked["names"] == ["1"]
    assert [row.pays for row in plan] == [False, True, False]


def test_measured_as_it_will_be_converted(monkeypatch):
    asked = timed(monkeypatch, {"0": [(1, 2.0, 1.0)]})
    settings = dict(
        overrides={"^1$": 0.25},
        align=2,
        selection="l2",
        remainder="coarse",
        autocast=torch.bfloat16,
        iterations=7,
    )
    ssp.plan(two_convolutions(), inputs=torch.randn(1, 3, 8, 8), measure=True, **settings)
    given = [{**asked[what]} for what in ("layers", "networks")]
    assert all(callable(one.pop("progress")) for one in given)
    assert given == [settings, settings]


@pytest.mark.parametrize("progress", [True, False])
def test_how_far_it_has_come_is_shown_unless_it_is_not_wanted(monkeypatch, capsys, progress):
    """On no terminal: a line where more than half a minute has passed."""
    asked = timed(monkeypatch, {"0": [(1, 2.0, 1.0)]})
    monkeypatch.setattr("time.monotonic", iter(range(0, 10_000, 100)).__next__)
    inputs = torch.randn(1, 3, 8, 8)
    ssp.plan(two_convolutions(), inputs=inputs, measure=True, progress=progress)
    for what in ("layers", "networks"):
        asked[what]["progress"](1, 2)
    expected = "timing layers: 1 of 2\ntiming the whole network: 1 of 2\n"
    assert capsys.readouterr().err == (expected if progress else "")


@pytest.mark.parametrize("measure", [False, True])
def test_an_unknown_selection_is_an_error(monkeypatch, measure):
    timed(monkeypatch, {})
    inputs = torch.randn(1, 3, 8, 8) if measure else None
    with pytest.raises(ValueError, match="selection must be one of"):
        ssp.plan(two_convolutions(), inputs=inputs, measure=measure, selection="l3")


def test_measured_for_real():
    model = two_convolutions()
    before = copy.deepcopy(model.state_dict())
    plan = ssp.plan(model, inputs=torch.randn(2, 3, 8, 8), measure=True, iterations=1)
    assert [len(row.times) for row in plan] == [1, 1, 0]
    assert all(t.dense_ms.p50 > 0 and t.sparse_ms.p50 > 0 for row in plan for t in row.times)
    assert plan.networks[0].choice == "none" and not plan.networks[0].converted
    assert plan.networks[-1].choice == "all" and plan.networks[-1].converted == {"0", "1"}
    assert all(network.ms.p50 > 0 for network in plan.networks)
    assert sum(plan.pays(m) for m in model) == len(plan.best.converted)
    assert not ssp.is_converted(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_layer_without_a_gradient_does_not_pay():
    model = two_convolutions().requires_grad_(False)
    plan = ssp.plan(model, inputs=torch.randn(2, 3, 8, 8), measure=True, iterations=1)
    assert not any(row.pays for row in plan) and "needs no gradient" in str(plan)
    assert plan.best is None and not plan.networks and not any(plan.pays(m) for m in model)


def test_measuring_needs_inputs():
    with pytest.raises(ValueError, match="measuring needs inputs"):
        ssp.plan(two_convolutions(), measure=True)
    with pytest.raises(RuntimeError, match="has no times"):
        ssp.convert(two_convolutions(), filter_fn=ssp.plan(two_convolutions()).pays)
