"""Weights that are not what they look like: of other dtypes, layouts and classes."""

import oracle
import pytest
import torch
from torch import nn
from torch.nn.utils._expanded_weights import ExpandedWeight
from torch.utils._pytree import tree_map

import ssprop_patch as ssp

TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)

# --- stored in one dtype, computed in another -----------------------------------------------------

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), (2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1), (2, 4, 8, 8)),
    "1x1": (lambda: nn.Conv2d(4, 8, 1), (2, 4, 8, 8)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 2), (2, 4, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 8, 3), (2, 4, 8, 8)),
    "linear": (lambda: nn.Linear(4, 8), (2, 5, 4)),
}
STORED = {
    "bfloat16": (torch.bfloat16, torch.float32),
    "float8": (torch.float8_e4m3fn, torch.float32),
    "float8 for bfloat16": (torch.float8_e4m3fn, torch.bfloat16),
    "float32 for float64": (torch.float32, torch.float64),
}


def cast_around_forward(layer, stored, computed):
    """What diffusers' enable_layerwise_casting does."""
    layer.to(stored)
    layer.register_forward_pre_hook(lambda m, args: m.to(computed) and None)
    layer.register_forward_hook(lambda m, args, y: m.to(stored) and None)


def gradients(layer, shape, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape, generator=generator).to(dtype)
    y.backward(dy)
    return x.grad, *(p.grad for p in layer.parameters())


@pytest.mark.parametrize("stored, computed", STORED.values(), ids=STORED)
@pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)
def test_a_weight_that_rests_in_another_dtype(make, shape, stored, computed):
    """As where it stays in the dtype that it computes in: the values are the same."""

    def made():
        torch.manual_seed(0)
        layer = make()
        for p in layer.parameters():
            p.data = p.data.to(stored).to(computed)
        return ssp.convert(layer, 0.5, types=TYPES)

    expected = gradients(made(), shape, computed)
    layer = made()
    cast_around_forward(layer, stored, computed)
    found = gradients(layer, shape, computed)
    assert layer.weight.dtype is stored
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert 0 < int((expected[2] == 0).sum()) < len(expected[2])


def test_a_weight_that_changes_in_place_is_torchs_error():
    for layer, shape in ((nn.Conv2d(4, 8, 3), (2, 4, 6, 6)), (nn.Linear(4, 8), (2, 4))):
        ssp.convert(layer, 0.5, types=TYPES)
        loss = layer(torch.randn(shape, requires_grad=True)).sum()
        with torch.no_grad():
            layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# --- subclasses -----------------------------------------------------------------------------------


class Tagged(nn.Parameter):
    """Carries an attribute, as PEFT's and others' do."""


class TaggedTensor(torch.Tensor):
    """The same, without being a parameter."""


class Halved(torch.Tensor):
    """A wrapper: holds half of its values, and knows what a layer's forward does with it."""

    @staticmethod
    def __new__(cls, whole):
        return torch.Tensor._make_wrapper_subclass(
            cls, whole.shape, dtype=whole.dtype, requires_grad=whole.requires_grad
        )

    def __init__(self, whole):
        self.half = whole.detach() / 2

    def __repr__(self):
        return "Halved()"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].half * 2)
        unwrap = lambda t: t.half * 2 if isinstance(t, Halved) else t  # noqa: E731
        return func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))


