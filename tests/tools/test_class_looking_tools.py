"""Fusion, quantization, re-parametrisation: some ask for a layer's exact class, and find another.

With these the rule is to revert first; what they do with a converted network must not be wrong.
"""

import copy

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.ao import quantization
from torch.ao.nn import quantized as quantized_nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval

import ssprop_patch as ssp

from .networks import (
    WSConv2d,
    assert_equal,
    assert_same,
    assert_trains_sparsely,
    from_timm,
    gradients,
    images,
    oracle_gradients,
)

RATE = 0.5

# Of torch.ao, which says that torchao takes its place.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def count(model, kind):
    return sum(isinstance(m, kind) for m in model.modules())


# --- fusing batch norm into convolutions --------------------------------------------------------


def evaluated():
    """With statistics that are not the initial ones."""
    model = from_timm("test_resnet", torch.float32)
    for i in range(2):
        model(images(4, 32, torch.float32) * (1 + i))
    return model.eval()


def test_fx_fusion_finds_no_convolution_in_a_converted_model_and_every_one_after_revert():
    x, model = images(size=32, dtype=torch.float32), evaluated()
    whole = fuse(evaluated())
    assert count(whole, nn.BatchNorm2d) == 0 < count(model, nn.BatchNorm2d)

    ssp.convert(model, RATE)
    not_fused = fuse(model)
    assert count(not_fused, nn.BatchNorm2d) == count(model, nn.BatchNorm2d)
    assert torch.equal(not_fused(x), model(x))

    fused = fuse(ssp.revert(model))
    assert count(fused, nn.BatchNorm2d) == 0 and not ssp.is_converted(fused)
    assert torch.equal(fused(x), whole(x))


def test_fusing_one_pair_keeps_the_convolution_converted():
    x, model = images(size=32).float(), nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model(x)
    ssp.convert(model.eval(), RATE)
    pair = copy.deepcopy(model)
    fused = fuse_conv_bn_eval(pair[0], pair[1])
    assert ssp.is_converted(fused) and ssp.get_controller(fused) is not ssp.get_controller(pair)
    plain = ssp.revert(model)
    expected = fuse_conv_bn_eval(plain[0], plain[1])
    assert torch.equal(fused(x), expected(x))
    fused.train()
    assert_same(
        gradients(fused, x), oracle_gradients(expected.train(), x, RATE), rtol=1e-5, atol=1e-6
    )


def test_timm_merges_the_branches_of_a_converted_network():
    """Into new convolutions, for inference: dense ones."""
    torch.manual_seed(0)
    plain = timm.create_model("mobileone_s0", num_classes=3).eval()
    model, x = ssp.convert(copy.deepcopy(plain), RATE), images(1, 32).float()
    merged, expected = reparameterize_model(model), reparameterize_model(plain)
    assert count(merged, nn.Conv2d) == count(expected, nn.Conv2d) < count(plain, nn.Conv2d)
    assert torch.equal(merged(x), expected(x))
    assert ssp.is_converted(model) and not ssp.is_converted(merged)


# --- quantization -------------------------------------------------------------------------------

ENGINE = next(
    (
        e
        for e in ("fbgemm", "x86", "onednn", "qnnpack")
        if e in torch.backends.quantized.supported_engines
    ),
    None,
)


def to_quantize(train=False):
    torch.manual_seed(0)
    layers = nn.Sequential(
        quantization.QuantStub(),
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        quantization.DeQuantStub(),
    )
    return layers.train(train)


def quantized(model, x):
    """After training: fuse, observe, swap the layers."""
    model = quantization.fuse_modules(model, [["1", "2", "3"]])
    model.qconfig = quantization.get_default_qconfig(ENGINE)
    model = quantization.prepare(model)
    model(x)
    return quantization.convert(model)


def quantized_by_fx(model, x):
    mapping = quantization.get_default_qconfig_mapping(ENGINE)
    model = prepare_fx(model, mapping, (x,))
    model(x)
    return convert_fx(model)


def quantized_layers(model):
    return [n for n, m in model.named_modules() if isinstance(m, quantized_nn.Conv2d)]


@pytest.mark.parametrize("quantize", [quantized, quantized_by_fx])
def test_quantization_after_revert_is_as_if_never_converted(quantize):
    x = images().float()
    expected = quantize(to_quantize(), x)
    found = quantize(ssp.revert(ssp.convert(to_quantize(), RATE)), x)
    assert quantized_layers(found) == quantized_layers(expected) != []
    assert torch.equal(found(x), expected(x))


def test_fusing_for_quantization_refuses_a_converted_model():
    model = ssp.convert(to_quantize(), RATE)
    with pytest.raises(AssertionError, match="did not find fuser method"):
        quantized(model, images().float())


def test_fx_quantization_leaves_converted_layers_in_floating_point():
    x, model = images().float(), ssp.convert(to_quantize(), RATE)
    found = quantized_by_fx(model, x)
    assert quantized_layers(found) == []
    # What else it quantizes keeps 8 bits: the output is as near as that.
    torch.testing.assert_close(found(x), model(x), rtol=0, atol=0.1 * model(x).abs().max().item())


def to_fine_tune():
    """Ready for quantization-aware training: layers that write their own forwards."""
    model = to_quantize(train=True)
    model.qconfig = quantization.get_default_qat_qconfig(ENGINE)
    return quantization.prepare_qat(quantization.fuse_modules_qat(model, [["1", "2", "3"]]))


def to_fine_tune_by_fx():
    model = to_quantize(train=True)
    mapping = quantization.get_default_qat_qconfig_mapping(ENGINE)
    return prepare_qat_fx(model, mapping, (images().float(),))


@pytest.mark.parametrize("prepared", [to_fine_tune, to_fine_tune_by_fx])
def test_quantization_aware_training_is_sparse_if_converted_once_prepared(prepared):
    x, model, plain = images(4).float(), ssp.convert(prepared(), RATE), prepared()
    assert len(ssp.plan(model).converted) == 2
    # float32, as fake quantization takes no other: sums of 150 terms
    expected = oracle_gradients(plain, x, RATE, least_gap=1e-3)
    assert_same(gradients(model, x), expected, rtol=1e-4, atol=1e-6)

    swap = quantization.convert if prepared is to_fine_tune else convert_fx
    found, expected = swap(ssp.revert(model).eval()), swap(plain.eval())
    assert quantized_layers(found) == quantized_layers(expected) != []
    assert torch.equal(found(x), expected(x))


def test_the_last_step_of_quantization_needs_revert_too():
    model = ssp.convert(to_fine_tune(), RATE).eval()
    assert quantized_layers(quantization.convert(model)) == []


def test_dynamic_quantization_of_the_linear_layers_leaves_the_convolutions_alone():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), WSConv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 3))

    x, model = images().float(), ssp.convert(make(), RATE).eval()
    found = quantization.quantize_dynamic(model, {nn.Linear})
    expected = quantization.quantize_dynamic(make().eval(), {nn.Linear})
    assert type(found[3]) is type(expected[3]) is not nn.Linear
    assert torch.equal(found(x), expected(x))
    assert_trains_sparsely(model.double(), lambda: make().double(), images(), RATE)
    assert_equal(gradients(model.eval(), images()), gradients(make().double().eval(), images()))
