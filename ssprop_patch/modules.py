"""The patched classes: a subclass of each layer's own class, made on demand and cached.

A layer is patched by assigning its ``__class__``: identity, parameters, hooks and state stay. The
subclass overrides one method, ``_conv_forward`` of a stock convolution, ``forward`` of any other
layer, and keeps the name of the original, for the tools that look at it.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from abc import ABCMeta
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import operations
from .autograd import in_transform, needs_backward, sparse
from .controller import Policy
from .operations import Geometry, Operation
from .other_gradients import refuse_hook
from .weights import is_plain

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
        function, args, *rest = super().__reduce_ex__(protocol)
        plain = tuple(original_class(a) if isinstance(a, type) else a for a in args)
        return _rebuild, (type(self)._ssprop_patch, function, plain), *rest


class PatchedLayer(Patched):
    """Mixin of layers with a sparse backward.

    Of the instance ``_ssprop_policy`` is a :class:`Policy` and ``_ssprop_membership`` ties it to
    the controller's watch.
    """

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), "sparse backward"]))

    def register_forward_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_hook(self, hook)
        return super().register_forward_hook(hook, *args, **kwargs)

    def register_full_backward_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_hook(self, hook)
        return super().register_full_backward_hook(hook, *args, **kwargs)


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


def is_patched_class(cls: type) -> bool:
    """Whether ``cls`` itself, not a base of it, was made by :func:`make_patched_class`."""
    return "_ssprop_original" in cls.__dict__


def base_layer(cls: type[nn.Module]) -> type[nn.Module] | None:
    """Return which of :data:`LAYERS` a class is, or None."""
    return next((base for base in LAYERS if issubclass(cls, base)), None)


def has_own_forward(cls: type[nn.Module]) -> bool:
    """Whether a layer class computes its forward in another way than torch's."""
    base = base_layer(cls)
    if base is None or cls.forward is not base.forward:
        return True
    return getattr(cls, "_conv_forward", None) is not getattr(base, "_conv_forward", None)


def overrides_forward(cls: type[nn.Module]) -> bool:
    """Whether patching replaces ``forward``, not the inner step of torch's convolutions."""
    return has_own_forward(cls) or base_layer(cls) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@functools.cache
