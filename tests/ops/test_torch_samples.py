"""torch's own samples for convolutions and Linear, run through converted layers and the functions.

``module_db`` and ``op_db`` are what torch tests itself with. They are private: a torch that has
them no more, or without what they need, is skipped, and the reason names the module.
"""

import contextlib
import copy
import pickle
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from oracle import choose
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import ssprop_patch as ssp
from ssprop_patch import functional

_INTERNAL = "torch.testing._internal"
modules = pytest.importorskip(f"{_INTERNAL}.common_modules", exc_type=ImportError)
operators = pytest.importorskip(f"{_INTERNAL}.common_methods_invocations", exc_type=ImportError)

LAYERS = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
    "linear": nn.Linear,
}
REAL = [torch.float32, torch.float64, torch.bfloat16]
COMPLEX = [torch.complex64, torch.complex128]


@dataclass
class Sample:
    """A layer of torch's and what to call it with."""

    layer: nn.Module
    x: torch.Tensor
    call: dict | None = None  # the arguments of the function, where it is a sample of that

    @property
    def transposed(self):
        return "Transpose" in type(self.layer).__name__

    @property
    def channels(self):
        return getattr(self.layer, "out_channels", None) or self.layer.out_features


def of_module(name, dtype):
    """torch's samples for the layer."""
    (info,) = (info for info in modules.module_db if info.module_cls is LAYERS[name])
    arguments = {"device": "cpu", "dtype": dtype, "requires_grad": True, "training": True}
    for sample in info.module_inputs_func(info, **arguments):
        made, given = sample.constructor_input, sample.forward_input
        layer = info.module_cls(*made.args, **made.kwargs, dtype=dtype)
        (x,) = (*given.args, *given.kwargs.values())
        yield Sample(layer, x.detach().requires_grad_())


def of_operator(name, dtype):
    """torch's samples for the function, as layers with that weight and those arguments."""
    (info,) = (info for info in operators.op_db if info.name == f"nn.functional.{name}")
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        function = getattr(F, name)
        names = ("weight", "bias", "stride", "padding")
        call = dict(zip(names, sample.args, strict=False)) | sample.kwargs
        weight, bias = call.pop("weight"), call.pop("bias", None)
        if name == "linear":
            arguments = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
        else:
            groups = call.get("groups", 1)
            arguments = call | {
                "in_channels": sample.input.shape[-weight.dim() + 1],
                "out_channels": weight.shape[1] * groups if "trans" in name else weight.shape[0],
                "kernel_size": tuple(weight.shape[2:]),
            }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights without elements
            layer = LAYERS[name](**arguments, bias=bias is not None, dtype=dtype)
        layer.weight = nn.Parameter(weight.detach())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach())
        x = sample.input.detach().requires_grad_()
        wanted = function(sample.input, *sample.args, **sample.kwargs)
        assert torch.equal(layer(x), wanted)  # the layer is what the sample means
        yield Sample(layer, x, call)


@pytest.fixture(params=[of_module, of_operator], ids=["ModuleInfo", "OpInfo"])
def samples(request):
    def found(name, dtype):
        all_of_them = list(request.param(name, dtype))
        assert len(all_of_them) >= 2
        return all_of_them

    return found


def convert(sample, rate):
    """A converted copy; where there is nothing to choose from it stays dense, and that is said."""
    layer = copy.deepcopy(sample.layer)
    alone = sample.channels == 1
    said = pytest.warns(UserWarning, match="one output channel")
    with said if alone else contextlib.nullcontext():
        ssp.convert(layer, rate, types=type(layer), strict=not alone)
    assert ssp.is_converted(layer) is not alone
    return layer


def leaves(layer, x):
    return [x, *layer.parameters()]


def run(layer, x, dy=None):
    """The output, its gradient, and those of input, weight and bias."""
    y = layer(x)
    if dy is None:
        generator = torch.Generator().manual_seed(y.numel())
        dy = torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y.dtype)
    return y, dy, torch.autograd.grad(y, leaves(layer, x), dy)


def assert_bits(found, wanted):
    assert torch.equal(found[0], wanted[0])
    for got, want in zip(found[2], wanted[2], strict=True):
        assert torch.equal(got, want) and got.dtype == want.dtype


def as_function(sample, rate):
    """The sample as a call of ``ssprop_patch.functional``."""
    name = next(name for name, cls in LAYERS.items() if cls is type(sample.layer))
    layer = copy.deepcopy(sample.layer)

    def forward(x):
        arguments = sample.call | {"drop_rate": rate}
        return getattr(functional, name)(x, layer.weight, layer.bias, **arguments)

    layer.forward = forward
    return layer


