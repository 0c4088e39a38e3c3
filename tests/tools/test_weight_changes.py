"""What changes the weight: parametrizations, norms by hooks, pruning."""

import pytest
import torch
import torch.fx
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import ssprop_patch as ssp

from .kinds import KINDS, image, rows

PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}


def weight_rows(conv):
    """Channels kept, by the gradient of the weight that comes out of the parametrization."""
    with parametrize.cached():
        weight = conv.weight
        weight.retain_grad()
        conv(image()).pow(2).sum().backward()
    return rows(weight.grad)


@pytest.mark.parametrize("put_on", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
@pytest.mark.parametrize("cls", KINDS)
def test_parametrized_before_conversion(cls, put_on):
    torch.manual_seed(0)
    conv = put_on(cls(3, 8, 3))
    parametrized = type(conv)
    x = conv.eval()(image())
    assert ssp.plan(conv).converted
    ssp.convert(conv, 0.5)
    assert torch.equal(conv(image()), x)
    assert weight_rows(conv.train()) == 4
    assert set(conv.state_dict()) == set(put_on(cls(3, 8, 3)).state_dict())
    assert weight_rows(conv.eval()) == 8
    ssp.revert(conv)
    assert type(conv) is parametrized
    parametrize.remove_parametrizations(conv, "weight")
    assert type(conv) is cls


@pytest.mark.parametrize("put_on", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
@pytest.mark.parametrize("cls", KINDS)
def test_parametrized_after_conversion(cls, put_on):
    torch.manual_seed(0)
    conv = ssp.convert(cls(3, 8, 3), 0.5)
    put_on(conv)
    assert ssp.is_converted(conv)
    assert weight_rows(conv) == 4
    for refused in (ssp.revert, ssp.convert):
        with pytest.raises(ValueError, match=r"(?s)remove_parametrizations.*then"):
            refused(conv)
    assert weight_rows(conv) == 4
    parametrize.remove_parametrizations(conv, "weight")
    assert ssp.is_converted(conv)
    ssp.revert(conv)
    assert type(conv) is cls


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("put_on", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("cls", KINDS)
def test_norms_by_hooks(cls, put_on, before):
    """The older ones, which compute the weight in a forward pre-hook."""
    torch.manual_seed(0)
    conv = cls(3, 8, 3)
    if before:
        put_on(conv)
    ssp.convert(conv, 0.5)
    if not before:
        put_on(conv)
    y = conv(image())
    conv.weight.retain_grad()  # what the hook made of the parameters behind it
    y.pow(2).sum().backward()
    assert rows(conv.weight.grad) == 4
    ssp.revert(conv)
    assert type(conv) is cls


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("cls", KINDS)
def test_pruning(cls, before):
    torch.manual_seed(0)
    conv = cls(3, 8, 3)
    if before:
        prune.random_unstructured(conv, "weight", 0.5)
    ssp.convert(conv, 0.5)
    if not before:
        prune.random_unstructured(conv, "weight", 0.5)
    conv(image()).pow(2).sum().backward()
    grad = conv.weight_orig.grad
    assert rows(grad) == 4 and not grad[conv.weight_mask == 0].any()
    prune.remove(conv, "weight")
    ssp.revert(conv)
    assert type(conv) is cls and int(conv.weight.eq(0).sum()) == 108
