"""Which weights a sparse backward can be made for: those that are what they look like."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_compat import is_fake_class, is_shard_class


def _is_plain(cls: type[Tensor]) -> bool:
    """Whether rows of a tensor of this class may be picked as of any tensor.

    A subclass that only carries attributes may. One that answers to operations in its own way (a
    quantized weight, a shard, a weight of per-sample gradients) may not: it handles what a
    layer's forward calls, and what it makes of anything else is unknown.
    """
    if is_fake_class(cls):  # a model made without memory, traced
        return True
    return cls.__torch_dispatch__ is Tensor.__torch_dispatch__ and _function(cls) in _ORDINARY


is_plain: Callable[[Any], bool] = functools.lru_cache(maxsize=256)(_is_plain)


def _function(cls: type[Tensor]) -> object:
    method = cls.__torch_function__
    return getattr(method, "__func__", method)


# Of a Parameter it is the one that does nothing at all.
_ORDINARY = (_function(Tensor), _function(nn.Parameter))


def why_not(weight: Tensor) -> str | None:
    """Return why a stock layer that holds this weight stays dense, or None."""
    cls = type(weight)
    # FSDP2 holds shards, and has put the whole weight in place by the time a forward runs.
    if not (is_plain(cls) or is_shard_class(cls)):
        return f"its weight is a {cls.__name__}, a tensor subclass with operations of its own"
    if weight.layout is not torch.strided:
        return f"its weight has the layout {weight.layout}"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, which has no gradient"
    return None
