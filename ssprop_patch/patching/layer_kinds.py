"""The kinds of layers that can have a sparse backward, and how each computes its forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..core import operations
from ..core.operations import Operation

#: The layers of torch that can be patched, and what each calls in its forward.
LAYERS: dict[type[nn.Module], Operation] = {
    nn.Conv1d: operations.CONV1D,
    nn.Conv2d: operations.CONV2D,
    nn.Conv3d: operations.CONV3D,
    nn.ConvTranspose1d: operations.CONV_TRANSPOSE1D,
    nn.ConvTranspose2d: operations.CONV_TRANSPOSE2D,
    nn.ConvTranspose3d: operations.CONV_TRANSPOSE3D,
    nn.Linear: operations.LINEAR,
}


def is_patched_layer(module: nn.Module) -> bool:
    """As :func:`is_patched`, of a layer with a sparse backward."""
    return hasattr(type(module), "_ssprop_is_layer")


def base_layer(cls: type[nn.Module]) -> type[nn.Module] | None:
    """Return which of :data:`LAYERS` a class is, or None."""
    for base in LAYERS:  # no next(..., None), which Dynamo of torch 2.6 cannot trace
        if issubclass(cls, base):
            return base
    return None


def has_own_forward(cls: type[nn.Module]) -> bool:
    """Whether a layer class computes its forward in another way than torch's."""
    base = base_layer(cls)
    if base is None or cls.forward is not base.forward:
        return True
    return getattr(cls, "_conv_forward", None) is not getattr(base, "_conv_forward", None)


def overrides_forward(cls: type[nn.Module]) -> bool:
    """Whether patching replaces ``forward``, not the inner step of torch's convolutions."""
    return has_own_forward(cls) or base_layer(cls) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Return the shape that a layer's weight has in each call; None where that is not known.

    Not by the weight itself, which a parametrization would compute.
    """
    layer: Any = module
    if isinstance(module, nn.Linear):
        return layer.out_features, layer.in_features
    base = base_layer(type(module))
    if base is None:
        return None
    inputs, outputs, groups = layer.in_channels, layer.out_channels, layer.groups
    pair = (inputs, outputs // groups) if LAYERS[base].transposed else (outputs, inputs // groups)
    return (*pair, *layer.kernel_size)


def is_own_weight(module: nn.Module, weight: Tensor, groups: int) -> bool:
    """Whether a call's weight is the layer's own, not a part of it or one of several."""
    return weight.shape == weight_shape(module) and groups == getattr(module, "groups", 1)
