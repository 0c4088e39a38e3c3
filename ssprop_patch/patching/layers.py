"""The patched classes of layers: a subclass of each layer's own class, with a sparse backward.

It overrides one method: ``_conv_forward`` of a stock convolution, ``forward`` of any other layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..class_swap import Patched, make_patched_class, once_per_class
from ..core import operations
from ..core.geometry import Geometry
from .dispatch import dispatch, is_sparse
from .gradient_hooks import refuse_hook
from .layer_kinds import LAYERS, base_layer, has_own_forward, overrides_forward
from .own_forward import caught_in, keep_in_graph, own_forward, run_own_forward


class PatchedLayer(Patched):
    """Mixin of layers with a sparse backward.

    Of the instance ``_ssprop_policy`` is a :class:`LayerPolicy` and ``_ssprop_membership`` ties it
    to the controller's step counter.
    """

    _ssprop_is_layer = True

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), "sparse backward"]))

    def register_forward_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_hook(self, hook)
        return super().register_forward_hook(hook, *args, **kwargs)

    def register_full_backward_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_hook(self, hook)
        return super().register_full_backward_hook(hook, *args, **kwargs)


@once_per_class
def patched_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``cls``, a layer class, with a sparse backward."""
    base = base_layer(cls)
    if not overrides_forward(cls):
        name, method = "_conv_forward", _conv_forward(cls)
    elif base is nn.Linear and not has_own_forward(cls):
        name, method = "forward", _linear_forward(cls)
    else:  # a transposed convolution too, whose forward works out its output padding first
        name, method = "forward", own_forward(cls)
    return make_patched_class(PatchedLayer, patched_class, cls, name, method)


# --- stock forwards ---------------------------------------------------------------------------


def _conv_forward(cls: type[nn.Module]) -> Callable[..., Tensor]:
    base = base_layer(cls)
    assert base is not None  # of a class that writes no forward of its own
    operation, dense_forward = LAYERS[base], cls._conv_forward  # type: ignore[attr-defined]
    # Closure variables, not globals: see _readable_by_torchscript.
    call, trains, make, functional = dispatch, is_sparse, Geometry, F
    proxy, keep, run = torch.fx.Proxy, keep_in_graph, run_own_forward
    name, original, caught = operation.name, operation.original, caught_in(cls)

    def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(input, proxy):
            return keep(self, dense_forward, (input, weight, bias), (input,), {})
        policy = getattr(self, "_ssprop_policy", None)
        if policy is None or not trains(self, policy, input, weight, bias):
            return dense_forward(self, input, weight, bias)
        if getattr(functional, name) is not original:  # a tool's, see operations.py
            return run(self, dense_forward, caught, (input, weight, bias), {})
        padding = self.padding
        if self.padding_mode != "zeros":
            pads = self._reversed_padding_repeated_twice
            input = functional.pad(input, pads, mode=self.padding_mode)
            padding = 0
        geometry = make(self.stride, padding, self.dilation, self.groups)
        return call(operation, policy, input, weight, bias, geometry, self)

    return _conv_forward


def _linear_forward(cls: type[nn.Module]) -> Callable[..., Tensor]:
    operation, dense_forward, geometry = operations.LINEAR, cls.forward, Geometry()
    call, trains, functional = dispatch, is_sparse, F
    proxy, keep, run = torch.fx.Proxy, keep_in_graph, run_own_forward
    original, caught = operation.original, caught_in(cls)

    def forward(self: Any, input: Tensor) -> Tensor:
        if isinstance(input, proxy):
            return keep(self, dense_forward, (input,), (input,), {})
        policy = getattr(self, "_ssprop_policy", None)
        weight, bias = self.weight, self.bias
        if policy is None or not trains(self, policy, input, weight, bias):
            return dense_forward(self, input)
        if functional.linear is not original:  # a tool's, see operations.py
            return run(self, dense_forward, caught, (input,), {})
        return call(operation, policy, input, weight, bias, geometry, self)

    return forward
