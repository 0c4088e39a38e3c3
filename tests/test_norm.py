"""Batch norm after a sparse convolution: the same gradient, formed in part."""

import copy
import io

import oracle
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import ssprop_patch as ssp
from ssprop_patch import kernels, lazy_grad, native
from ssprop_patch.deferred import NormGradient
from ssprop_patch.selection import l1_scores, l2_scores
from ssprop_patch.ways import Ways

RATE = 0.6

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


ORDER = {"l1": 1, "l2": 2}
SCORES = {"l1": l1_scores, "l2": l2_scores}
CAN_BUILD = native.build.find_compiler() is not None
needs_compiler = pytest.mark.skipif(not CAN_BUILD, reason="no C compiler")


class Way:
    """Which selection, computed by what."""

    def __init__(self, selection):
        self.selection, self.order = selection, ORDER[selection]

    def unfused(self, dy):
        """The selection by another name: no norm defers for it."""
        return SCORES[self.selection](dy.clone())


@pytest.fixture(
    params=[
        pytest.param(("l1", "C"), marks=needs_compiler),
        pytest.param(("l2", "C"), marks=needs_compiler),
        ("l2", "torch"),
    ],
    ids="-".join,
)
def way(request, monkeypatch):
    selection, by = request.param
    if by == "torch":
        monkeypatch.setattr(native.tensors, "library", lambda *args: None)
    return Way(selection)


@pytest.fixture
def formed(monkeypatch):
    """How often a deferred gradient was formed whole, and how often in part."""
    counts = {"whole": 0, "part": 0, "masked": 0}

    def counted(name, original):
        def count(self, *args):
            counts[name] += 1
            return original(self, *args)

        return count

    for name, method in (("whole", "form"), ("part", "take"), ("masked", "form_masked")):
        monkeypatch.setattr(NormGradient, method, counted(name, getattr(NormGradient, method)))
    return counts


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    monkeypatch.setattr(lazy_grad, "_MIN_ELEMENTS", 0)
    monkeypatch.setattr(lazy_grad, "_MIN_RELU_ELEMENTS", 0)


def net(dims=2, groups=1, norm=None, **kwargs):
    make = norm or NORM[dims]
    return nn.Sequential(
        CONV[dims](3, 8, 3, padding=1), make(8, **kwargs), nn.ReLU(inplace=norm is None),
        CONV[dims](8, 16, 3, stride=2, groups=groups, bias=False), make(16, **kwargs), nn.Tanh(),
        CONV[dims](16, 4, 1),
    ).double()  # fmt: skip


def inputs(dims=2, channels=3):
    return torch.randn(4, channels, *[9] * dims, dtype=torch.double, requires_grad=True)


def spread_out(model):
    """Give the norms weights and buffers of every size, as in a network that has been trained."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
            nn.init.uniform_(m.weight, -2, 2)
            nn.init.normal_(m.bias)
    return model


def step(model, x, weigh=None):
    """Gradients of input and parameters, output and buffers, of one training pass."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = model(x)
    weigh = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    (out * weigh).sum().backward()
    grads = [x.grad, *(p.grad for p in model.parameters())]
    return grads, [out.detach(), *(b.clone() for b in model.buffers())]


def assert_same(got, expected, tolerance=1e-10):
    # Of the largest of all: a bias in front of a batch norm has no gradient but rounding.
    largest = max(b.abs().max().item() for b in expected if b is not None)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * largest)


def compare_with_oracle(way, model, x):
    model = spread_out(model)
    dense = copy.deepcopy(model)
    with oracle.network(dense, RATE, order=way.order) as record:
        expected, expected_state = step(dense, x)
    assert record.dropped and record.gap > 1e-9
    ssp.convert(model, RATE, selection=way.selection)
    got, state = step(model, x)
    assert_same(got, expected)
    for a, b in zip(state, expected_state, strict=True):
        assert torch.equal(a, b)


# --- the gradient -----------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_is_that_of_the_masked_dense_network(way, dims, formed):
    compare_with_oracle(way, net(dims), inputs(dims))
    assert formed == {"whole": 0, "part": 2, "masked": 0}


@pytest.mark.parametrize(
    "kwargs",
    [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.5}],
    ids=str,
)
def test_of_every_kind_of_batch_norm(way, kwargs, formed):
    compare_with_oracle(way, net(**kwargs), inputs())
    assert formed["part"] == 2


