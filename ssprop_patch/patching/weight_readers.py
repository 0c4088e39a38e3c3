"""Layers whose weight other code reads: known from the code of the classes that hold them.

Such a layer may never be called, and what is computed with its weight elsewhere stays dense. Only
what the bytecode says for certain is used: an attribute is loaded, and what is done with it next.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import NamedTuple

from torch import nn

from .reasons import Reason, Verdict

_LOADS = ("LOAD_ATTR", "LOAD_METHOD")
# With these a method may come to a child without naming it.
_BY_OTHER_MEANS = {"getattr", "children", "named_children", "modules", "named_modules", "_modules"}
# What of a layer is not a use of it: all else may be a call, now or later.
_READ = {
    "weight",
    "bias",
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "in_features",
    "out_features",
}


class Uses(NamedTuple):
    """What some code does with an attribute of a given name.

    Attributes:
        reads_weight: It reads the attribute's ``weight``, in a forward.
        calls: It may call the attribute.
    """

    reads_weight: bool = False
    calls: bool = False

    def __or__(self, other: Uses) -> Uses:
        return Uses(self.reads_weight or other.reads_weight, self.calls or other.calls)


class Readers:
    """Says of the layers of one model whether their weight is read, and whether they are called.

    Args:
        model: The whole model, as other parts of it may call a layer, too.
    """

    def __init__(self, model: nn.Module) -> None:
        self._holders: dict[nn.Module, list[tuple[type, str]]] = {}
        for holder in model.modules():
            for name, child in holder._modules.items():
                if child is not None:
                    self._holders.setdefault(child, []).append((type(holder), name))
        self._methods = {cls: tuple(_methods_of(cls)) for cls in {type(m) for m in model.modules()}}
        self._known: dict[tuple[type | None, str], Uses] = {}

    def judge(self, layer: nn.Module, verdict: Verdict) -> Verdict:
        """Return the verdict on a layer that could be converted.

        It stays dense where it is certain that nobody calls it; where its weight is read as well,
        the text says so.
        """
        holders = self._holders.get(layer, ())
        methods = (m for cls, _ in holders for m in self._methods[cls])
        if not any(m.is_forward and "weight" in m.code.co_names for m in methods):
            return verdict  # as of nearly all
        uses = [(cls, self._uses(cls, name)) for cls, name in holders]
        readers = list(dict.fromkeys(cls.__name__ for cls, use in uses if use.reads_weight))
        if not readers:
            return verdict
        who = " and ".join(readers)
        elsewhere = (self._uses(None, name).calls for _, name in holders)
        if any(use.calls or not use.reads_weight for _, use in uses) or any(elsewhere):
            return verdict.but(
                f"; {who} also reads its weight: what it computes with that is dense"
            )
        return Verdict(Reason.NEVER_CALLED, f"{who} reads its weight and never calls it")

    def _uses(self, cls: type | None, name: str) -> Uses:
        """Return what the methods of a holder do with its attribute; of None, those of all others.

        A method of another class means something else by ``self.name``.
        """
        if (cls, name) not in self._known:
            found = Uses()
            for holder, methods in self._methods.items():
                if cls in (None, holder):
                    for method in methods:
                        found |= _uses(method, name, from_self=cls is not None)
            self._known[cls, name] = found
        return self._known[cls, name]


class _Method(NamedTuple):
    code: CodeType
    is_forward: bool


def _methods_of(cls: type) -> Iterator[_Method]:
    """Yield all methods of a class but nn.Module's own, and the functions inside them."""
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for name, value in vars(base).items():
            value = getattr(value, "fget", None) or getattr(value, "__func__", value)
            function = inspect.unwrap(value) if callable(value) else None
            if inspect.isfunction(function):
                for code in _with_nested(function.__code__):
                    yield _Method(code, "forward" in name)


def _with_nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_nested(constant)


def _uses(method: _Method, name: str, from_self: bool) -> Uses:
    """Return what a method does with attributes called ``name``: its own, or those of others."""
    code = method.code
    found = Uses(calls=from_self and not _BY_OTHER_MEANS.isdisjoint(code.co_names))
    if name not in code.co_names:  # which is quickly said of nearly all
        return found
    steps = [i for i in dis.get_instructions(code) if i.opname != "EXTENDED_ARG"]
    for i, step in enumerate(steps[:-1]):
        if step.opname not in _LOADS or step.argval != name:
            continue
        owner = i - 1
        while steps[owner].opname in _LOADS:
            owner -= 1
        if "GLOBAL" in steps[owner].opname:  # F.conv1d
            continue
        loaded = steps[owner].argval  # of two, where one instruction loads both
        loaded = loaded[-1] if isinstance(loaded, tuple) else loaded
        if not from_self and owner == i - 1 and loaded == "self":
            continue
        after = steps[i + 1]
        if after.opname not in _LOADS or after.argval not in _READ:
            found |= Uses(calls=True)
        elif after.argval == "weight" and method.is_forward:
            found |= Uses(reads_weight=True)
    return found
