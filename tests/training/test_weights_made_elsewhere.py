"""Weights that are computed: parametrizations, norms by hooks, pruning; before and after."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import ssprop_patch as ssp

from .by_hand import compare, loss_of, net, ordinary, sgd, tiny

BOTH = pytest.mark.parametrize("when", ["before", "after"])


class Centred(nn.Module):
    """A parametrization of one's own: filters of mean zero."""

    def forward(self, weight):
        return weight - weight.mean(dim=(1, 2, 3), keepdim=True)


def centred(conv):
    return parametrize.register_parametrization(conv, "weight", Centred())


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": centred,
    "own over weight_norm": lambda conv: centred(parametrizations.weight_norm(conv)),
}
BY_HOOKS = {
    "weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
}


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def train(model):
    return ordinary(model, lr=0.01)


def compare_changed(make, change, when):
    """Train with ``change`` put on each convolution before or after conversion."""

    def put_on(model):
        for conv in convolutions(model):
            change(conv)
        return model

    if when == "after":
        return compare(make, train, after=put_on)
    return compare(lambda: put_on(make()), train)


def assert_same_weights(model, plain):
    assert list(model.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(
        dict(model.named_parameters()), dict(plain.named_parameters()), rtol=1e-9, atol=1e-11
    )


# --- parametrizations ---------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("put_on", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
@pytest.mark.parametrize("make", [tiny, net], ids=["tiny", "test_resnet"])
def test_a_parametrized_network(make, put_on, when):
    model, plain = compare_changed(make, put_on, when)
    if when == "after":  # what was put on last comes off first
        for verb, function in (("convert", ssp.convert), ("revert", ssp.revert)):
            with pytest.raises(
                ValueError, match=rf"(?s)cannot {verb}.*remove_parametrizations.*then"
            ):
                function(model)
        assert ssp.is_converted(model)
    else:
        ssp.revert(model)
    for m in (model, plain):
        for conv in convolutions(m):
            parametrize.remove_parametrizations(conv, "weight")
    if when == "after":
        assert ssp.is_converted(model)
        ssp.revert(model)
    assert {type(conv) for conv in convolutions(model)} == {nn.Conv2d}
    assert_same_weights(model, plain)


def test_a_parametrization_that_was_there_first_comes_off_once_the_layer_is_reverted():
    """Before, it is refused, and the layer goes on as it was."""
    conv = parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
    images, weight = torch.randn(2, 3, 6, 6), conv.weight.detach().clone()
    ssp.convert(conv, 0.5)
    y = conv(images)
    with pytest.raises(AttributeError, match="weight"):
        parametrize.remove_parametrizations(conv, "weight")
    assert ssp.is_converted(conv) and parametrize.is_parametrized(conv, "weight")
    assert torch.equal(conv(images), y)
    ssp.revert(conv)
    parametrize.remove_parametrizations(conv, "weight")
    assert type(conv) is nn.Conv2d and torch.equal(conv.weight, weight)


# --- norms by hooks -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@BOTH
@pytest.mark.parametrize("put_on, take_off", BY_HOOKS.values(), ids=BY_HOOKS)
@pytest.mark.parametrize("make", [tiny, net], ids=["tiny", "test_resnet"])
def test_a_network_with_norms_by_hooks(make, put_on, take_off, when):
    """These know nothing of classes, so that the order is free."""
    model, plain = compare_changed(make, put_on, when)
    ssp.revert(model)
    for m in (model, plain):
        for conv in convolutions(m):
            take_off(conv)
    assert {type(conv) for conv in convolutions(model)} == {nn.Conv2d}
    assert_same_weights(model, plain)


# --- pruning ------------------------------------------------------------------------------------

PRUNINGS = {
    "l1": lambda conv: prune.l1_unstructured(conv, "weight", 0.4),
    "random": lambda conv: prune.random_unstructured(conv, "weight", 0.4),
    "channels": lambda conv: prune.ln_structured(conv, "weight", 0.5, n=2, dim=0),
    "twice": lambda conv: prune.l1_unstructured(
        prune.ln_structured(conv, "weight", 0.3, n=2, dim=0), "weight", 0.3
    ),
}


@BOTH
@pytest.mark.parametrize("put_on", PRUNINGS.values(), ids=PRUNINGS)
@pytest.mark.parametrize("make", [tiny, net], ids=["tiny", "test_resnet"])
def test_a_pruned_network(make, put_on, when):
    model, plain = compare_changed(make, put_on, when)
    for conv in convolutions(model):
        assert not conv.weight_orig.grad[conv.weight_mask == 0].any()
    ssp.revert(model)
    for m in (model, plain):
        for conv in convolutions(m):
            prune.remove(conv, "weight")
    assert_same_weights(model, plain)


def test_pruning_over_all_layers_and_more_of_it_between_the_steps():
    def train(model):
        optimizer = None
        for i in range(3):
            prune.global_unstructured(
                [(conv, "weight") for conv in convolutions(model)], prune.L1Unstructured, amount=0.2
            )
            optimizer = optimizer or sgd(model)  # pruning replaces the parameters
            optimizer.zero_grad()
            loss_of(model, i).backward()
            optimizer.step()
            yield [conv.weight_mask.sum() for conv in convolutions(model)]

    compare(net, train, steps=3)


# --- several layers, one weight -------------------------------------------------------------------


def test_two_layers_that_share_a_weight():
    """Each chooses by its own gradient, and the weight gets the sum."""

    def make():
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.Tanh(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
        model[4].weight = model[2].weight
        return model.double()

    compare(make, train)
