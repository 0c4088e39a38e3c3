"""The user's ``filter_fn``: called as it should be, or said what is wrong with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

FilterFn = Callable[[nn.Module, str], bool]

_RULE = "it is called as filter_fn(module, name), the layer first"


def check_filter(filter_fn: FilterFn | None) -> None:
    """Raise unless ``filter_fn`` can be called with a layer and its name, in this order.

    Raises:
        TypeError: If not.
    """
    if filter_fn is None:
        return
    if not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function, got {filter_fn!r}; {_RULE}")
    try:
        signature = inspect.signature(filter_fn)
    except (TypeError, ValueError):
        return  # of some functions written in C it is not known
    try:
        taken = signature.bind(nn.Identity(), "")
    except TypeError as error:
        raise TypeError(f"filter_fn{signature}: {error}; {_RULE}") from None
    if next(iter(taken.arguments), None) == "name":
        raise TypeError(f"filter_fn{signature} takes the name first; {_RULE}")


def wants(filter_fn: FilterFn, module: nn.Module, name: str) -> bool:
    """Return what ``filter_fn`` says of a layer.

    Raises:
        TypeError: If it fails, and would not with its arguments in the other order.
    """
    try:
        return bool(filter_fn(module, name))
    except (AttributeError, TypeError) as error:
        try:
            filter_fn(name, module)  # type: ignore[arg-type]
        except Exception:
            raise error from None
        raise TypeError(f"filter_fn takes the name first; {_RULE}") from error
