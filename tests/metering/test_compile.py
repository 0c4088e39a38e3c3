"""A metered model compiles in one graph, and what its compiled code runs is counted."""

import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from metering import by_hand
from metering.by_hand import RATES, by_step, gradients, layers_counted, quiet_meter, train


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model, backend="aot_eager"):
    return torch.compile(model, backend=backend, fullgraph=True)


@pytest.mark.parametrize("when", ["from the compiled model", "before compiling", "in place"])
def test_one_graph_and_the_flops_of_what_ran(when):
    model = by_hand.net()
    expected = by_hand.layers_by_summary(model, by_hand.batch(0), RATES)
    ssp.convert(model, by_step(), exclude="^4$")
    expected = by_hand.layers_by_summary(by_hand.net(), by_hand.batch(0), RATES)
    left_out = [
        ssp.summary(by_hand.net(), inputs=by_hand.batch(0), drop_rate=rate).layers[2]
        for rate in RATES
    ]
    more = sum(row.dense_backward - row.sparse_backward for row in left_out)
    if when == "from the compiled model":
        call = metered = compiled(model)
    else:
        metered = model
    rates = []
    with quiet_meter(metered) as meter:
        if when == "before compiling":
            call = compiled(model)
        elif when == "in place":
            model.compile(backend="aot_eager", fullgraph=True)
            call = model
        meter.log_to(lambda scalars, step: rates.append(scalars["ssprop/drop_rate"]))
        train(model, len(RATES), call=call)
        assert layers_counted(meter) == (expected[0], expected[1], expected[2] + more)
        assert (meter.steps, rates) == (len(RATES), list(RATES))
        seconds = meter.report().seconds
        report = meter.report()
        assert report.others is meter.network is report.total_saved is None
        assert "compile" in report.unknown and "not known of the whole network" in str(report)
        assert meter.report().to_dict()["backward_saved"] is None
    if when == "from the compiled model":
        assert seconds.keys() == {"forward", "backward", "optimizer"}
    else:  # hooks inside a graph see nothing run
        assert seconds.keys() == {"optimizer"}


def test_a_schedule_makes_no_more_graphs_than_without_a_meter():
    def graphs(metered):
        torch.compiler.reset()
        made = []

        def backend(graph, inputs):
            made.append(graph)
            return graph.forward

        model = ssp.convert(by_hand.net(), by_step())
        with quiet_meter(model) if metered else torch.enable_grad():
            train(model, 2 * len(RATES), call=torch.compile(model, backend=backend, fullgraph=True))
        return len(made)

    assert graphs(metered=True) <= graphs(metered=False) <= 2


@pytest.mark.parametrize("rate", [0.0, 0.6])
def test_gradients_of_compiled_code_are_those_without_a_meter(rate):
    plain, model = ssp.convert(by_hand.net(), rate), ssp.convert(by_hand.net(), rate)
    expected = gradients(plain, by_hand.batch(0))
    call = compiled(model)
    with quiet_meter(call):
        found = gradients(model, by_hand.batch(0), call)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_layers_in_eval_mode_compile_too():
    model = by_hand.net()
    model[2].eval()
    expected = gradients(ssp.convert(by_hand.net(), 0.6, exclude="^2$"), by_hand.batch(0))
    call = compiled(ssp.convert(model, 0.6))
    with quiet_meter(call):
        found = gradients(model, by_hand.batch(0), call)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_closing_and_compiled_evaluation():
    model = ssp.convert(by_hand.net(), 0.5)
    call = compiled(model)
    with quiet_meter(call) as meter:
        train(model, 1, call=call)
        call.eval()
        with torch.no_grad():
            call(by_hand.batch(0))
        call.train()
        forwards = {row.totals.forwards for row in meter.report().layers}
    assert forwards == {1}
    with quiet_meter(call) as again:
        train(model, 1, call=call)
        assert {row.totals.backwards for row in again.report().layers} == {1}


def test_names_are_those_of_the_model_without_its_wrapper():
    call = compiled(ssp.convert(nn.Sequential(nn.Conv2d(3, 4, 1)), 0.5))
    with quiet_meter(call) as meter:
        assert [row.name for row in meter.report().layers] == ["0"]
