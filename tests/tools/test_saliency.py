"""Grad-CAM and saliency maps, written by hand as everybody does: by hooks on one convolution."""

import contextlib

import oracle
import pytest
import torch

import ssprop_patch as ssp

from .networks import assert_equal, assert_same, from_timm, images

RATE = 0.6
LAYERS = {"test_resnet": "layer3.0.conv2", "test_nfnet": "stages.2.0.conv3"}


@contextlib.contextmanager
def watched(layer):
    """What Grad-CAM looks at: the activation that leaves ``layer``, and the gradient there."""
    seen = {}

    def forward(module, args, out):
        seen["activation"] = out

    def backward(module, grad_input, grad_output):
        seen["grad_input"], seen["grad_output"] = grad_input[0], grad_output[0]

    handles = [layer.register_forward_hook(forward), layer.register_full_backward_hook(backward)]
    yield seen
    for handle in handles:
        handle.remove()


def explain(model, name, x):
    """Grad-CAM for class 1, what its hooks saw, and the saliency of the pixels."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with watched(model.get_submodule(name)) as seen:
        model(x)[:, 1].sum().backward()
    weights = seen["grad_output"].mean((2, 3), keepdim=True)
    cam = (weights * seen["activation"]).sum(1).relu()
    return {"cam": cam.detach(), "saliency": x.grad, **{n: t.detach() for n, t in seen.items()}}


@pytest.mark.parametrize("name", LAYERS)
def test_the_maps_of_an_evaluated_network_are_exact(name):
    x, layer = images(size=32), LAYERS[name]
    expected = explain(from_timm(name).eval(), layer, x)
    found = explain(ssp.convert(from_timm(name), RATE).eval(), layer, x)
    assert_equal(found, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_hooks_on_a_layer_in_training_see_the_gradients_of_the_sparse_network(name):
    x, layer, plain = images(size=32), LAYERS[name], from_timm(name)
    with oracle.network(plain, RATE) as record:
        expected = explain(plain, layer, x)
    assert record.dropped and record.gap > 1e-6
    assert_same(explain(ssp.convert(from_timm(name), RATE), layer, x), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_the_maps_of_a_network_in_training_are_exact_within_dense(name):
    x, layer = images(size=32), LAYERS[name]
    expected = explain(from_timm(name), layer, x)
    model = ssp.convert(from_timm(name), RATE)
    with ssp.dense(model):
        assert_equal(explain(model, layer, x), expected)
    assert not torch.equal(explain(model, layer, x)["saliency"], expected["saliency"])


def test_the_layers_watched_are_stock_and_of_their_own_forward():
    classes = [type(from_timm(name).get_submodule(layer)) for name, layer in LAYERS.items()]
    assert [cls.__name__ for cls in classes] == ["Conv2d", "ScaledStdConv2d"]
