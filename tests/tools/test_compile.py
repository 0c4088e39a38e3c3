"""Under torch.compile: no graph breaks, two graphs for any schedule, the gradients of eager."""

import copy
import itertools

import oracle
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import ssprop_patch as ssp
from ssprop_patch import functional, opaque
from ssprop_patch.passes import is_channels_last
from ssprop_patch.selection import resolve_selection

from .compiling import INDUCTOR, fresh_compiler  # noqa: F401
from .networks import WSConv2d

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


class Net(nn.Module):
    """One of each: with bias and batch norm, 'same', grouped, depthwise, own forward, reused."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.same = nn.Conv2d(16, 16, 2, padding="same", padding_mode="circular")
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.own = WSConv2d(16, 16, 3, padding=1)
        self.twice = nn.Conv2d(16, 16, 1)
        self.one = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = self.depthwise(self.grouped(self.same(x))).tanh()
        x = self.twice(self.twice(self.own(x)).tanh())
        gate = self.one(x.mean((2, 3))[:, None])[:, 0]
        return x * gate.sigmoid()[:, :, None, None]


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def images(batch=2, size=8, dtype=torch.float64):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def step(call, model, x=None):
    """Output and gradients of one call; batch norm's statistics are put back."""
    buffers = [b.clone() for b in model.buffers()]
    model.zero_grad(set_to_none=True)
    y = call(images() if x is None else x)
    y.square().sum().backward()
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)
    return [y.detach(), *(p.grad for p in model.parameters())]


