"""What is at work around a call: torch.func transforms, forward-mode AD, autocast."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._torch_compat import (
    are_functorch_transforms_active,
    has_forward_ad_level,
    is_any_autocast_enabled,
    is_batchedtensor,
    is_legacy_batchedtensor,
)


def in_transform(*tensors: Tensor | None) -> bool:
    """Whether torch.func or forward-mode AD is at work, which this kind of function cannot take."""
    if are_functorch_transforms_active():
        return True
    if not has_forward_ad_level() or torch.compiler.is_compiling():
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def is_batched(t: Tensor) -> bool:
    """Whether ``t`` stands for several gradients: ``is_grads_batched``, ``torch.func.vmap``."""
    if torch.compiler.is_compiling():
        return False
    return is_batchedtensor(t) or is_legacy_batchedtensor(t)


NO_TRANSFORMS = (
    "the sparse backward does not work inside torch.func transforms (grad, vmap, jvp, ...), in "
    "forward-mode AD or under is_grads_batched: wrap the call in ssprop_patch.dense(model), use "
    "model.eval(), or drop_rate=0"
)


def is_autocasting(t: Tensor) -> bool:
    """Whether autocast is on for the device of ``t``."""
    # First, as ``device.type`` takes longer than all else that is asked of a tensor in a forward.
    if not is_any_autocast_enabled():
        return False
    if not torch.compiler.is_compiling() and t.is_meta:  # of which it is an error to ask
        return False
    return torch.is_autocast_enabled(t.device.type)


def cast(t: Tensor, dtype: torch.dtype, device_type: str) -> Tensor:
    """Return ``t`` in ``dtype`` where autocast would cast it."""
    eligible = t.is_floating_point() and t.dtype != torch.float64 and t.device.type == device_type
    return t.to(dtype) if eligible else t
