"""What is converted in a model, and how one state of it takes the place of another.

All at once: an interrupt at any line leaves the model as it was or as it shall be. What can fail
is done first; then one call into C, which no signal handler gets into, changes all classes and
attributes; and what is left, taking layers off the watches of controllers, is done twice, so that
an interrupt in it is made good.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from ..class_swap import is_patched, original_class
from ..schedule.controller import SparsityController
from ..schedule.layer_policy import LayerPolicy
from ..schedule.step_counter import Membership, StepCounter
from .layers import patched_class


class Conversion(NamedTuple):
    """What is converted in a model.

    Attributes:
        layers: With the policy of each.
        roots: Whole models, with the controller of each.
    """

    layers: Mapping[nn.Module, LayerPolicy]
    roots: Mapping[nn.Module, SparsityController]

    @classmethod
    def of(cls, model: nn.Module) -> Conversion:
        """Return how things stand in ``model``."""
        patched = [m for m in model.modules() if is_patched(m)]
        layers = {m: vars(m)["_ssprop_policy"] for m in patched if "_ssprop_policy" in vars(m)}
        marks = {m: vars(m).get("_ssprop_root") for m in model.modules()}
        roots = {m: mark.controller for m, mark in marks.items() if mark is not None}
        return cls(layers, roots)


#: Of each module the class, and the attributes that are this package's.
_State = dict[nn.Module, tuple[type, dict[str, Any]]]

_ATTRIBUTES = ("_ssprop_policy", "_ssprop_membership", "_ssprop_root")


def apply_conversion(after: Conversion, within: nn.Module) -> None:
    """Make ``after`` all that is converted in ``within``.

    All or nothing: a class that refuses to be replaced leaves every layer as it was.
    """
    before = Conversion.of(within)
    watched = [*_watched(before), *_watched(after)]
    modules = {m: None for part in (*before, *after) for m in part}
    origin = {m: (type(m), _attributes(m)) for m in modules}
    try:
        try:
            _switch(_wanted(after, modules))
        except BaseException:
            _switch(origin)
            raise
        finally:
            _settle(watched)
    finally:
        _settle(watched)


def _watched(conversion: Conversion) -> list[tuple[nn.Module, StepCounter]]:
    controllers = [
        *((m, policy.controller) for m, policy in conversion.layers.items()),
        *conversion.roots.items(),
    ]
    return [(module, controller.step_counter) for module, controller in controllers]


def _attributes(module: nn.Module) -> dict[str, Any]:
    # By vars(): a compiled model's setattr and getattr mean the module it wraps.
    return {name: vars(module)[name] for name in _ATTRIBUTES if name in vars(module)}


def _wanted(after: Conversion, modules: Iterable[nn.Module]) -> _State:
    """Return the state that ``after`` means; what it makes enters the watches already."""
    policies = {policy: _own(policy) for policy in after.layers.values()}
    wanted = {}
    for module in modules:
        cls = original_class(type(module))
        attributes: dict[str, Any] = {}
        if module in after.layers:
            cls = patched_class(cls)
            policy = policies[after.layers[module]]
            attributes["_ssprop_policy"] = policy
            attributes["_ssprop_membership"] = Membership(module, policy.controller, is_layer=True)
        if module in after.roots:
            attributes["_ssprop_root"] = Membership(module, after.roots[module], is_layer=False)
        wanted[module] = cls, attributes
    return wanted


def _own(policy: LayerPolicy) -> LayerPolicy:
    """Return ``policy``, or the same one of this import of the package."""
    if isinstance(policy, LayerPolicy):
        return policy
    return LayerPolicy.metered(policy, policy.observer)


def _switch(state: _State) -> None:
    steps = []
    for module, (cls, _) in state.items():
        if type(module) is not cls:
            # nn.Module's own would come to the same, but in Python.
            stock = type(module).__setattr__ is nn.Module.__setattr__
            assign = object.__setattr__ if stock else setattr
            steps.append(partial(assign, module, "__class__", cls))
    for module, (_, attributes) in state.items():  # after the classes, which may refuse
        steps += [partial(vars(module).pop, name, None) for name in _ATTRIBUTES]
        steps.append(partial(vars(module).update, attributes))
    deque(map(partial.__call__, steps), maxlen=0)  # all in C


def _settle(watched: Iterable[tuple[nn.Module, StepCounter]]) -> None:
    """Take off the watches what does not belong to them."""
    for module, watch in watched:
        ties = [vars(module).get(name) for name in ("_ssprop_policy", "_ssprop_root")]
        if all(tie is None or tie.controller.step_counter is not watch for tie in ties):
            watch.discard(module)
