"""Give an instance a subclass of its own class, and take it back.

A layer is patched by assigning its ``__class__``: identity, parameters, hooks and state stay. The
subclass overrides one method and keeps the name of the original, for the tools that look at it. It
is made once for each class and lives as long as that does.
"""

from __future__ import annotations

import functools
import inspect
import types
from abc import ABCMeta
from collections.abc import Callable
from typing import Any

from torch import nn

#: Makes the patched class of a class.
Patch = Callable[[type[nn.Module]], type[nn.Module]]


class Patched(nn.Module):
    """Mixin of all patched classes: what a copy and a pickle of one need.

    ``_ssprop_original`` of the class is the class it was made from, ``_ssprop_patch`` what made it.
    Not annotated, because TorchScript reads annotations.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # A patched class is no new member of its family: what registers, checks or forbids
        # subclasses has seen the original. Subclasses of a patched class are as ever.
        if "_ssprop_original" not in vars(cls):
            super().__init_subclass__(**kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class exists in this process only: store the original and patch again on load.
        reduced: Any = super().__reduce_ex__(protocol)
        function, args, *rest = reduced
        cls: Any = type(self)
        plain = tuple(original_class(a) if isinstance(a, type) else a for a in args)
        return _rebuild, (cls._ssprop_patch, function, plain), *rest


def _rebuild(
    patch: Patch,
    function: Callable[..., nn.Module],
    args: tuple[Any, ...],
) -> nn.Module:
    module = function(*args)
    module.__class__ = patch(type(module))
    return module


def original_class(cls: type) -> type:
    """Return the class that a patched class was made from; any other class as it is."""
    return cls.__dict__.get("_ssprop_original", cls)


# By attributes, not by isinstance: a layer that another import of this package patched, before a
# reload or under another name, has other mixins.


def is_patched(module: nn.Module) -> bool:
    """Whether the class of ``module``, or a base of it, was made by :func:`make_patched_class`."""
    return hasattr(type(module), "_ssprop_original")


def is_patched_class(cls: type) -> bool:
    """Whether ``cls`` itself, not a base of it, was made by :func:`make_patched_class`."""
    return "_ssprop_original" in cls.__dict__


# --- making the subclass ----------------------------------------------------------------------


def make_patched_class(
    mixin: type[Patched],
    patch: Patch,
    cls: type[nn.Module],
    name: str,
    method: Callable[..., Any],
) -> type[nn.Module]:
    """Return a subclass of ``cls`` whose method ``name`` is ``method``.

    Args:
        mixin: Its first base.
        patch: Makes the same class again: a function at the top of a module, for pickles.
        cls: The class of a layer.
        name, method: What it overrides. ``method`` may use no global name.
    """
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__init__": _ordinary_init(cls),
        "_ssprop_original": cls,
        "_ssprop_patch": staticmethod(patch),
        name: _readable_by_torchscript(method, getattr(cls, name)),
    }
    # Not by calling the metaclass, which may register or forbid what it makes: see
    # Patched.__init_subclass__. ABCMeta's own part is needed by isinstance.
    new = ABCMeta.__new__ if isinstance(cls, ABCMeta) else type.__new__
    return new(type(cls), cls.__name__, (mixin, cls), namespace)


def _ordinary_init(cls: type[nn.Module]) -> Callable[..., None]:
    """Return an ``__init__`` for code that makes a layer by ``type(layer)(...)``: a dense one."""

    @functools.wraps(cls.__init__)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if is_patched_class(type(self)):
            self.__class__ = cls
        cls.__init__(self, *args, **kwargs)

    return __init__


def _readable_by_torchscript(method: Callable[..., Any], dense: Callable[..., Any]) -> Any:
    """Return ``method`` with the source and the names that TorchScript would find in ``dense``.

    TorchScript compiles the source of ``__wrapped__`` with the globals of the function it is
    given, so that a scripted layer is the dense one. ``method`` itself uses no global name.
    """
    if not inspect.isfunction(dense):
        return functools.wraps(dense)(method)
    method = types.FunctionType(
        method.__code__, dense.__globals__, dense.__name__, method.__defaults__, method.__closure__
    )
    return functools.update_wrapper(method, dense)


# --- one for each class -----------------------------------------------------------------------


class _Kept:
    """What a class keeps its patched subclass in, see :func:`once_per_class`.

    A class that is pickled by value (cloudpickle, dill) does not take it along.
    """

    def __init__(self, patched: type[nn.Module]) -> None:
        self.patched = patched

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def once_per_class(patch: Patch) -> Patch:
    """Make ``patch`` return the same subclass of a class each time.

    torch.compile guards on it. The class itself keeps it, so that both go when nobody needs the
    class any more: a parametrization makes one for each layer. A second import of this package
    puts its own in that place; what the first one patched is still found among the subclasses.
    """

    @functools.wraps(patch)
    def once(cls: type[nn.Module]) -> type[nn.Module]:
        kept = vars(cls).get("_ssprop_patched")
        if isinstance(kept, _Kept) and getattr(kept.patched, "_ssprop_patch", None) is once:
            return kept.patched
        if (found := existing(cls)) is None:
            made = patch(cls)
            # The first of those that there are now: another thread may have made one meanwhile.
            found = existing(cls) or made
        type.__setattr__(cls, "_ssprop_patched", _Kept(found))
        return found

    def existing(cls: type[nn.Module]) -> type[nn.Module] | None:
        return next(
            (
                sub
                for sub in type.__subclasses__(cls)
                if vars(sub).get("_ssprop_original") is cls
                and getattr(sub, "_ssprop_patch", None) is once
            ),
            None,
        )

    return once
