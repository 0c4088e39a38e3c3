"""Libraries that compute gradients of parameters by hooks, and take the backward for dense."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

#: Packages that form gradients from a layer's input and the gradient of its output: per sample, or
#: of second order. They look layers up by exact class, or run a copy of one, so that of a converted
#: layer they find nothing, or the dense gradient where the schedule says sparse.
_LIBRARIES = {"opacus": "Opacus", "backpack": "BackPACK"}


def library_of(hook: Any) -> str | None:
    """Return which of these libraries a hook belongs to, or None."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    package = (getattr(hook, "__module__", None) or "").partition(".")[0]
    return _LIBRARIES.get(package)


def hooked_by(module: nn.Module) -> str | None:
    """Return which of these libraries has put hooks on a layer, or None."""
    hooks = (*module._forward_hooks.values(), *module._backward_hooks.values())
    return next(filter(None, map(library_of, hooks)), None)


def refuse_hook(module: nn.Module, hook: Any) -> None:
    """Raise a RuntimeError if a hook about to be put on a converted layer is one of theirs."""
    library = library_of(hook)
    if library is not None:
        raise RuntimeError(
            f"{library} was put on a converted layer, {_name(module)}: it computes gradients of "
            "parameters by itself, and as if the backward were dense. Call "
            f"ssprop_patch.revert(model) first; {library} and a sparse backward do not go together"
        )


def _name(module: nn.Module) -> str:
    """Return a layer's name in the model that was converted, and its class."""
    cls = type(module).__name__
    membership = vars(module).get("_ssprop_membership")
    for root in () if membership is None else membership.controller.step_counter.roots:
        for name, m in root.named_modules():
            if m is module and name:
                return f"{name!r} ({cls})"
    return cls
