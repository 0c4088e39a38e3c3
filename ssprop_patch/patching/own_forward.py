"""Layers that compute their forward in their own way: the convolutions they call are caught."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core import operations
from ..core.operations import Operation
from ..ops.autograd import needs_backward
from ..schedule.layer_policy import LayerPolicy
from .dispatch import PLAIN, count_dense, dispatch, is_exporting, is_tracing
from .layer_kinds import LAYERS, base_layer
from .weights import is_plain


def own_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    dense_forward, caught = cls.forward, caught_in(cls)
    run = run_own_forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(self, dense_forward, caught, args, kwargs)

    return forward


def run_own_forward(
    module: Any,
    dense_forward: Callable[..., Any],
    operations: Mapping[Any, Operation],
    args: Any,
    kwargs: Any,
) -> Any:
    if any(isinstance(a, torch.fx.Proxy) for a in (*args, *kwargs.values())):
        return keep_in_graph(module, dense_forward, (*args, *kwargs.values()), args, kwargs)
    policy = getattr(module, "_ssprop_policy", None)  # None: a bound method outlived revert
    sparse = policy is not None and policy.active
    training = sparse and module.training and torch.is_grad_enabled()
    if not training or is_tracing() or is_exporting():
        if policy is not None:
            count_dense(module)
        return dense_forward(module, *args, **kwargs)
    with _Catch(module, operations) as mode:
        out = dense_forward(module, *args, **kwargs)
    if not torch.compiler.is_compiling() and not mode.caught:
        module._ssprop_membership.calls.caught_nothing(
            type(module), [operation.name for operation in operations.values()]
        )
    return out


class _Catch(TorchFunctionMode):
    """Makes the convolutions (linear layers, ...) that a module's own forward calls sparse.

    What that forward does to the weight before (standardise, scale, mask) stays in autograd.
    Layers inside it, modules of their own, go by their own settings (but one that also writes its
    own forward and is not converted looks like a part of this one).
    """

    def __init__(self, module: Any, operations: Mapping[Any, Operation]) -> None:
        super().__init__()
        self.module = module
        self.policy = module._ssprop_policy
        self.operations = operations
        self.caught = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operation = self.operations.get(func)
        if operation is None:
            return func(*args, **kwargs)
        weight: Tensor = kwargs["weight"] if "weight" in kwargs else args[1]
        if any(weight is p for child in self.module.children() for p in child.parameters()):
            return func(*args, **kwargs)
        # Inside an autograd.Function, or of a weight that computes its product in its own way.
        plain = type(weight) in PLAIN or is_plain(type(weight))  # torch 2.6 traces the first only
        if not (plain and torch.is_grad_enabled()):
            return func(*args, **kwargs)
        if not torch.compiler.is_compiling():  # which does not model a mode's attributes
            self.caught = True
        return _catch(operation, self.policy, self.module, *args, **kwargs)


def caught_in(cls: type[nn.Module]) -> dict[Any, Operation]:
    """Return which functions are caught in the forward of ``cls``.

    Those of its own kind only: a convolution may use a linear layer to make its weight.
    """
    base = base_layer(cls)
    if base is None or LAYERS[base] in operations.CONVOLUTIONS:
        found: tuple[Operation, ...] = operations.CONVOLUTIONS
    elif LAYERS[base].transposed:
        found = operations.TRANSPOSED_CONVOLUTIONS
    else:
        found = (operations.LINEAR,)
    return {operation.original: operation for operation in found}


def _catch(
    operation: Operation,
    policy: LayerPolicy,
    module: nn.Module,
    input: Tensor,
    weight: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    bias = args[0] if args else kwargs.get("bias")
    if policy.active and needs_backward(input, weight, bias):
        bias, geometry = operation.arguments(*args, **kwargs)
        return dispatch(operation, policy, input, weight, bias, geometry, module)
    count_dense(module, input, weight, bias)
    return operation.original(input, weight, *args, **kwargs)


# --- torch.fx ---------------------------------------------------------------------------------


def keep_in_graph(
    module: nn.Module, dense_forward: Callable[..., Any], dense_args: Any, args: Any, kwargs: Any
) -> Any:
    """Put the layer itself into a graph that torch.fx traces, as fx does with torch's own layers.

    So the graph's layer goes on reading mode and rate when it runs.
    """
    tracer: Any = next(a.tracer for a in (*args, *kwargs.values()) if isinstance(a, torch.fx.Proxy))
    if module is tracer.root:
        return dense_forward(module, *dense_args)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