def variants(sample, rate):
    yield convert(sample, rate)
    if sample.call is not None:
        yield as_function(sample, rate)


# --- rate 0 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_at_rate_0_all_is_bit_equal(samples, name, dtype):
    for sample in samples(name, dtype):
        wanted = run(sample.layer, sample.x)
        for layer in variants(sample, 0.0):
            assert_bits(run(layer, sample.x), wanted)


@pytest.mark.parametrize("name", LAYERS)
def test_at_rate_0_first_and_second_derivatives_and_batches_of_gradients(samples, name):
    for sample in samples(name, torch.float64):
        for layer in variants(sample, 0.0):
            names = [name for name, _ in layer.named_parameters()]

            def call(x, *values, layer=layer, names=names):
                values = dict(zip(names, values, strict=True))
                return torch.func.functional_call(layer, values, (x,))

            inputs = [t.detach().requires_grad_() for t in leaves(layer, sample.x)]
            assert gradcheck(call, inputs, fast_mode=True, check_batched_grad=True)
            assert gradgradcheck(call, inputs, fast_mode=True, check_batched_grad=True)


# --- rate 0.5 -----------------------------------------------------------------------------------


def reference(sample, dy):
    """The dense gradients, in float64, of a gradient of which half of the channels are left.

    Also the same with all numbers positive: what rounding is relative to.
    """
    layer, x = copy.deepcopy(sample.layer).double(), sample.x.detach().double().clone()
    x.requires_grad_()
    wide = dy.double()
    if isinstance(layer, nn.Linear):
        rows = wide.reshape(-1, wide.shape[-1])
        keep = choose(rows, 1, 0.5).keep if rows.numel() else torch.ones(rows.shape[1]).bool()
        masked = wide * keep
    else:
        batched = wide if wide.dim() == layer.weight.dim() else wide[None]
        keep = choose(batched, layer.groups, 0.5).keep
        masked = (batched * keep.view(-1, *[1] * (layer.weight.dim() - 2))).view_as(wide)
    grads = run(layer, x, masked)[2]
    with torch.no_grad():
        for t in leaves(layer, x):
            t.abs_()
    return grads, run(layer, x, masked.abs())[2], keep


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_at_rate_a_half_it_is_the_reference(samples, name, dtype):
    dropped = 0
    for sample in samples(name, dtype):
        y, dy, _ = run(sample.layer, sample.x)
        wanted, sizes, keep = reference(sample, dy)
        dropped += int((~keep).sum())
        for layer in variants(sample, 0.5):
            found = run(layer, sample.x, dy)
            assert torch.equal(found[0], y)
            for got, want, size in zip(found[2], wanted, sizes, strict=True):
                assert got.dtype == dtype and got.shape == want.shape
                # A few roundings of each sum; a channel that is dropped is zero exactly.
                assert ((got - want).abs() <= 4 * torch.finfo(dtype).eps * size).all()
    assert dropped


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_copied_pickled_and_reverted(samples, name, dtype):
    for sample in samples(name, dtype):
        layer, dense = convert(sample, 0.5), run(sample.layer, sample.x)
        wanted = run(layer, sample.x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(twin) is type(layer)
            assert_bits(run(twin, sample.x), wanted)
            assert type(ssp.revert(twin)) is type(sample.layer)
            assert_bits(run(twin, sample.x), dense)
        assert_bits(run(ssp.revert(layer), sample.x), dense)
        assert vars(layer).keys() == vars(sample.layer).keys()


# --- complex ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_complex_numbers_are_refused_with_the_reason(samples, name, dtype):
    for sample in samples(name, dtype):
        wanted = run(sample.layer, sample.x)
        reason = "one output channel" if sample.channels == 1 else "complex weights"
        with pytest.raises(ValueError, match=reason):
            ssp.convert(sample.layer, 0.5, types=LAYERS[name])
        with pytest.warns(UserWarning, match=reason):
            ssp.convert(sample.layer, 0.5, types=LAYERS[name], strict=False)
        assert_bits(run(sample.layer, sample.x), wanted)
        if sample.call is not None:
            assert_bits(run(as_function(sample, 0.0), sample.x), wanted)
            if sample.channels > 1:
                with pytest.raises(TypeError, match=r"takes real tensors.*drop_rate=0"):
                    run(as_function(sample, 0.5), sample.x)
