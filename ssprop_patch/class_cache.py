"""One patched class for each class, which lives as long as that does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

_Patch = Callable[[type[nn.Module]], type[nn.Module]]


class _Kept:
    """What a class keeps its patched subclass in, see :func:`once_per_class`.

    A class that is pickled by value (cloudpickle, dill) leaves its content behind.
    """

    def __init__(self, patched: type[nn.Module]) -> None:
        self.patched = patched

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def once_per_class(patch: _Patch) -> _Patch:
    """Make ``patch`` return the same subclass of a class each time.

    torch.compile guards on it. The class itself keeps it, so that both go when nobody needs the
    class any more: a parametrization makes one for each layer. A second import of this package
    puts its own in that place; what the first one patched is still found among the subclasses.
    """

    @functools.wraps(patch)
    def once(cls: type[nn.Module]) -> type[nn.Module]:
        kept = vars(cls).get("_ssprop_patched")
        if isinstance(kept, _Kept) and kept.patched._ssprop_patch is once:
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
                sub for sub in type.__subclasses__(cls)
                if vars(sub).get("_ssprop_original") is cls and sub._ssprop_patch is once
            ),
            None,
        )  # fmt: skip

    return once
