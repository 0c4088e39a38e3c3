"""Layers beyond Conv1d/2d/3d, converted when ``types`` names them: linear and transposed ones."""

import copy
import pickle
import warnings

import oracle
import pytest
import timm
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.layers import CondConv2d
from torch import nn

import ssprop_patch as ssp
import ssprop_patch.functional as SF

ALL = (*oracle.CONVOLUTIONS, *oracle.TRANSPOSED, nn.Linear)
SPARSE_TRANSPOSE = {1: SF.conv_transpose1d, 2: SF.conv_transpose2d, 3: SF.conv_transpose3d}
LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}


def grads_of(y, tensors, dy):
    """Gradients of those of ``tensors`` that need one; None for the others."""
    needing = [t for t in tensors if t is not None and t.requires_grad]
    found = dict(zip(map(id, needing), torch.autograd.grad(y, needing, dy), strict=True))
    return [found.get(id(t)) for t in tensors]


def assert_all_close(actual, expected):
    for one, two in zip(actual, expected, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            scale = two.abs().max().item() if two.numel() else 0.0
            torch.testing.assert_close(one, two, rtol=0, atol=1e-10 * scale + 1e-300)


# --- transposed convolutions ------------------------------------------------------------------


@st.composite
def transposed_cases(draw):
    """(dims, x, w, b, geometry, rate, dy) in float64, some of them not needing a gradient."""
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inside = draw(st.integers(1, 3))  # input channels of a group
    outside = draw(st.integers(1, 6))  # 1: depthwise where there are groups
    stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    reach = [(k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple(draw(st.integers(0, n)) for n in reach)
    most = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    geometry = {
        "stride": stride,
        "padding": padding,
        "output_padding": tuple(draw(st.integers(0, n)) for n in most),
        "groups": groups,
        "dilation": dilation,
    }
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def randn(*size):
        return torch.randn(size, dtype=torch.float64, generator=generator)

    batch = draw(st.sampled_from([(), (1,), (3,)]))
    x = randn(*batch, groups * inside, *(draw(st.integers(3, 5)) for _ in range(dims)))
    if dims in LAYOUTS and batch and draw(st.booleans()):
        x = x.contiguous(memory_format=LAYOUTS[dims])
    w = randn(groups * inside, outside, *kernel)
    b = randn(groups * outside) if draw(st.booleans()) else None
    x.requires_grad_(draw(st.booleans()))
    w.requires_grad_(draw(st.booleans()) or not x.requires_grad)
    if b is not None:
        b.requires_grad_(draw(st.booleans()))
    y = oracle.CONV_TRANSPOSE[dims](x, w, b, **geometry)
    rate = draw(st.sampled_from([0.25, 0.5, 0.8, 0.99]))
    return dims, x, w, b, geometry, rate, randn(*y.shape)


@settings(max_examples=300)
@given(transposed_cases())
def test_gradients_of_a_transposed_convolution_equal_the_oracle(case):
    dims, x, w, b, geometry, rate, dy = case
    dense = oracle.CONV_TRANSPOSE[dims](x, w, b, **geometry)
    y = SPARSE_TRANSPOSE[dims](x, w, b, **geometry, drop_rate=rate)
    assert torch.equal(y, dense) and y.stride() == dense.stride()

    batched = dy if x.dim() == dims + 2 else dy[None]
    choice = oracle.choose(batched, geometry["groups"], rate)
    assume(choice.gap > 1e-6)
    masked = oracle.mask(batched, choice.keep).view(dy.shape)
    actual = grads_of(y, (x, w, b), dy)
    assert_all_close(actual, grads_of(dense, (x, w, b), masked))
    if actual[1] is not None:  # the rows of dropped channels, dim 1 of each group
        by_group = actual[1].unflatten(0, (geometry["groups"], -1)).transpose(1, 2).flatten(0, 1)
        assert (by_group[~choice.keep] == 0).all()


# --- linear -----------------------------------------------------------------------------------


@st.composite
def linear_cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def randn(*size):
        return torch.randn(size, dtype=torch.float64, generator=generator)

    leading = draw(st.lists(st.integers(1, 4), max_size=3))
    n_in, n_out = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    x, w, dy = randn(*leading, n_in), randn(n_out, n_in), randn(*leading, n_out)
    if len(leading) > 1 and draw(st.booleans()):  # as after a permute to channels last
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
        dy = dy.transpose(0, -1).contiguous().transpose(0, -1)
    b = randn(n_out) if draw(st.booleans()) else None
    x.requires_grad_(draw(st.booleans()))
    w.requires_grad_(draw(st.booleans()) or not x.requires_grad)
    if b is not None:
        b.requires_grad_(draw(st.booleans()))
    return x, w, b, draw(st.sampled_from([0.25, 0.5, 0.8, 0.99])), dy


@settings(max_examples=300)
@given(linear_cases())
def test_gradients_of_a_linear_layer_equal_the_oracle(case):
    x, w, b, rate, dy = case
    y = SF.linear(x, w, b, drop_rate=rate)
    assert torch.equal(y, F.linear(x, w, b))
    choice = oracle.choose(dy.reshape(-1, len(w)), 1, rate)
    assume(choice.gap > 1e-6)
    # By hand: y = x w' + b.
    masked = torch.where(choice.keep, dy, 0).reshape(-1, len(w))
    rows = x.detach().reshape(-1, x.shape[-1])
    by_hand = [(masked @ w.detach()).view(x.shape), masked.T @ rows, masked.sum(0)]
    needed = [None if t is None or not t.requires_grad else g
              for t, g in zip((x, w, b), by_hand, strict=True)]  # fmt: skip
    actual = grads_of(y, (x, w, b), dy)
    assert_all_close(actual, needed)
    if actual[1] is not None:
        assert (actual[1][~choice.keep] == 0).all()


@pytest.mark.parametrize("function", [SF.linear, SF.conv_transpose2d])
def test_double_backward_is_the_derivative_of_the_sparse_backward(function):
    shape, weight = ((2, 4), (6, 4)) if function is SF.linear else ((2, 4, 3, 3), (4, 6, 2, 2))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(weight, dtype=torch.float64, requires_grad=True)
    # A gradient of its own for each channel, so that no small change changes the choice.
    scale = torch.arange(1.0, 7, dtype=torch.float64)
    scale = scale if function is SF.linear else scale.view(-1, 1, 1)

    def first_gradients(x, w):
        y = function(x, w, drop_rate=0.5)
        return torch.autograd.grad((y.tanh() * scale).sum() * 1e-2, (x, w), create_graph=True)

    assert torch.autograd.gradcheck(lambda x, w: first_gradients(x, w), (x, w))


@pytest.mark.parametrize("name", ["linear", "conv_transpose1d", "conv_transpose2d"])
def test_a_rate_of_zero_is_torchs_own_function(name):
    shapes = {"linear": ((3, 4), (6, 4)), "conv_transpose1d": ((2, 4, 5), (4, 3, 2))}
    x_shape, w_shape = shapes.get(name, ((2, 4, 5, 5), (4, 3, 2, 2)))
    x, w = torch.randn(x_shape, requires_grad=True), torch.randn(w_shape, requires_grad=True)
    y = getattr(SF, name)(x, w)
    dense = getattr(F, name)(x, w)
    assert type(y.grad_fn) is type(dense.grad_fn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_a_linear_layer_as_torch_does(dtype):
    layer, x = nn.Linear(16, 8), torch.randn(5, 16, requires_grad=True)
    dy = torch.randn(5, 8).to(dtype)
    keep = oracle.choose(dy, 1, 0.5).keep

    def run(dy):
        with torch.autocast("cpu", dtype):
            y = layer(x)
        assert y.dtype == dtype
        return y, torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)

    dense, expected = run(torch.where(keep, dy, 0))
    ssp.convert(layer, 0.5, types=nn.Linear)
    y, actual = run(dy)
    assert torch.equal(y, dense)
    for one, two in zip(actual, expected, strict=True):
        assert one.dtype == two.dtype == torch.float32
    assert torch.equal(actual[1], expected[1]) and torch.equal(actual[2], expected[2])
    # dX sums over 4 features, not over these and 4 zeros: equal but for the last bit.
    torch.testing.assert_close(actual[0], expected[0], rtol=torch.finfo(dtype).eps, atol=1e-6)


# --- networks ---------------------------------------------------------------------------------


class UNet(nn.Module):
    """Down and up again, as networks for segmentation and diffusion do."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, 2, 1)
        self.middle = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.time = nn.Linear(4, 12)
        self.up = nn.ConvTranspose2d(12, 8, 2, 2)
        self.smooth = nn.ConvTranspose2d(8, 8, 3, 1, 1, groups=8)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        h = self.middle(F.relu(self.down(x)))
        h = h + self.time(x.mean((2, 3)).repeat(1, 2)[:, :4])[..., None, None]
        return self.out(self.smooth(self.up(h, output_size=x.shape[2:])).tanh())


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
def test_compiled_equals_eager_in_one_graph_for_all_rates(name):
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
    assert counter.frame_count == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_computes_the_same(copied):
    model, x = UNet().double(), torch.randn(2, 3, 10, 10, dtype=torch.float64)
    ssp.convert(model, 0.5, types=ALL)
    other = copied(model)
    assert torch.equal(train(model, x)[1], train(other, x)[1])
    ssp.get_controller(other).drop_rate = 0
    assert ssp.get_controller(model).drop_rate == 0.5
    assert [*map(type, ssp.revert(other).modules())] == [*map(type, UNet().modules())]


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
    assert "ssprop" not in str(scripted.graph) + str(traced.graph) + str(exported.graph)
    for found in (traced, exported):
        torch.testing.assert_close(found(x), model(x), rtol=0, atol=1e-6 if found is traced else 0)


def test_a_subclass_of_linear_without_forward_stays_itself_in_a_traced_graph():
    class Mine(nn.Linear):
        pass

    model = ssp.convert(nn.Sequential(Mine(4, 8), nn.ReLU()), 0.5, types=nn.Linear)
    graph = torch.fx.symbolic_trace(model)
    assert [n.op for n in graph.graph.nodes] == [
        "placeholder", "call_module", "call_module", "output"
    ]  # fmt: skip
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


# --- which layers -----------------------------------------------------------------------------


def converted(model, **kwargs):
    return [row.name for row in ssp.plan(model, **kwargs).converted]


def test_only_convolutions_are_converted_unless_others_are_named():
    model = UNet()
    assert converted(model) == ["down", "middle.0", "out"]
    assert converted(model, types=nn.Linear) == ["time"]
    assert converted(model, types=[nn.ConvTranspose2d]) == ["up", "smooth"]
    assert converted(model, types=ALL) == ["down", "middle.0", "time", "up", "smooth", "out"]
    rows = {row.name: row for row in ssp.plan(model)}
    assert "time" not in rows  # a linear layer is no candidate, a convolution is
    assert rows["up"].reason == "transposed convolution: nn.ConvTranspose2d is not among types"
    rows = {row.name: row for row in ssp.plan(model, types=nn.Linear)}
    assert rows["down"].reason == "nn.Conv2d is not among types"


def test_converting_again_with_fewer_types_takes_the_others_off():
    model = ssp.convert(UNet(), types=ALL)
    ssp.convert(model)
    assert type(model.time) is nn.Linear and type(model.up) is nn.ConvTranspose2d
    assert ssp.is_converted(model.down)


def test_names_and_rates_of_linear_layers():
    model = nn.ModuleDict({"body": nn.Linear(4, 8), "head": nn.Linear(8, 10)})
    ssp.convert(model, 0.5, types=nn.Linear, exclude="head", overrides={"body": 0.75})
    assert not ssp.is_converted(model.head)
    model.body(torch.randn(6, 4)).square().sum().backward()
    assert (model.body.weight.grad != 0).any(1).sum() == 2


@pytest.mark.parametrize(
    ("types", "error", "words"),
    [
        (nn.BatchNorm2d, ValueError, "BatchNorm2d has no sparse backward.*nn.Linear"),
        ((nn.Conv2d, nn.Module), ValueError, "Module has no sparse backward"),
        ((), ValueError, "empty"),
        (("Conv2d",), TypeError, "classes.*'Conv2d'"),
        ((int,), TypeError, "classes"),
        (nn.Conv2d(1, 1, 1), TypeError, "classes|iterable"),
    ],
)
def test_types_that_cannot_be(types, error, words):
    model = UNet()
    for function in (ssp.convert, ssp.plan):
        with pytest.raises(error, match=words):
            function(model, types=types)
    assert not ssp.is_converted(model)


def test_linear_layers_that_cannot_be_are_skipped_with_the_reason():
    model = nn.ModuleDict(
        {
            "one": nn.Linear(4, 1),
            "attention": nn.MultiheadAttention(4, 2),
            "complex": nn.Linear(4, 4, dtype=torch.complex64),
            "good": nn.Linear(4, 4),
        }
    )
    rows = {row.name: row for row in ssp.plan(model, types=nn.Linear)}
    assert rows["one"].reason == "one output channel: nothing to choose from"
    assert "MultiheadAttention" in rows["attention.out_proj"].reason
    assert rows["complex"].reason == "complex weights"
    assert [name for name, row in rows.items() if row.action == "convert"] == ["good"]
    ssp.convert(model, 0.5, types=nn.Linear)
    x = torch.randn(3, 2, 4)
    model["attention"](x, x, x)[0].sum().backward()


def test_a_lazy_linear_layer_is_refused():
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match="lazy"):
        ssp.convert(model, types=nn.Linear)
    with pytest.raises(ValueError, match="nothing to convert"):  # not asked for: not in the way
        ssp.convert(model)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.ConvTranspose1d(4, 4, 1)])
def test_a_forward_wrapped_on_the_instance_stays_dense_and_says_so(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x)
    row, = ssp.plan(layer, types=type(layer))
    assert row.action == "skip" and "before it is wrapped" in row.reason


def test_a_named_class_that_calls_no_convolution_warns_when_it_runs():
    class Convolver(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            return x @ self.weight

    model = ssp.convert(nn.Sequential(Convolver()), 0.5, types=Convolver)
    with pytest.warns(UserWarning, match="called no torch.nn.functional.conv1d"):
        model(torch.randn(2, 4))


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
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            run(x).sum().backward()
        by_op = counter.get_flop_counts()["Global"]
        counts.append(sum(n for op, n in by_op.items() if op not in others))
    # Their counters hold multiply-adds only: no bias, no importance.
    extra = sum(
        2 * torch.Size(row.output_shape).numel() * (row.kept < row.channels)
        + (row.kept * torch.Size(row.output_shape).numel() // row.channels) * has_bias(model, row)
        for row in found.layers if row not in skipped
    )  # fmt: skip
    ours = sum(row.forward + row.sparse_backward for row in found.layers if row not in skipped)
    assert counts[0] == counts[1] == ours - extra


def has_bias(model, row):
    return model.get_submodule(row.name).bias is not None
