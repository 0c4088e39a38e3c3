"""torch.compile: how many graphs there are, and which layers of them are sparse."""

import oracle
import pytest
import timm
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import ssprop_patch as ssp

from .compiled import assert_as_eager, assert_same, images, net, sparse_layers

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.mark.parametrize("converted_first", [True, False])
def test_any_rate_runs_in_one_sparse_and_one_dense_graph(converted_first):
    model, counter = net(), CompileCounterWithBackend("aot_eager")
    if converted_first:
        ssp.convert(model, schedule=0)
    call = torch.compile(model, backend=counter, fullgraph=True)
    if not converted_first:
        ssp.convert(call, schedule=0)
    controller = ssp.get_controller(call)
    for rate in [0, 0.8, 0, 0.1, 0.5, *(i / 20 for i in range(1, 20)), 0, 0.8]:
        controller.drop_rate = rate
        assert_as_eager(call, model)
        dropped = sparse_layers(model)
        assert not dropped if rate == 0 else "one" not in dropped
        if rate == 0.8:
            assert dropped == {"stem", "same", "grouped", "depthwise", "own", "twice"}
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    "schedule",
    [
        ssp.BarSchedule(0.8, period=4, interval="step"),
        ssp.LinearSchedule(0.05, 0.9, 12, interval="step"),
        ssp.CosineSchedule(0, 0.8, 12, interval="step"),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_schedule_makes_two_graphs_at_most_and_trains_as_eager(schedule):
    counter = CompileCounterWithBackend("aot_eager")
    weights, rates = [], []
    for compiled in (True, False):
        model = ssp.convert(net(), schedule=schedule)
        call = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        seen = []
        for _ in range(13):
            seen.append(ssp.get_controller(model).drop_rate)
            optimizer.zero_grad()
            call(images()).square().mean().backward()
            optimizer.step()
        rates.append(seen)
        weights.append([p.detach() for p in model.parameters()])
    assert rates[0] == rates[1] == [schedule(t) for t in range(13)]
    assert_same(*weights)
    assert counter.frame_count <= 2


def test_conversion_adds_no_graph_break():
    model = net()
    plain = torch._dynamo.explain(model)(images())
    for rate in (0.0, 0.8):
        torch._dynamo.reset()
        ssp.convert(model, schedule=rate)
        converted = torch._dynamo.explain(model)(images())
        assert converted.graph_break_count == plain.graph_break_count == 0, converted
        assert converted.graph_count == plain.graph_count == 1


@pytest.mark.parametrize(
    "name", ["test_efficientnet", "test_nfnet", "tf_mobilenetv3_small_minimal_100"]
)
def test_networks_of_timm_compile_whole(name):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=4).double()
    x = torch.randn(2, 3, 32, 32).double()
    ssp.convert(model, schedule=0.8)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(model, backend=counter, fullgraph=True)
    assert_as_eager(call, model, x, rtol=1e-9)
    ssp.get_controller(model).drop_rate = 0.4
    assert_as_eager(call, model, x, rtol=1e-9)
    assert counter.frame_count == 2  # of the schedule's rate, and of all others
    assert sparse_layers(model)


def test_a_rate_per_layer_is_not_a_graph_per_layer():
    model, counter = net(), CompileCounterWithBackend("aot_eager")
    ssp.convert(model, schedule=0.8, overrides={"stem": 0.25, "own": 0.0, "twice": 0.5})
    call = torch.compile(model, backend=counter, fullgraph=True)
    for rate in (0.8, 0.5, 0.3):
        ssp.get_controller(model).drop_rate = rate
        assert_as_eager(call, model)
        assert "own" not in sparse_layers(model)
        rows = model.stem.weight.grad.flatten(1).any(1).sum()
        assert rows == oracle.number_kept(16, 0.25)
    assert counter.frame_count == 2  # of the schedule's rate, and of all others


def test_excluded_and_evaluated_layers_are_dense():
    model = ssp.convert(net(), schedule=0.8, exclude=["stem"])
    model.own.eval()
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_as_eager(call, model)
    assert sparse_layers(model) == {"same", "grouped", "depthwise", "twice"}
    model.eval()
    assert_as_eager(call, model)
    assert not sparse_layers(model)


OPERATORS = "conv_backward", "linear_backward", "directions"


@pytest.mark.parametrize(
    "settings, seen",
    [
        ({}, set()),
        ({"remainder": "coarse"}, set()),
        ({"selection": "principal"}, {"conv_backward", "directions"}),
        ({"selection": "random"}, {"conv_backward"}),
        ({"schedule": ssp.CosineSchedule(0.1, 0.8, total=9)}, {"conv_backward"}),
    ],
    ids=["l1", "coarse", "principal", "random", "many rates"],
)
def test_the_compiler_sees_the_backward_at_the_rates_of_a_schedule_that_has_few(settings, seen):
    """Operators hide what is left: directions, other selections, schedules of many rates."""
    operators = set()

    def record(graph, inputs):
        operators.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    model = ssp.convert(net(), **{"schedule": 0.5, **settings})
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    torch.compile(model, backend=backend, fullgraph=True)(images()).square().mean().backward()
    found = {name for name in OPERATORS if any(name in op and "ssprop" in op for op in operators)}
    assert found == seen
    assert any("convolution_backward" in op for op in operators)