def patched_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``cls``, a layer class, with a sparse backward."""
    base = base_layer(cls)
    if not overrides_forward(cls):
        name, method = "_conv_forward", _conv_forward(cls)
    elif base is nn.Linear and not has_own_forward(cls):
        name, method = "forward", _linear_forward(cls)
    else:  # a transposed convolution too, whose forward works out its output padding first
        name, method = "forward", _own_forward(cls)
    return make_patched_class(PatchedLayer, patched_class, cls, name, method)


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


def _conv_forward(cls: type[nn.Module]) -> Callable[..., Tensor]:
    operation, dense_forward = LAYERS[base_layer(cls)], cls._conv_forward
    # Closure variables, not globals: see _readable_by_torchscript.
    dispatch, is_sparse, make, pad = _dispatch, _is_sparse, Geometry, F.pad
    proxy, keep = torch.fx.Proxy, keep_in_graph

    def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(input, proxy):
            return keep(self, dense_forward, (input, weight, bias), (input,), {})
        policy = getattr(self, "_ssprop_policy", None)
        if policy is None or not is_sparse(self, policy, input, weight, bias):
            return dense_forward(self, input, weight, bias)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        geometry = make(self.stride, padding, self.dilation, self.groups)
        return dispatch(operation, policy, input, weight, bias, geometry)

    return _conv_forward


def _linear_forward(cls: type[nn.Module]) -> Callable[..., Tensor]:
    operation, dense_forward, geometry = operations.LINEAR, cls.forward, Geometry()
    dispatch, is_sparse = _dispatch, _is_sparse
    proxy, keep = torch.fx.Proxy, keep_in_graph

    def forward(self: Any, input: Tensor) -> Tensor:
        if isinstance(input, proxy):
            return keep(self, dense_forward, (input,), (input,), {})
        policy = getattr(self, "_ssprop_policy", None)
        weight, bias = self.weight, self.bias
        if policy is None or not is_sparse(self, policy, input, weight, bias):
            return dense_forward(self, input)
        return dispatch(operation, policy, input, weight, bias, geometry)

    return forward


def _is_sparse(
    module: nn.Module, policy: Policy, input: Tensor, weight: Tensor, bias: Tensor | None
) -> bool:
    return (
        policy.active
        and module.training
        # Before anything is read of the weight: some subclasses answer to calls of layers only.
        and (type(weight) in _PLAIN or is_plain(type(weight)) or _stays_dense(module, weight))
        and needs_backward(input, weight, bias)
        and not (_is_tracing() or _is_exporting())
    )


_PLAIN = (nn.Parameter, Tensor)


def _stays_dense(module: nn.Module, weight: Tensor) -> bool:
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"{type(module).__name__}: its weight is a {type(weight).__name__}, a tensor subclass "
            "with operations of its own, so that its backward stays dense",
            stacklevel=4,
        )
    return False


# Whether a tool records the network for use elsewhere: that gets the dense one.
_is_tracing = torch.jit.is_tracing
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch >= 2.7


def _dispatch(
    operation: Operation,
    policy: Policy,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """Call ``operation`` sparsely as ``policy`` says; densely where it keeps every channel."""
    channels = operation.selectable(weight, geometry.groups)
    if torch.compiler.is_compiling():
        # Reading the rate here would make one graph per value: the operator reads it by handle.
        if (channels > 1 and policy.override != 0.0) or policy.record is not None:
            return sparse(operation, input, weight, bias, geometry, handle=policy.handle)
    else:
        k = policy.kept(channels)
        if k < channels:
            return sparse(
                operation, input, weight, bias, geometry,
                k=k, score_fn=policy.score_fn, record=policy.record,
            )  # fmt: skip
    out = operation.run(input, weight, bias, geometry)
    if policy.record is not None and not (
        torch.compiler.is_compiling() or in_transform(input, weight, bias)
    ):
        policy.record.dense(input, weight, bias, out)
    return out


# --- forwards of their own --------------------------------------------------------------------


def _own_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    dense_forward, caught = cls.forward, _caught_in(cls)
    run = _run_own_forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(self, dense_forward, caught, args, kwargs)

    return forward


def _run_own_forward(
    module: nn.Module,
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
    if not training or _is_tracing() or _is_exporting():
        return dense_forward(module, *args, **kwargs)
    with _Catch(module, operations) as mode:
        out = dense_forward(module, *args, **kwargs)
    if not torch.compiler.is_compiling() and not mode.caught:
        names = "/".join(f"torch.nn.functional.{f.__name__}" for f in operations)
        warnings.warn(
            f"{type(module).__name__}.forward called no {names} with a plain weight under "
            "autograd: its backward stays dense",
            stacklevel=3,
        )
    return out


class _Catch(TorchFunctionMode):
    """Makes the convolutions (linear layers, ...) that a module's own forward calls sparse.

    What that forward does to the weight before (standardise, scale, mask) stays in autograd.
    Layers inside it, modules of their own, go by their own settings (but one that also writes its
    own forward and is not converted looks like a part of this one).
    """

    def __init__(self, module: nn.Module, operations: Mapping[Any, Operation]) -> None:
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
        weight = kwargs["weight"] if "weight" in kwargs else args[1]
        if any(weight is p for child in self.module.children() for p in child.parameters()):
            return func(*args, **kwargs)
        # Inside an autograd.Function, or of a weight that computes its product in its own way.
        if not torch.is_grad_enabled() or not is_plain(type(weight)):
            return func(*args, **kwargs)
        if not torch.compiler.is_compiling():  # which does not model a mode's attributes
            self.caught = True
        return _catch(operation, self.policy, *args, **kwargs)


def _caught_in(cls: type[nn.Module]) -> dict[Any, Operation]:
    """Return which functions are caught in the forward of ``cls``.

    Those of its own kind only: a convolution may use a linear layer to make its weight.
    """
    base = base_layer(cls)
    if base is None or LAYERS[base] in operations.CONVOLUTIONS:
        found = operations.CONVOLUTIONS
    elif LAYERS[base].transposed:
        found = operations.TRANSPOSED_CONVOLUTIONS
    else:
        found = (operations.LINEAR,)
    return {operation.dense: operation for operation in found}


def _catch(
    operation: Operation, policy: Policy, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    bias = args[0] if args else kwargs.get("bias")
    if policy.active and needs_backward(input, weight, bias):
        bias, geometry = operation.arguments(*args, **kwargs)
        return _dispatch(operation, policy, input, weight, bias, geometry)
    return operation.dense(input, weight, *args, **kwargs)


# --- torch.fx ---------------------------------------------------------------------------------


def keep_in_graph(
    module: nn.Module, dense_forward: Callable[..., Any], dense_args: Any, args: Any, kwargs: Any
) -> Any:
    """Put the layer itself into a graph that torch.fx traces, as fx does with torch's own layers.

    So the graph's layer goes on reading mode and rate when it runs.
    """
    tracer = next(a.tracer for a in (*args, *kwargs.values()) if isinstance(a, torch.fx.Proxy))
    if module is tracer.root:
        return dense_forward(module, *dense_args)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
