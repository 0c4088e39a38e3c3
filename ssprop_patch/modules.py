"""The patched classes: a subclass of each layer's own class, made on demand and cached.

A layer is patched by assigning its ``__class__``: identity, parameters, hooks and state stay. The
subclass overrides one method, ``_conv_forward`` of a stock convolution, or ``forward`` of a class
that writes its own, and keeps the name of the original, for the tools that look at it.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .controller import Policy
from .functional import DENSE_CONV, needs_backward, sparse_conv
from .selection import kept_channels, selectable_channels

STOCK = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


class PatchedConv(nn.Module):
    """Mixin of all patched classes: what a copy, a pickle and a ``print`` of one need.

    ``_ssprop_original`` of the class is the class it was made from; of the instance
    ``_ssprop_policy`` is a :class:`Policy` and ``_ssprop_membership`` ties it to the controller's
    watch. Not annotated, because TorchScript reads annotations.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class exists in this process only: store the original and patch again on load.
        function, args, *rest = super().__reduce_ex__(protocol)
        plain = tuple(original_class(a) if isinstance(a, type) else a for a in args)
        return _rebuild, (function, plain), *rest

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), "sparse backward"]))


def _rebuild(function: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    module = function(*args)
    module.__class__ = patched_class(type(module))
    return module


def original_class(cls: type) -> type:
    """Return the class that a patched class was made from; any other class as it is."""
    return cls.__dict__.get("_ssprop_original", cls)


def is_patched_class(cls: type) -> bool:
    """Whether ``cls`` itself, not a base of it, was made by :func:`patched_class`."""
    return "_ssprop_original" in cls.__dict__


def has_own_forward(cls: type[nn.Module]) -> bool:
    """Whether a convolution class computes its forward in another way than torch's."""
    stock = next(base for base in STOCK if issubclass(cls, base))
    return cls.forward is not stock.forward or cls._conv_forward is not stock._conv_forward


@functools.cache
def patched_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``cls``, a Conv1d, Conv2d or Conv3d, with a sparse backward."""
    name, make = ("forward", _own_forward) if has_own_forward(cls) else (
        "_conv_forward", _stock_forward
    )  # fmt: skip
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__init__": _ordinary_init(cls),
        "_ssprop_original": cls,
        name: _readable_by_torchscript(make(cls), getattr(cls, name)),
    }
    return type(cls)(cls.__name__, (PatchedConv, cls), namespace)


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

    TorchScript compiles the source behind ``__wrapped__`` with the globals of the function it is
    given, so that a scripted layer is the dense one. ``method`` itself uses no global name.
    """
    if not inspect.isfunction(dense):
        return functools.wraps(dense)(method)
    method = types.FunctionType(
        method.__code__, dense.__globals__, dense.__name__, method.__defaults__, method.__closure__
    )
    return functools.update_wrapper(method, dense)


# --- stock forwards ---------------------------------------------------------------------------


def _stock_forward(cls: type[nn.Module]) -> Callable[..., Tensor]:
    dims = next(n for base, n in STOCK.items() if issubclass(cls, base))
    dense_forward = cls._conv_forward
    # Closure variables, not globals: see _readable_by_torchscript.
    dispatch, is_sparse, pad = _dispatch, _is_sparse, F.pad
    proxy, keep_in_graph = torch.fx.Proxy, _keep_in_graph

    def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(input, proxy):
            return keep_in_graph(self, dense_forward, (input, weight, bias), (input,), {})
        policy = getattr(self, "_ssprop_policy", None)
        if policy is None or not is_sparse(self, policy, input, weight, bias):
            return dense_forward(self, input, weight, bias)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return dispatch(
            dims, policy, input, weight, bias, self.stride, padding, self.dilation, self.groups
        )

    return _conv_forward


def _is_sparse(
    module: nn.Module, policy: Policy, input: Tensor, weight: Tensor, bias: Tensor | None
) -> bool:
    return (
        policy.controller.sparse
        and module.training
        and needs_backward(input, weight, bias)
        and not _is_capturing()
    )


def _is_capturing() -> bool:
    """Whether a tool records the network for use elsewhere: that gets the dense one."""
    return torch.jit.is_tracing() or _is_exporting()


_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch >= 2.7


def _dispatch(
    dims: int,
    policy: Policy,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve sparsely as ``policy`` says; densely where it keeps every channel."""
    channels = selectable_channels(weight.shape[0], groups)
    geometry = (stride, padding, dilation, groups)
    if torch.compiler.is_compiling():
        # Reading the rate here would make one graph per value: the operator reads it by handle.
        if channels > 1 and policy.override != 0.0:
            return sparse_conv(dims, input, weight, bias, *geometry, handle=policy.handle)
    else:
        k = kept_channels(channels, policy.drop_rate)
        if k < channels:
            return sparse_conv(
                dims, input, weight, bias, *geometry, k=k, score_fn=policy.score_fn
            )
    return DENSE_CONV[dims](input, weight, bias, *geometry)


# --- forwards of their own --------------------------------------------------------------------


def _own_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    dense_forward = cls.forward
    run = _run_own_forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(self, dense_forward, args, kwargs)

    return forward


def _run_own_forward(
    module: nn.Module, dense_forward: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    if any(isinstance(a, torch.fx.Proxy) for a in (*args, *kwargs.values())):
        return _keep_in_graph(module, dense_forward, (*args, *kwargs.values()), args, kwargs)
    policy = getattr(module, "_ssprop_policy", None)  # None: a bound method outlived revert
    sparse = policy is not None and policy.controller.sparse
    if not (sparse and module.training and torch.is_grad_enabled()) or _is_capturing():
        return dense_forward(module, *args, **kwargs)
    with _CatchConvolutions(module) as mode:
        out = dense_forward(module, *args, **kwargs)
    if not torch.compiler.is_compiling() and not mode.caught:
        warnings.warn(
            f"{type(module).__name__}.forward called no torch.nn.functional.conv1d/2d/3d: its "
            "backward stays dense",
            stacklevel=3,
        )
    return out


class _CatchConvolutions(TorchFunctionMode):
    """Makes the convolutions that a module's own forward calls sparse.

    What that forward does to the weight before (standardise, scale, mask) stays in autograd.
    Convolutions inside it, modules of their own, go by their own settings (but one that also
    writes its own forward and is not converted looks like a part of this one).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.policy = module._ssprop_policy
        self.caught = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            dims = 2
        elif func is F.conv1d:
            dims = 1
        elif func is F.conv3d:
            dims = 3
        else:
            return func(*args, **kwargs)
        weight = kwargs["weight"] if "weight" in kwargs else args[1]
        if any(weight is p for child in self.module.children() for p in child.parameters()):
            return func(*args, **kwargs)
        if not torch.compiler.is_compiling():  # which does not model a mode's attributes
            self.caught = True
        return _catch(dims, self.policy, *args, **kwargs)


def _catch(dims: int, policy: Policy, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any):
    bias = args[0] if args else kwargs.get("bias")
    if policy.controller.sparse and needs_backward(input, weight, bias):
        return _dispatch(dims, policy, input, weight, *args, **kwargs)
    return DENSE_CONV[dims](input, weight, *args, **kwargs)


# --- torch.fx ---------------------------------------------------------------------------------


def _keep_in_graph(
    module: nn.Module, dense_forward: Callable[..., Any], dense_args: Any, args: Any, kwargs: Any
) -> Any:
    """Put the layer itself into a graph that torch.fx traces, as fx does with torch's own layers.

    So the graph's layer goes on reading mode and rate when it runs.
    """
    tracer = next(a.tracer for a in (*args, *kwargs.values()) if isinstance(a, torch.fx.Proxy))
    if module is tracer.root:
        return dense_forward(module, *dense_args)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
