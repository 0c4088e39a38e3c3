"""Classes that act when a subclass of them is made: a patched class is none of their family."""

import abc
import copy
import pickle

import pytest
import torch
from torch import nn

import ssprop_patch as ssp

SEEN = []


class Registers(nn.Conv2d):
    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        SEEN.append(cls)


class Forbids(nn.Conv2d):
    def __init_subclass__(cls, **kwargs):
        raise TypeError(f"{cls.__name__} is final")


class TakesArguments(nn.Conv2d):
    def __init_subclass__(cls, *, kind, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.kind = kind


class Meta(type):
    def __new__(mcs, name, bases, namespace):
        if any(isinstance(base, Meta) for base in bases):
            raise TypeError("no subclasses")
        return super().__new__(mcs, name, bases, namespace)

    def __init__(cls, name, bases, namespace):
        super().__init__(name, bases, namespace)
        SEEN.append(cls)


class ByMetaclass(nn.Conv2d, metaclass=Meta):
    pass


class AbstractMeta(abc.ABCMeta):
    def __new__(mcs, name, bases, namespace):
        SEEN.append(name)
        return super().__new__(mcs, name, bases, namespace)


class Abstract(nn.Conv2d, metaclass=AbstractMeta):
    pass


class Slots(nn.Conv2d):
    __slots__ = ("note",)


FAMILIES = [Registers, Forbids, TakesArguments, ByMetaclass, Abstract, Slots]


@pytest.fixture(params=FAMILIES, ids=lambda cls: cls.__name__)
def family(request):
    SEEN.clear()
    return request.param


def gradient(model):
    model.zero_grad()
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    model(x).pow(2).sum().backward()
    return model[0].weight.grad


def zero_rows(model):
    return int((gradient(model).flatten(1) == 0).all(1).sum())


def test_a_family_sees_nothing_of_a_conversion(family):
    model = nn.Sequential(family(3, 8, 3))
    ssp.convert(model, 0.5)
    assert SEEN == [] and zero_rows(model) == 4
    assert isinstance(model[0], family) and not isinstance(nn.Conv2d(3, 8, 3), type(model[0]))
    assert not isinstance(family(3, 8, 3), type(model[0]))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert zero_rows(copied) == 4
    ssp.revert(model)
    assert type(model[0]) is family and zero_rows(model) == 0 and SEEN == []


def test_a_subclass_of_a_patched_class_is_as_ever():
    model = ssp.convert(nn.Sequential(Registers(3, 8, 3)), 0.5)
    SEEN.clear()
    nn.utils.parametrizations.weight_norm(model[0])
    assert [type(model[0])] == SEEN


def test_slots_keep_what_they_hold():
    model = nn.Sequential(Slots(3, 8, 3))
    model[0].note = "mine"
    ssp.convert(model, 0.5)
    assert model[0].note == "mine"
    ssp.revert(model)
    assert model[0].note == "mine"


class NoSubclass(type):
    """Of a class that cannot be a base at all."""

    def mro(cls):
        if len(cls.__bases__) > 1:
            raise TypeError("this family has no subclasses")
        return super().mro()


class Alone(nn.Conv2d, metaclass=NoSubclass):
    pass


def test_a_class_that_can_have_no_subclass_is_refused_by_name_and_nothing_changes():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(Alone(3, 8, 3)))
    (row,) = ssp.plan(model).refused
    assert row.name == "1.0"
    assert "Alone cannot have a subclass: TypeError: this family" in row.reason
    with pytest.raises(ValueError, match=r"nothing was changed:\n  1.0: its class Alone"):
        ssp.convert(model, 0.5)
    assert not ssp.is_converted(model)
    assert ssp.revert(model) is model
