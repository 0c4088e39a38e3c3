"""Activation checkpointing: the forward runs a second time inside the backward."""

import copy

import oracle
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import ssprop_patch as ssp

from .by_hand import batch, compare, loss_of, net, sgd, tiny

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


def loop(forward=None, half=None):
    """Two steps; with ``forward(model, images)`` in place of ``model(images)``."""

    def train(model):
        optimizer = sgd(model)
        dtype = torch.float32 if half else torch.float64
        for i in range(2):
            images, labels = batch(i, dtype=dtype)
            images.requires_grad_()  # the reentrant kind needs one that does
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=half, enabled=half is not None):
                out = model(images) if forward is None else forward(model, images)
                loss = nn.functional.cross_entropy(out, labels)
            (loss * 2**8).backward()
            for p in model.parameters():
                p.grad.div_(2**8)
            optimizer.step()
            yield loss.detach(), images.grad

    return train


# By hand nothing is computed a second time: in networks without batch norm, whose averages the
# second forward moves again, that must not show.


@REENTRANT
@pytest.mark.parametrize("name", ["test_convnext", "test_nfnet", "test_efficientnet_gn"])
def test_the_whole_network_in_one_checkpoint(name, reentrant):
    def forward(model, images):
        return checkpoint(model, images, use_reentrant=reentrant)

    compare(lambda: net(name), loop(forward), hand=loop())


@REENTRANT
def test_checkpoint_sequential(reentrant):
    def forward(model, images):
        return checkpoint_sequential(model, 3, images, use_reentrant=reentrant)

    compare(tiny, loop(forward), hand=loop())


@REENTRANT
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_with_autocast(half, reentrant):
    def forward(model, images):
        return checkpoint(model, images, use_reentrant=reentrant)

    compare(
        lambda: net("test_nfnet", torch.float32),
        loop(forward, half),
        hand=loop(None, half),
        exact=True,
    )


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_convnext", "test_efficientnet", "test_byobnet"]
)
def test_set_grad_checkpointing_of_timm(name):
    layers, forwards = 0, []

    def checkpointed(model):
        nonlocal layers
        model.set_grad_checkpointing()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                layers += 1
                module.register_forward_hook(lambda *_: forwards.append(1))
        optimizer = sgd(model)
        for i in range(2):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            optimizer.step()
            yield

    compare(lambda: net(name), checkpointed)
    # Two steps of both models: more forwards than one for each layer and step.
    assert len(forwards) > 2 * layers


# --- the rate changes between forward and backward ------------------------------------------------


def gradients(model, y):
    model.zero_grad()
    y.square().sum().backward()
    return [p.grad for p in model.parameters()]


def by_hand(model, x, rate):
    with oracle.network(model, rate) as record:
        grads = gradients(model, model(x))
    assert record.gap > 1e-9
    return grads


@pytest.mark.parametrize("then", [0.0, 0.25])
@pytest.mark.parametrize("first", [0.0, 0.75])
@pytest.mark.parametrize("name", ["test_resnet", "test_nfnet"])
def test_without_reentrance_the_rate_of_the_forward_counts(name, first, then):
    plain, x = net(name), batch(0)[0]
    model = ssp.convert(copy.deepcopy(plain), first)
    expected = by_hand(plain, x, first)
    y = checkpoint(model, x, use_reentrant=False)
    ssp.get_controller(model).drop_rate = then
    torch.testing.assert_close(gradients(model, y), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("then", [0.0, 0.25])
@pytest.mark.parametrize("first", [0.0, 0.75])
@pytest.mark.parametrize("name", ["test_resnet", "test_nfnet"])
def test_with_reentrance_the_rate_of_the_second_forward_counts(name, first, then):
    """That forward, inside the backward, is the one that is differentiated."""
    plain, x = net(name), batch(0)[0]
    model = ssp.convert(copy.deepcopy(plain), first)
    expected = by_hand(plain, x, then)
    y = checkpoint(model, x.requires_grad_(), use_reentrant=True)
    ssp.get_controller(model).drop_rate = then
    torch.testing.assert_close(gradients(model, y), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("first, then", [(0.0, 0.75), (0.75, 0.0)])
def test_autocast_and_a_change_of_rate(first, then):
    """Both paths save the same tensors, in the same dtypes, which the checkpoint compares."""
    model, x = net("test_resnet", torch.float32), batch(0, dtype=torch.float32)[0]
    ssp.convert(model, first)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(model, model(x).float())
        y = checkpoint(model, x, use_reentrant=False).float()
    ssp.get_controller(model).drop_rate = then
    for one, two in zip(gradients(model, y), expected, strict=True):
        assert torch.equal(one, two)
