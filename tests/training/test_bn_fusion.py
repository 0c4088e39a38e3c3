"""Folding batch norm into convolutions, as one does for inference."""

import copy
import itertools

import pytest
import timm
import timm.layers
import timm.utils
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

import ssprop_patch as ssp

from .by_hand import batch, compare, net, ordinary, run


def norms(model):
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def fused(model):
    """With each convolution that a batch norm follows directly, as a resnet's do."""
    for parent in model.modules():
        children = list(parent.named_children())
        for (name, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return model


def test_fusing_a_converted_network_gives_the_dense_fused_network():
    model = ssp.convert(net("test_resnet"), 0.5)
    run(model, ordinary)  # so that the norms have something to fold
    model.eval()
    images = batch(7)[0]
    before = model(images)
    plain = fused(ssp.revert(copy.deepcopy(model)))
    fused(model)
    assert norms(model) == 1  # behind the stem, which is a Sequential
    assert torch.equal(model(images), plain(images))
    torch.testing.assert_close(model(images), before, rtol=1e-9, atol=1e-9)
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)
    # Gradients of an evaluated network are exact, fused or not.
    for m in (model, plain):
        m.zero_grad()
        m(images).square().sum().backward()
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.equal(one.grad, two.grad)
    assert sum(p.grad is not None for p in model.parameters()) > 10
    ssp.revert(model)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}


def test_a_fused_layer_leaves_the_one_it_was_made_from_alone():
    conv, norm = nn.Conv2d(3, 8, 3).eval(), nn.BatchNorm2d(8).eval()
    ssp.convert(conv, 0.5)
    controller, weight = ssp.get_controller(conv), conv.weight.detach().clone()
    fused_conv = fuse_conv_bn_eval(conv, norm)
    assert fused_conv is not conv and torch.equal(conv.weight, weight)
    assert ssp.get_controller(conv) is controller
    assert ssp.get_controller(fused_conv) is not controller


def test_fusing_weights_by_hand():
    conv, norm = nn.Conv2d(3, 8, 3).double(), nn.BatchNorm2d(8).double()
    ssp.convert(conv, 0.5)
    for i in range(2):
        norm(conv(batch(i)[0])).sum().backward()
    images, norm = batch(3)[0], norm.eval()
    expected = norm(conv.eval()(images))
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    torch.testing.assert_close(conv(images), expected, rtol=1e-9, atol=1e-9)
    assert ssp.is_converted(conv)


@pytest.mark.parametrize("name, inplace", [("repvgg_a0", False), ("fastvit_t8", True)])
def test_reparameterized_models_of_timm(name, inplace):
    """Branches become one convolution: the same as of the network before conversion."""
    model = timm.create_model(name, num_classes=5).double()
    ssp.convert(model, 0.5)
    images = batch(0, n=2)[0]
    model(images).square().sum().backward()  # norms that have seen something
    model.eval()
    with torch.no_grad():
        before = model(images)
        plain = timm.utils.reparameterize_model(ssp.revert(copy.deepcopy(model)))
        merged = timm.utils.reparameterize_model(model, inplace=inplace)
        assert (merged is model) == inplace
        assert len(list(merged.modules())) == len(list(plain.modules()))
        assert torch.equal(merged(images), plain(images))
        torch.testing.assert_close(merged(images), before, rtol=1e-7, atol=1e-9)
    ssp.revert(merged)
    assert not ssp.is_converted(merged)
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    if not inplace:
        assert ssp.is_converted(model)


def test_norms_swapped_for_frozen_ones():
    """As in fine-tuning: the convolutions stay what they are, and train as by hand."""

    def frozen(model):
        timm.layers.freeze_batch_norm_2d(model)
        assert norms(model) == 0

    model, _ = compare(net, ordinary, after=frozen)
    assert all(ssp.is_converted(m) for m in model.modules() if isinstance(m, nn.Conv2d))
    timm.layers.unfreeze_batch_norm_2d(model)
    assert norms(model) > 1 and len(ssp.plan(model).converted) == len(ssp.plan(model))