def test_of_timms_norm_with_an_activation(way, formed):
    compare_with_oracle(way, net(norm=BatchNormAct2d), inputs())
    assert formed["part"] == 2


def test_of_a_grouped_convolution(way, formed, monkeypatch):
    monkeypatch.setattr(kernels, "by_rule", lambda *args: Ways("mask", "mask"))
    compare_with_oracle(way, net(groups=4), inputs())
    assert formed["masked"] > 0 and formed["whole"] == 0


def test_of_a_depthwise_convolution(way, formed):
    layers = nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)
    model = nn.Sequential(*layers).double()
    compare_with_oracle(way, model, inputs(channels=6))
    assert formed == {"whole": 0, "part": 1, "masked": 0}


@pytest.mark.parametrize("groups", [1, 4])
def test_in_channels_last(way, groups, formed):
    model = net(groups=groups).to(memory_format=torch.channels_last)
    compare_with_oracle(way, model, inputs().contiguous(memory_format=torch.channels_last))
    assert formed["whole"] == 0


def test_with_frozen_parts(way, formed):
    model = net()
    model[0].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    model[4].requires_grad_(False)
    compare_with_oracle(way, model, inputs())
    assert formed["part"] == 2


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "regnety_002", "densenet121"])
def test_in_networks(way, name, formed):
    model = spread_out(timm.create_model(name, num_classes=5).double().train())
    for m in model.modules():  # nothing drawn at random between the two sides
        if isinstance(m, nn.Dropout) or type(m).__name__ == "DropPath":
            m.p = m.drop_prob = 0.0
    x = torch.randn(3, 3, 48, 48, dtype=torch.double)
    other = copy.deepcopy(model)
    ssp.convert(model, RATE, selection=way.selection)
    ssp.convert(other, RATE, selection=way.unfused)
    got, state = step(model, x)
    assert formed["part"] + formed["masked"] >= 15 and formed["whole"] == 0
    expected, expected_state = step(other, x)
    # Less than of one norm alone: rounding in one layer is input to the next.
    assert_same(got, expected, 1e-7)
    assert_same(state, expected_state, 0.0)


def test_of_few_elements_is_torchs_own(way, formed, monkeypatch):
    monkeypatch.setattr(lazy_grad, "_MIN_ELEMENTS", 2**17)
    compare_with_oracle(way, net(), inputs())
    assert not any(formed.values())


def test_of_few_positions_is_torchs_own(way, formed):
    compare_with_oracle(way, net(), torch.randn(2, 3, 5, 5, dtype=torch.double))  # 2 * 2 * 2 behind
    assert formed["part"] == 1


# --- who else reads the gradient ---------------------------------------------------------------