def assert_same(compiled, eager, rtol=1e-12):
    for one, two in zip(compiled, eager, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            assert one.dtype == two.dtype
            torch.testing.assert_close(one, two, rtol=rtol, atol=rtol)


def assert_as_eager(call, model, x=None, rtol=1e-12):
    assert_same(step(call, model, x), step(model, model, x), rtol)


def strides(t):
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def sparse_layers(model):
    """Of a step just taken: which convolutions have a weight row that got no gradient."""
    return {
        name for name, m in model.named_modules()
        if hasattr(m, "groups") and not m.weight.grad.flatten(1).any(1).all()
    }  # fmt: skip


# --- graphs -----------------------------------------------------------------------------------


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
    [ssp.BarSchedule(0.8, period=4, interval="step"),
     ssp.LinearSchedule(0.05, 0.9, 12, interval="step"),
     ssp.CosineSchedule(0, 0.8, 12, interval="step")],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
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
    assert counter.frame_count == 1
    assert sparse_layers(model)


def test_a_rate_per_layer_makes_no_graph_more():
    model, counter = net(), CompileCounterWithBackend("aot_eager")
    ssp.convert(model, schedule=0.8, overrides={"stem": 0.25, "own": 0.0, "twice": 0.5})
    call = torch.compile(model, backend=counter, fullgraph=True)
    for rate in (0.8, 0.5, 0.3):
        ssp.get_controller(model).drop_rate = rate
        assert_as_eager(call, model)
        assert "own" not in sparse_layers(model)
        rows = model.stem.weight.grad.flatten(1).any(1).sum()
        assert rows == oracle.number_kept(16, 0.25)
    assert counter.frame_count == 1


def test_excluded_and_evaluated_layers_are_dense():
    model = ssp.convert(net(), schedule=0.8, exclude=["stem"])
    model.own.eval()
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_as_eager(call, model)
    assert sparse_layers(model) == {"same", "grouped", "depthwise", "twice"}
    model.eval()
    assert_as_eager(call, model)
    assert not sparse_layers(model)


# --- what is computed -------------------------------------------------------------------------


def test_compiled_gradients_equal_the_oracle():
    model = net()
    with oracle.network(model, 0.7) as record:
        expected = step(model, model)
    assert record.gap > 1e-9
    ssp.convert(model, schedule=0.7)
    assert_same(step(torch.compile(model, backend="aot_eager", fullgraph=True), model), expected)


@pytest.mark.parametrize("frozen", ["weight", "bias", "stem", "everything but stem", "input"])
def test_frozen_parameters(frozen):
    model, x = net(), images()
    for name, p in model.named_parameters():
        if frozen == "everything but stem":
            p.requires_grad_("stem" in name)
        else:
            p.requires_grad_(frozen not in name)
    x.requires_grad_(frozen != "input")
    ssp.convert(model, schedule=0.6)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    grads = []
    for run in (call, model):
        x.grad = None
        grads.append([*step(run, model, x), x.grad])
    assert_same(*grads)
    assert any(g is None for g in grads[0])


@pytest.mark.parametrize("selection", ["l2", "random", lambda dy: dy.abs().amax((0, 2, 3))],
                         ids=["l2", "random", "callable"])  # fmt: skip
def test_selections(selection):
    model = ssp.convert(net(), schedule=0.6, selection=selection)
    controller = ssp.get_controller(model)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    grads = []
    for run in (call, model):
        controller.manual_seed(5)
        grads.append(step(run, model))
        grads.append(step(run, model))
    assert_same(grads[0], grads[2])
    assert_same(grads[1], grads[3])
    if selection == "random":
        assert not torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_autocast(inside):
    model = ssp.convert(net(torch.float32), schedule=0.6)
    x = images(dtype=torch.float32)

    def cast(call):
        def run(x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = call(x)
            assert y.dtype == torch.bfloat16
            return y.float()

        return run

    def compiled(call):
        return torch.compile(call, backend="aot_eager", fullgraph=True)

    run = compiled(cast(model)) if inside else cast(compiled(model))
    one, two = step(run, model, x), step(cast(model), model, x)
    for a, b in zip(one, two, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * b.abs().max().item())
    assert sparse_layers(model) == {"stem", "same", "grouped", "depthwise", "own", "twice"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last(dtype):
    model = ssp.convert(net(dtype).to(memory_format=torch.channels_last), schedule=0.6)
    x = images(dtype=dtype).contiguous(memory_format=torch.channels_last)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    one, two = step(call, model, x), step(model, model, x)
    for a, b, p in zip(one[1:], two[1:], model.parameters(), strict=True):
        assert strides(a) == strides(b) == strides(p)
        torch.testing.assert_close(
            a, b, rtol=0, atol=32 * torch.finfo(dtype).eps * b.abs().max().item()
        )


@pytest.mark.parametrize("dynamic", [True, None])
def test_other_batch_and_image_sizes(dynamic):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), WSConv2d(8, 8, 3, groups=2)).double()
    ssp.convert(model, schedule=0.6)
    call = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch, size in ((2, 8), (3, 8), (4, 10)):
        assert_as_eager(call, model, images(batch, size))


@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_functional_form(dims, drop_rate):
    conv = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[dims]
    x = torch.randn(2, 4, *[5] * dims).double()
    w = torch.randn(8, 2, *[2] * dims).double().requires_grad_()
    b = torch.randn(8).double().requires_grad_()

    def call(x):
        return conv(x, w, b, 1, "same", groups=2, drop_rate=drop_rate)

    grads = []
    for run in (torch.compile(call, backend="aot_eager", fullgraph=True), call):
        w.grad = b.grad = None
        run(x).pow(3).sum().backward()
        grads.append([w.grad, b.grad])
    assert_same(*grads)
    assert (w.grad.flatten(1).any(1).sum() < 8) == (drop_rate > 0)


def half():
    """What tells the operator to keep every other channel: rate and token."""
    settings = opaque.Settings(resolve_selection("l1"))
    return opaque.rate_tensor(0.5), opaque.token_of(settings)


@pytest.mark.parametrize("needed", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("layouts", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("groups, kernel_size, stride", [(1, 3, 1), (1, 1, 1), (1, 1, 2),
                                                         (2, 3, 1), (8, 3, 1)])  # fmt: skip
def test_the_operator_returns_what_it_promises_the_compiler(
    groups, kernel_size, stride, layouts, needed
):
    # Shapes, strides and dtypes of the fake kernel against the real one's, and the schema.
    x = torch.randn(2, 8, 6, 6)
    w = torch.randn(8, 8 // groups, kernel_size, kernel_size)
    dy = torch.randn(F.conv2d(x, w, stride=stride, groups=groups).shape)
    dy, x, w = (
        t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        for t, last in zip((dy, x, w), layouts, strict=True)
    )
    geometry = ([stride] * 2, [0, 0], [1, 1], groups, False, [0, 0])
    arguments = (dy, x, w, *geometry, *half(), [bool(n) for n in needed])
    torch.library.opcheck(
        opaque.conv_backward, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("needed", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_operator_keeps_its_promise_for_transposed_convolutions(groups, needed):
    x, w = torch.randn(2, 8, 5, 5), torch.randn(8, 8 // groups, 3, 3)
    dy = torch.randn(F.conv_transpose2d(x, w, None, 2, 1, 1, groups).shape)
    geometry = ([2, 2], [1, 1], [1, 1], groups, True, [1, 1])
    arguments = (dy, x, w, *geometry, *half(), [bool(n) for n in needed])
    torch.library.opcheck(
        opaque.conv_backward, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("needed", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("leading", [(), (6,), (2, 3, 4)])
def test_the_linear_operator_returns_what_it_promises(leading, permuted, needed):
    x, w, dy = torch.randn(*leading, 4), torch.randn(8, 4), torch.randn(*leading, 8)
    if permuted and len(leading) > 1:
        x, dy = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, dy))
    arguments = (dy, x, w, *half(), [bool(n) for n in needed])
    torch.library.opcheck(
        opaque.linear_backward, arguments, test_utils=("test_schema", "test_faketensor")
    )


# --- converting, reverting, copying -----------------------------------------------------------


def test_convert_and_revert_after_compile():
    model = net()
    dense = step(model, model)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(step(call, model), dense)
    ssp.convert(call, schedule=0.8)
    assert_as_eager(call, model)
    assert sparse_layers(model)
    ssp.revert(call)
    assert not ssp.is_converted(call)
    assert_same(step(call, model), dense)
    assert not sparse_layers(model)
    ssp.convert(model, schedule=0.5)
    assert_as_eager(call, model)
    assert model.stem.weight.grad.flatten(1).any(1).sum() == 8


def test_convert_again_with_other_arguments():
    model = ssp.convert(net(), schedule=0.8)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    step(call, model)
    for arguments in ({"schedule": 0.25}, {"schedule": 0.8, "selection": "l2"},
                      {"schedule": 0.8, "exclude": ["own"]}):  # fmt: skip
        ssp.convert(model, **arguments)
        assert_as_eager(call, model)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_backward_after_revert_is_still_right(compiled):
    model = net()
    with oracle.network(model, 0.8):
        expected = step(model, model)
    ssp.convert(model, schedule=0.8)
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    y = call(images())
    ssp.revert(model)
    model.zero_grad()
    y.square().sum().backward()
    assert_same([p.grad for p in model.parameters()], expected[1:])


def test_two_models_of_one_class_keep_their_own_rates():
    models = [ssp.convert(net(), schedule=rate) for rate in (0.25, 0.75)]
    calls = [torch.compile(m, backend="aot_eager", fullgraph=True) for m in models]
    for _ in range(2):
        for call, model, kept in zip(calls, models, (12, 4), strict=True):
            assert_as_eager(call, model)
            step(call, model)
            assert model.stem.weight.grad.flatten(1).any(1).sum() == kept


def test_a_deepcopy_of_a_compiled_model_has_its_own_rate():
    call = torch.compile(
        ssp.convert(net(), schedule=0.75), backend="aot_eager", fullgraph=True
    )
    step(call, call)
    other = copy.deepcopy(call)
    ssp.get_controller(other).drop_rate = 0.25
    for one, kept in ((call, 4), (other, 12)):
        step(one, one)
        assert one._orig_mod.stem.weight.grad.flatten(1).any(1).sum() == kept


def test_temporary_rates_around_a_compiled_step():
    model = ssp.convert(net(), schedule=0.8)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    with ssp.dense(model):
        assert_as_eager(call, model)
        assert not sparse_layers(model)
        with ssp.sparsity(model, 0.5):
            assert_as_eager(call, model)
            assert model.stem.weight.grad.flatten(1).any(1).sum() == 8
    step(call, model)
    assert model.stem.weight.grad.flatten(1).any(1).sum() == 3


# --- inductor ---------------------------------------------------------------------------------


def test_inductor_compiles_two_graphs_that_train_as_eager():
    def small():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), WSConv2d(8, 8, 3),
            nn.Conv2d(8, 8, 3, groups=8),
        ).double()  # fmt: skip

    model = ssp.convert(small(), schedule=0)
    counter = CompileCounterWithBackend(INDUCTOR)
    call = torch.compile(model, backend=counter, fullgraph=True)
    for rate in (0, 0.5, 0.8, 0.3, 0):
        ssp.get_controller(model).drop_rate = rate
        assert_as_eager(call, model, rtol=1e-10)
        assert bool(sparse_layers(model)) == (rate > 0)
    assert counter.frame_count == 2


def test_inductor_in_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)).double()
    model = ssp.convert(model.to(memory_format=torch.channels_last), schedule=0.6)
    x = images().contiguous(memory_format=torch.channels_last).requires_grad_()
    call = torch.compile(model, backend=INDUCTOR, fullgraph=True)
    grads = []
    for run in (call, model):
        x.grad = None
        grads.append([*step(run, model, x), x.grad])
    assert_same(*grads, rtol=1e-10)


@pytest.mark.skipif(INDUCTOR != "inductor", reason="what is tested is inductor's layout")
@pytest.mark.parametrize("optimized", [False, True])
def test_inductor_hands_its_own_layout_to_the_backward(optimized, monkeypatch):
    # Where it made the forward channels_last, no copies go back to the format of eager mode.
    torch.manual_seed(0)
    layers = [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    model = ssp.convert(nn.Sequential(*copy.deepcopy(layers), *layers).double(), 0.8)
    x = torch.randn(2, 64, 12, 12).double()
    formats = []
    real = opaque.backward.sparse_backward

    def spy(dy, x, w, *args):
        formats.append([is_channels_last(t) for t in (dy, x, w)])
        return real(dy, x, w, *args)

    monkeypatch.setattr(opaque.backward, "sparse_backward", spy)
    with torch._inductor.config.patch(
        layout_optimization=optimized, force_disable_caches=True
    ):
        call = torch.compile(model, backend=INDUCTOR, fullgraph=True)
        compiled = step(call, model, x)
    # But for the gradient of the output, which comes in eager's format in some versions of torch.
    assert [format[1:] for format in formats] == [[optimized] * 2] * 2
    assert formats[1][0] is optimized
    assert_same(compiled, step(model, model, x), rtol=1e-10)