class Answers(nn.Parameter):
    """Means something else by a product, and only by that: what it holds is not its weight."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            args = [3 * a if isinstance(a, Answers) and func in PRODUCTS else a for a in args]
            return func(*args, **kwargs or {})


PRODUCTS = (torch.conv2d, nn.functional.conv2d, nn.functional.linear)


def pair():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 8))


def with_weights(wrap):
    model = pair()
    for layer in (model[0], model[2]):
        weight = wrap(layer.weight.detach())
        del layer.weight
        layer.register_parameter("weight", None)
        layer._parameters["weight"] = weight
    return model


def images():
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def grads(model):
    x = images().requires_grad_()
    model(x).pow(2).sum().backward()
    return [x.grad, *(p.grad for p in (model[0].bias, model[2].bias))]


@pytest.mark.parametrize(
    "wrap", [Tagged, lambda w: w.as_subclass(TaggedTensor).requires_grad_()], ids=["own", "tensor"]
)
def test_a_subclass_that_carries_attributes_is_a_weight_like_any_other(wrap):
    model = with_weights(wrap)
    assert len(ssp.plan(model, types=TYPES).converted) == 2
    found = grads(ssp.convert(model, 0.5, types=TYPES))
    with oracle.network(plain := pair(), 0.5, types=TYPES):
        expected = grads(plain)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("wrap", [Halved, Answers])
def test_a_subclass_with_operations_of_its_own_is_skipped(wrap):
    rows = ssp.plan(with_weights(wrap), types=TYPES)
    reason = f"its weight is a {wrap.__name__}, a tensor subclass with operations of its own"
    assert [(row.action, row.reason) for row in rows] == [("skip", reason)] * 2


@pytest.mark.parametrize("wrap", [Halved, Answers])
def test_a_subclass_put_in_after_conversion_trains_densely_and_says_so(wrap):
    """As torchao's quantize_ puts one into a converted model."""
    expected = grads(with_weights(wrap))
    model = ssp.convert(pair(), 0.5, types=TYPES)
    for layer, other in zip(model, with_weights(wrap), strict=True):
        if layer._parameters:
            layer._parameters["weight"] = other._parameters["weight"]
    with pytest.warns(UserWarning, match=f"Conv2d: its weight is a {wrap.__name__}.*stays dense"):
        found = grads(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_per_sample_gradients_of_torch_are_dense_ones_and_say_so():
    """ExpandedWeight, which answers to calls of layers only, not even to requires_grad."""
    conv = ssp.convert(nn.Conv2d(3, 8, 3), 0.5)
    x = images()
    weight = ExpandedWeight(conv.weight, 2, "sum")
    bias = ExpandedWeight(conv.bias, 2, "sum")
    with pytest.warns(UserWarning, match="its weight is a ExpandedWeight"):
        y = torch.func.functional_call(conv, {"weight": weight, "bias": bias}, (x,))
    y.pow(2).sum().backward()
    plain = ssp.reverted_copy(conv)
    for i in range(2):
        plain.zero_grad()
        plain(x[i : i + 1]).pow(2).sum().backward()
        torch.testing.assert_close(conv.weight.grad_sample[i], plain.weight.grad)


# --- layouts and dtypes ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*[Ss]parse.*:UserWarning")
def test_a_sparse_weight_is_skipped():
    layer = nn.Linear(4, 8)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr())
    (row,) = ssp.plan(layer, types=nn.Linear)
    assert (row.action, row.reason) == ("skip", "its weight has the layout torch.sparse_csr")


def test_an_integer_weight_is_skipped():
    layer = nn.Linear(4, 8)
    layer.weight = nn.Parameter(torch.ones(8, 4, dtype=torch.int8), requires_grad=False)
    (row,) = ssp.plan(layer, types=nn.Linear)
    assert (row.action, row.reason) == ("skip", "its weight is torch.int8, which has no gradient")


class Dequantizes(nn.Linear):
    """Holds integers, and makes its weight of them: as GGUF layers do."""

    def __init__(self):
        super().__init__(6, 8, bias=False)
        self.scale = 0.1
        whole = torch.randint(-9, 9, (8, 6), dtype=torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_a_layer_that_makes_its_weight_of_integers_is_sparse():
    layer = ssp.convert(Dequantizes(), 0.5, types=nn.Linear)
    x = torch.randn(4, 6, requires_grad=True)
    dy = torch.randn(4, 8)
    layer(x).backward(dy)
    kept = oracle.choose(dy, 1, 0.5).keep
    torch.testing.assert_close(x.grad, (dy * kept) @ (layer.weight.float() * 0.1))


class ByItself(torch.autograd.Function):
    """A product inside a function of its own, as bitsandbytes' 4 bit layers have it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.saved_tensors[0], None


class OutsideAutograd(nn.Linear):
    def forward(self, x):
        return ByItself.apply(x, self.weight)


def test_a_product_that_autograd_does_not_see_stays_dense_and_that_is_said():
    layer = ssp.convert(OutsideAutograd(6, 8), 0.5, types=nn.Linear)
    x, dy = torch.randn(4, 6, requires_grad=True), torch.randn(4, 8)
    with pytest.warns(UserWarning, match="OutsideAutograd.forward called no .*linear"):
        layer(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ layer.weight)
