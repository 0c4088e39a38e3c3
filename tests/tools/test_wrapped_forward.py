"""A forward wrapped in the instance, and tools that ask for the class."""

import functools
import inspect
import warnings

import pytest
import torch
import torch.fx
from torch import nn

import ssprop_patch as ssp

from .kinds import KINDS, Doubled, ThroughConvForward, kept, make

OWN = [Doubled, ThroughConvForward]


# --- what wraps the forward of an instance ------------------------------------------------------


def wrap_forward(module, calls):
    """As accelerate's hooks: the bound forward of the moment, called by another."""
    old_forward = module.forward

    @functools.wraps(old_forward)
    def new_forward(self, *args, **kwargs):
        calls.append(type(self))
        return old_forward(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), old_forward)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("cls", KINDS)
def test_a_forward_wrapped_in_the_instance(cls, before):
    """What plan says is so: no layer is called converted and stays dense without a word."""
    torch.manual_seed(0)
    conv, calls = cls(3, 8, 3), []
    if before:
        wrap_forward(conv, calls)
    (row,) = ssp.plan(conv)
    # The bound method in the wrapper hides a forward of the class's own from all who come later.
    assert row.action == "convert" or (before and cls in OWN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ssp.convert(conv, 0.5, strict=False)
    if not before:
        wrap_forward(conv, calls)
    assert kept(conv) == {"weight": 4 if row.action == "convert" else 8} and len(calls) == 1
    ssp.revert(conv)
    assert type(conv) is cls
    assert kept(conv) == {"weight": 8} and len(calls) == 2


def test_the_forward_of_the_model_wrapped_in_the_instance():
    model = make(nn.Conv2d)
    calls = []
    wrap_forward(model, calls)
    ssp.convert(model, 0.5)
    assert set(kept(model).values()) == {4}
    del model.forward
    assert set(kept(model).values()) == {4}


# --- tools that ask for the class ---------------------------------------------------------------


@pytest.mark.parametrize("cls", KINDS)
def test_names_documentation_and_signatures_are_the_original_ones(cls):
    original = cls(3, 8, 3)
    conv = ssp.convert(cls(3, 8, 3), 0.5)
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(conv), attribute) == getattr(cls, attribute)
    assert isinstance(conv, cls) and issubclass(type(conv), cls)
    assert inspect.signature(conv.forward) == inspect.signature(original.forward)
    assert inspect.signature(conv._conv_forward) == inspect.signature(original._conv_forward)


def test_equal_classes_for_equal_layers():
    """A class for each layer would cost memory, and torch.compile a graph each."""
    model = ssp.convert(make(nn.Conv2d), 0.5)
    again = ssp.convert(make(nn.Conv2d), 0.75)
    assert type(model[0]) is type(model[3]) is type(again[0])