class Branching(nn.Module):
    """Uses what the convolution returns twice: in the norm and beside it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.double()

    def forward(self, x):
        y = self.conv(x)
        return self.last(self.norm(y) + y.square())


def test_is_whole_where_another_use_adds_its_own(way, formed):
    compare_with_oracle(way, Branching(), inputs())
    assert formed["whole"] == 1 and formed["part"] == 0


@pytest.mark.parametrize("which", [0, 1])
def test_with_full_backward_hooks(way, which, formed):
    model, seen = net(), []
    model[2] = nn.ReLU()  # the hook's view of the norm's output refuses to be changed in place
    model[which].register_full_backward_hook(lambda m, gi, go: seen.append(gi))
    compare_with_oracle(way, model, inputs())
    assert seen and formed["part"] == 1 and formed["whole"] == 0  # the other pair


def test_a_hook_of_the_tensor_sees_and_changes_the_gradient(way):
    model = spread_out(net())
    other = copy.deepcopy(model)
    x, seen = inputs(), {}
    for side, m in (("deferred", model), ("ordinary", other)):
        def hook(grad, side=side):
            seen[side] = grad.clone()
            return grad * 2

        m[0].register_forward_hook(lambda _, args, y, hook=hook: y.register_hook(hook) and None)
    ssp.convert(model, RATE, selection=way.selection)
    ssp.convert(other, RATE, selection=way.unfused)
    got, expected = step(model, x)[0], step(other, x)[0]
    assert_same(got, expected)
    torch.testing.assert_close(seen["deferred"], seen["ordinary"], rtol=1e-10, atol=1e-12)


def test_asked_for_it_is_a_tensor_like_any_other(way):
    model = ssp.convert(net(), RATE, selection=way.selection)
    seen = []
    model[0].register_forward_hook(lambda _, args, y: seen.append(y))
    out = model(inputs())
    (grad,) = torch.autograd.grad(out.square().sum(), seen, retain_graph=True)
    ssp.convert(model, RATE, selection=way.unfused)
    reference = torch.autograd.functional.vjp(lambda y: model[1:](y), seen[0], 2 * out)[1]
    torch.testing.assert_close(torch.from_numpy(grad.numpy()), reference, rtol=1e-9, atol=1e-12)
    assert repr(grad) == repr(grad + 0)
    saved = io.BytesIO()
    torch.save(grad, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=True), grad + 0)


def test_retained_on_the_output(way):
    model = ssp.convert(net(), RATE, selection=way.selection)
    kept = []
    model[0].register_forward_hook(lambda _, args, y: (y.retain_grad(), kept.append(y)) and None)
    model(inputs()).sum().backward()
    assert type(kept[0].grad) is torch.Tensor and kept[0].grad.shape == kept[0].shape


# --- ways of training -------------------------------------------------------------------------


def two_sides(way, **kwargs):
    model = spread_out(net(**kwargs))
    other = copy.deepcopy(model)
    return (
        ssp.convert(model, RATE, selection=way.selection),
        ssp.convert(other, RATE, selection=way.unfused),
    )


def test_twice_through_a_retained_graph(way):
    grads = []
    for model in two_sides(way):
        loss = model(inputs_once()).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert_same(*grads)


def inputs_once():
    return torch.randn(4, 3, 9, 9, dtype=torch.double, generator=torch.Generator().manual_seed(3))


def test_double_backward(way):
    grads = []
    for model in two_sides(way):
        x = inputs_once().requires_grad_()
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    assert_same(*grads)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(way, reentrant, formed):
    grads = []
    for model in two_sides(way):
        x = inputs_once().requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    assert_same(*grads)
    assert formed["part"] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(way, dtype, formed):
    outs = []
    for model in two_sides(way):
        model.float()
        x = inputs_once().float()
        with torch.autocast("cpu", dtype):
            out = model(x)
        out.float().square().sum().backward()
        outs.append((out, [p.grad for p in model.parameters()]))
    # In half precision the sums of |dy| are not computed apart.
    assert formed["part"] == (2 if way.order == 2 else 0)
    assert torch.equal(outs[0][0], outs[1][0])
    # The same kernels on the same chosen channels.
    for a, b in zip(outs[0][1], outs[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * b.abs().max().item())


@pytest.mark.parametrize("mode", ["norm", "all"])
def test_in_eval_mode_all_is_dense(way, mode, formed):
    model = spread_out(net())
    dense = copy.deepcopy(model)
    ssp.convert(model, RATE, selection=way.selection)
    for m in (model, dense):
        if mode == "all":
            m.eval()
        else:
            m[1].eval()
            m[4].eval()
    if mode == "all":
        got, expected = step(model, inputs_once()), step(dense, inputs_once())
        assert_same([*got[0], *got[1]], [*expected[0], *expected[1]], 0.0)
    else:  # the convolutions are sparse, on a gradient that is not the closed form's
        with oracle.network(dense, RATE, order=way.order):
            expected = step(dense, inputs_once())[0]
        assert_same(step(model, inputs_once())[0], expected)
    assert not any(formed.values())


def test_at_rate_0_all_is_dense(way, formed):
    model = spread_out(net())
    expected = step(copy.deepcopy(model), inputs_once())
    got = step(ssp.convert(model, 0.0, selection=way.selection), inputs_once())
    assert_same([*got[0], *got[1]], [*expected[0], *expected[1]], 0.0)
    assert not any(formed.values())


def test_compiled_without_a_graph_break(way):
    model, other = two_sides(way)
    counter = CompileCounterWithBackend("aot_eager")
    got = step(torch.compile(model, backend=counter, fullgraph=True), inputs_once())[0]
    assert counter.frame_count == 1
    assert_same(got, step(other, inputs_once())[0])


def test_under_compiled_autograd_the_backward_is_one_graph(way, formed):
    grads = []
    for model in two_sides(way):
        loss = model(inputs_once()).square().sum()
        counters.clear()
        torch._dynamo.reset()
        torch._dynamo.compiled_autograd.reset()
        with torch._dynamo.config.patch(compiled_autograd=True):
            torch.compile(lambda loss: loss.backward(), backend="aot_eager")(loss)
        breaks = [reason for reason in counters["graph_break"] if "backward() call" not in reason]
        assert counters["compiled_autograd"]["captures"] == 1 and not breaks
        grads.append([p.grad for p in model.parameters()])
    assert_same(*grads)
    assert not any(formed.values())


def test_batched_gradients_are_a_clear_error(way):
    model, x = ssp.convert(net(), RATE, selection=way.selection), inputs()
    y = model(x)
    with pytest.raises(RuntimeError, match=r"does not work inside torch\.func.*is_grads_batched"):
        torch.autograd.grad(y, x, torch.ones(2, *y.shape).double(), is_grads_batched=True)


@needs_compiler
def test_when_the_c_functions_go_away_in_between_the_gradient_is_right(monkeypatch):
    model = spread_out(net())
    dense, x = copy.deepcopy(model), inputs_once()
    with oracle.network(dense, RATE):
        expected = step(dense, x)[0]
    ssp.convert(model, RATE)
    x.requires_grad_()
    out = model(x)
    monkeypatch.setattr(native.tensors, "library", lambda *args: None)
    weigh = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    (out * weigh).sum().backward()
    assert_same([x.grad, *(p.grad for p in model.parameters())], expected)


# --- the layers are left alone ------------------------------------------------------------------


def test_no_class_and_no_hook_of_a_norm_or_an_activation_changes(way):
    model = net(norm=BatchNormAct2d)
    others = [m for m in model if not isinstance(m, nn.Conv2d)]
    before = [(type(m), dict(vars(m))) for m in others]
    ssp.convert(model, RATE, selection=way.selection)
    step(model, inputs())
    assert [(type(m), dict(vars(m))) for m in others] == before


def test_under_l1_without_a_compiler_the_gradients_are_torchs_own(formed, monkeypatch):
    monkeypatch.setattr(native.tensors, "library", lambda *args: None)
    compare_with_oracle(Way("l1"), net(), inputs())
    assert not any(formed.values())


def test_copies_and_pickles_defer_too(way, formed):
    model = ssp.convert(spread_out(net()), RATE, selection=way.selection)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    expected = step(copy.deepcopy(model), inputs_once())[0]
    assert_same(step(torch.load(saved, weights_only=False), inputs_once())[0], expected, 0.0)
    assert formed["part"] == 4


def test_an_optimizer_that_steps_within_the_backward(way, formed):
    # The weight of a norm changes before the convolution in front of it asks for its gradient.
    def change(p):
        p.data.add_(1.0)

    grads = []
    for model in two_sides(way):
        for p in (*model[1].parameters(), *model[4].parameters()):
            p.register_post_accumulate_grad_hook(change)
        x = inputs_once().requires_grad_()
        model(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    assert_same(*grads)
    assert formed["part"] == 2


class CallsTheOther(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + torch.batch_norm(
            x * 2, None, None, None, None, True, 0.1, 1e-5, False
        )


class CallsBoth(nn.BatchNorm2d):
    def forward(self, x):
        own = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True)
        return own + F.batch_norm(x * 2, None, None, training=True)


@pytest.mark.parametrize("norm", [CallsTheOther, CallsBoth])
def test_a_norm_of_another_tensor_is_left_alone(way, norm, formed):
    compare_with_oracle(way, net(norm=norm), inputs())
    assert formed["part"] == 0 and formed["whole"] == 2


class Frozen(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False)


def test_a_forward_that_keeps_to_the_running_statistics_in_training(way, formed):
    compare_with_oracle(way, net(norm=Frozen), inputs())
    assert formed["part"] == 0


def test_metered_it_defers_too(way, formed):
    model = ssp.convert(spread_out(net()), RATE, selection=way.selection)
    expected = step(copy.deepcopy(model), inputs_once())[0]
    before = dict(formed)
    with ssp.Meter(model):
        got = step(model, inputs_once())[0]
    assert_same(got, expected, 0.0)
    assert formed["part"] == before["part"] + 2 and not formed["whole"]
