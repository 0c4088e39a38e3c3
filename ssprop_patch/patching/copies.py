"""A copy of a converted model to give away: the plain network, and nothing of this package."""

from __future__ import annotations

import copy
from typing import Any, overload

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .convert import Model, revert


@overload
def reverted_copy(model: DataParallel[Any] | DistributedDataParallel) -> nn.Module: ...
@overload
def reverted_copy(model: Model) -> Model: ...  # type: ignore[overload-cannot-match]  # torch: Any
def reverted_copy(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` without the sparse backward; ``model`` itself stays converted.

    That is what to save where a whole model is saved, not its ``state_dict`` alone: the file then
    loads without this package, and with ``weights_only=True`` wherever the plain model's does::

        torch.save(ssp.reverted_copy(model), "model.pt")

    Args:
        model: Any module, converted or not, while it trains too. Of a compiled, a DDP or a
            ``DataParallel`` model, the one that it runs: those wrappers belong to a process.
            Others, averaged models (EMA) among them, are copied as they are.

    Returns:
        The copy, as :func:`copy.deepcopy` makes it: in the same mode, on the same device.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: As from :func:`ssprop_patch.revert`: something was put on a layer's class after
            conversion and has to come off first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    while (inner := _inside(model)) is not None:
        model = inner
    # What the layers and the model hold of ours goes into the copy as it is, not as a copy: a
    # schedule or a scoring function need not be one that can be copied.
    ours = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if name.startswith("_ssprop_")
    ]
    plain = revert(copy.deepcopy(model, {id(value): value for value in ours}))
    for module in plain.modules():
        _take_off_our_hooks(module)
    return plain


def _inside(model: nn.Module) -> nn.Module | None:
    """Return the model that one of torch's ways to run it wraps, or None."""
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return model.module
    return vars(model).get("_modules", {}).get("_orig_mod")


def _take_off_our_hooks(module: nn.Module) -> None:
    """Take off what a Meter leaves in a copy: hooks that do nothing, but are of this package."""
    tables = [t for name, t in vars(module).items() if "_hooks" in name and isinstance(t, dict)]
    ours = {key for table in tables for key, hook in table.items() if _is_ours(hook)}
    for table in tables:
        for key in ours:  # an id that no two hooks share
            table.pop(key, None)


_PACKAGE = __package__.removesuffix("patching")


def _is_ours(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(_PACKAGE)
