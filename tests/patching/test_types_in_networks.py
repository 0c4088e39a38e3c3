"""Networks whose linear and transposed layers are converted too."""

import copy
import pickle
import warnings

import oracle
import pytest
import timm
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from timm.layers import CondConv2d
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ssprop_patch as ssp

from .layer_types import ALL, UNet

# --- networks ---------------------------------------------------------------------------------


def build(name):
    if name == "unet":
        return UNet(), torch.randn(3, 3, 12, 12)
    sizes = {"vit_tiny_patch16_224": {"img_size": 32}, "coatnet_pico_rw_224": {"img_size": 32}}
    kwargs = {"convnext_atto": {"conv_mlp": False, "depths": (1, 1, 1, 1)}}.get(name, {})
    model = timm.create_model(name, num_classes=5, **sizes.get(name, {}), **kwargs)
    return model, torch.randn(3, 3, 32, 32)


NETWORKS = ("unet", "convnext_atto", "vit_tiny_patch16_224", "coatnet_pico_rw_224")


def train(model, x, steps=2):
    """Loss and all parameters after some steps."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(x)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).square().sum()
        loss.backward()
        optimizer.step()
    return [loss.detach(), *(p.detach() for p in model.parameters())]


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", NETWORKS)
def test_two_training_steps_of_a_network_equal_the_oracles(name, in_float64):
    model, x = build(name)
    by_hand, dense = copy.deepcopy(model), copy.deepcopy(model)
    with oracle.network(by_hand, 0.5, ALL) as record:
        expected = train(by_hand, x)
    assert record.gap > 1e-9 and record.dropped > 2
    ssp.convert(model, 0.5, types=ALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = train(model, x)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)
    with pytest.raises(AssertionError):  # the oracle is not dense by mistake
        torch.testing.assert_close(train(dense, x), expected, rtol=1e-3, atol=1e-5)
    assert ssp.revert(model) is model and not ssp.is_converted(model)
    assert type(model) is type(dense) and [*map(type, model.modules())] == [
        *map(type, dense.modules())
    ]


def test_conditional_convolutions_choose_the_channels_of_each_sample(in_float64):
    model = timm.create_model("efficientnet_cc_b0_4e", num_classes=5)
    x, types = torch.randn(2, 3, 32, 32), (nn.Conv2d, CondConv2d)
    by_hand = copy.deepcopy(model)
    with oracle.network(by_hand, 0.5, types) as record:
        expected = train(by_hand, x, 1)
    assert record.gap > 1e-9
    ssp.convert(model, 0.5, types=types)
    assert "CondConv2d" in {row.cls.__name__ for row in ssp.plan(model, types=types).converted}
    start = [p.detach().clone() for p in model.parameters()]
    actual = train(model, x, 1)
    # Rounding of a step counts by the largest step: some parameters have no gradient but rounding.
    largest = max((b - a).abs().max().item() for a, b in zip(start, expected[1:], strict=True))
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-15 * largest)


@pytest.mark.parametrize("name", ["unet", "vit_tiny_patch16_224"])
def test_compiled_equals_eager_in_few_graphs(name):
    model, x = build(name)
    if name != "unet":
        model.blocks = model.blocks[:2]
    model, x = model.double(), x.double()
    ssp.convert(model, schedule=0.5, types=ALL)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rate in (0.5, 0.8, 0.3):
        ssp.get_controller(model).drop_rate = rate
        grads = []
        for run in (model, compiled):
            model.zero_grad()
            run(x).square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
        assert any((g == 0).any() for g in grads[1])
    assert counter.frame_count <= 2  # one may be of the schedule's own rate


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_computes_the_same(copied):
    model, x = UNet().double(), torch.randn(2, 3, 10, 10, dtype=torch.float64)
    ssp.convert(model, 0.5, types=ALL)
    other = copied(model)
    assert torch.equal(train(model, x)[1], train(other, x)[1])
    ssp.get_controller(other).drop_rate = 0
    assert ssp.get_controller(model).drop_rate == 0.5
    assert [*map(type, ssp.revert(other).modules())] == [*map(type, UNet().modules())]


def kinds_of(block):
    """The operators of a TorchScript graph, those inside of its blocks too."""
    for node in block.nodes():
        yield node.kind()
        for inner in node.blocks():
            yield from kinds_of(inner)


def test_traced_scripted_and_exported_networks_are_dense():
    model, x = ssp.convert(UNet(), 0.5, types=ALL), torch.randn(2, 3, 10, 10)
    model.middle[1].eval()  # a batch norm would change with every call
    ssp.convert(linear := nn.Sequential(nn.Linear(4, 8), nn.ReLU()), 0.5, types=nn.Linear)
    rows = torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        scripted = torch.jit.script(linear)
        traced = torch.jit.trace(model, x, check_trace=False)
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(scripted(rows), linear(rows))
    for graph in (scripted.inlined_graph, traced.inlined_graph):
        kinds = set(kinds_of(graph))
        assert {"aten::linear"} <= kinds
        assert all(kind.startswith(("aten::", "prim::")) for kind in kinds), kinds
        assert "prim::PythonOp" not in kinds
    called = {n.target for n in exported.graph.nodes if n.op == "call_function"}
    assert torch.ops.aten.linear.default in called
    assert {target.namespace for target in called} == {"aten"}
    for found in (traced, exported):
        torch.testing.assert_close(found(x), model(x), rtol=0, atol=1e-6 if found is traced else 0)


def test_a_subclass_of_linear_without_forward_stays_itself_in_a_traced_graph():
    class Mine(nn.Linear):
        pass

    model = ssp.convert(nn.Sequential(Mine(4, 8), nn.ReLU()), 0.5, types=nn.Linear)
    graph = torch.fx.symbolic_trace(model)
    assert [n.op for n in graph.graph.nodes] == [
        "placeholder",
        "call_module",
        "call_module",
        "output",
    ]
    x = torch.randn(6, 4)
    graph(x).sum().backward()
    kept = (model[0].weight.grad != 0).any(1).sum()
    assert kept == 4


def test_a_subclass_of_linear_with_its_own_forward_is_caught():
    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight / self.weight.norm(), self.bias)

    layer, x = Scaled(4, 8).double(), torch.randn(6, 4, dtype=torch.float64)
    by_hand = copy.deepcopy(layer)
    with oracle.network(by_hand, 0.5, nn.Linear):
        expected = train(by_hand, x)
    torch.testing.assert_close(train(ssp.convert(layer, 0.5, types=nn.Linear), x), expected)


# --- FLOPs ------------------------------------------------------------------------------------

#: What attention runs, in one operator or in two.
ATTENTION = (
    torch.ops.aten.bmm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
)


@pytest.mark.parametrize("name", ["unet", "vit_tiny_patch16_224"])
def test_summary_counts_what_torchs_counter_counts(name):
    model, x = build(name)
    exclude = "smooth" if name == "unet" else ()  # torch's counter is wrong for groups
    found = ssp.summary(model, input_size=x.shape, types=ALL, drop_rate=0.5)
    skipped = [row for row in found.layers if row.name in exclude]
    ssp.convert(model, 0.5, types=ALL)
    as_it_is = ssp.summary(model, input_size=x.shape)
    assert [row.sparse_backward for row in as_it_is.layers] == [
        row.sparse_backward for row in found.layers
    ]
    if name == "unet":
        model.smooth = nn.Identity()
    others = () if name == "unet" else ATTENTION
    counts = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        torch._dynamo.reset()
        with FlopCounterMode(display=False) as counter:
            run(x).sum().backward()
        by_op = counter.get_flop_counts()["Global"]
        counts.append(sum(n for op, n in by_op.items() if op not in others))
    # Their counters hold multiply-adds only: no bias, no importance.
    extra = sum(
        2 * torch.Size(row.output_shape).numel() * (row.kept < row.channels)
        + (row.kept * torch.Size(row.output_shape).numel() // row.channels) * has_bias(model, row)
        for row in found.layers
        if row not in skipped
    )
    ours = sum(row.forward + row.sparse_backward for row in found.layers if row not in skipped)
    assert counts[0] == counts[1] == ours - extra


def has_bias(model, row):
    return model.get_submodule(row.name).bias is not None
