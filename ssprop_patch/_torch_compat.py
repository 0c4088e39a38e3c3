"""Every private name of torch that this package uses, each with what is done without it.

All of them exist in torch 2.6 to 2.14, but for those with a comment that says otherwise. Private
names may go at any time, so none of them is needed: this module can be imported where any of them
is missing, gradients are the same, and what is lost is said at each name. They are looked up once,
here. What is called for each layer is torch's own function under another name, and costs nothing
more.

Not here are attributes of modules that subclasses and tools of torch's users have read for years:
``_parameters``, ``_buffers``, ``_modules``, ``_forward_hooks``, ``_forward_pre_hooks``,
``_backward_hooks``, ``_backward_pre_hooks``, the ``_conv_forward`` and
``_reversed_padding_repeated_twice`` of a convolution, the ``_output_padding`` of a transposed one,
and the ``_orig_mod`` of a compiled module.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from datetime import timedelta
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

#: Every name that was looked up.
NAMES: list[str] = []

# A test sets it before this module runs, to names that it is to do without.
_hidden: frozenset[str]
if "_hidden" not in globals():
    _hidden = frozenset()


def _find(name: str) -> Any:
    """Return what has this dotted name, or None where any part of it is missing."""
    NAMES.append(name)
    if name in _hidden:
        return None
    path, *parts = name.split(".")
    found: Any = sys.modules[path]
    for part in parts:
        path = f"{path}.{part}"
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(path)
            except ImportError:
                return None
    return found


class _Nothing:
    """In place of a class that is missing: nothing is an instance of it."""


# --- autograd -----------------------------------------------------------------------------------


def _cannot_tell(node: Any) -> bool:
    raise RuntimeError("this torch does not say which nodes run")


#: Whether the backward that is running will run a node. Raises a RuntimeError for leaves whose
#: gradient ``torch.autograd.grad`` returns. Without it the same error for all nodes: every gradient
#: counts as asked for, and no gradient is made lazy.
will_engine_execute_node: Callable[[Any], bool] = (
    _find("torch._C._will_engine_execute_node") or _cannot_tell
)


def backward_class(function: type[torch.autograd.Function]) -> type:
    """Return the class of ``grad_fn`` of what ``function`` returns.

    Without it a class that no node has: nodes of this function are not recognised.
    """
    return function._backward_cls if _HAS_BACKWARD_CLASS else _Nothing


_HAS_BACKWARD_CLASS = _find("torch.autograd.Function._backward_cls") is not None

#: Returns a number of the backward pass that this thread is in, -1 outside of any. Without it
#: always -1: the seconds of backward passes are not measured.
current_graph_task_id: Callable[[], int] = _find("torch._C._current_graph_task_id") or (lambda: -1)


def run_after_backward(callback: Callable[[], None]) -> bool:
    """Have ``callback`` called when the backward pass that is running is through, as DDP does.

    Returns:
        Whether it will be; without the name this needs, False.
    """
    if _queue_callback is None:
        return False
    _queue_callback(callback)
    return True


_queue_callback = _find("torch.autograd.Variable._execution_engine.queue_callback")


# --- lazy gradients -----------------------------------------------------------------------------

#: Counts the nodes of a thread in the order in which they were recorded.
sequence_number: Callable[[Any], int] = methodcaller("_sequence_nr")
#: Counts how often a tensor was changed in place.
version: Callable[[Tensor], int] = attrgetter("_version")
#: Returns the hooks of a tensor, or None.
tensor_hooks: Callable[[Tensor], Any] = attrgetter("_backward_hooks")

#: Makes a tensor of a subclass that has a shape and no memory.
make_wrapper_subclass: Any = _find("torch.Tensor._make_wrapper_subclass")
#: The ``__torch_function__`` of a subclass that leaves everything to ``__torch_dispatch__``.
disabled_torch_function_impl: Any = _find("torch._C._disabled_torch_function_impl")

#: Whether gradients can be lazy, which needs all five names above. Where one is missing, batch
#: norms and ReLUs keep torch's own backward, and nothing else of these five is used.
CAN_BE_LAZY = None not in [
    _find("torch._C._FunctionBase._sequence_nr"),
    _find("torch.Tensor._version"),
    _find("torch.Tensor._backward_hooks"),
    make_wrapper_subclass,
    disabled_torch_function_impl,
]


# --- what is at work around a call --------------------------------------------------------------

#: Whether a torch.func transform is active. Without it never: torch's own message says that the
#: functions of this package take none.
are_functorch_transforms_active: Callable[[], bool] = _find(
    "torch._C._are_functorch_transforms_active"
) or (lambda: False)


def _has_forward_ad_level() -> bool:
    """Whether forward-mode AD is on, so that a tensor may have a tangent.

    Without the name it reads always, so that each tensor is looked at.
    """
    return forward_ad._current_level >= 0


has_forward_ad_level: Callable[[], bool] = (
    (lambda: True)
    if _find("torch.autograd.forward_ad._current_level") is None
    else _has_forward_ad_level
)

#: Whether a tensor is one inside a torch.func transform. Without it every tensor counts as one,
#: so that no gradient is lazy and C functions are given none.
is_functorch_wrapped_tensor: Callable[[Tensor], bool] = _find(
    "torch._C._functorch.is_functorch_wrapped_tensor"
) or (lambda t: True)

#: Whether a tensor stands for several, under ``torch.func.vmap``. Without it none does: where one
#: did, torch itself refuses what cannot be done with it.
is_batchedtensor: Callable[[Tensor], bool] = _find("torch._C._functorch.is_batchedtensor") or (
    lambda t: False
)
#: As :func:`is_batchedtensor`, under ``is_grads_batched`` of ``torch.autograd.grad``.
is_legacy_batchedtensor: Callable[[Tensor], bool] = _find(
    "torch._C._functorch.is_legacy_batchedtensor"
) or (lambda t: False)

#: Whether autocast is on for any device: a quick answer before each is asked. Without it True.
is_any_autocast_enabled: Callable[[], bool] = _find("torch._C._is_any_autocast_enabled") or (
    lambda: True
)

#: How many TorchDispatchModes are active. Without it 1, in case there is one: C functions, which no
#: mode can see, compute no convolution, and weights are not compared to find an unseen optimizer.
len_torch_dispatch_stack: Callable[[], int] = _find("torch._C._len_torch_dispatch_stack") or (
    lambda: 1
)


class _NoDispatchMode:
    """In place of a mode: sees nothing."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


# The base of modes that see every operator. Without it they see none, and what of a network's FLOPs
# is in no layer that a conversion takes is not known.
if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode
else:
    TorchDispatchMode = _find("torch.utils._python_dispatch.TorchDispatchMode") or _NoDispatchMode

#: Whether such a mode sees operators.
MODES_SEE_OPERATORS = not issubclass(TorchDispatchMode, _NoDispatchMode)


class EagerDispatchMode(TorchDispatchMode):
    """A mode that is entered only where nothing is compiled, so that Dynamo cannot trace it.

    torch need not keep its ``__torch_dispatch__`` from Dynamo, which would import all of it, for
    seconds, at the first operator. Where torch does not ask (2.6), or asks in another way, it is
    no more than ``TorchDispatchMode``.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


_find("torch.utils._python_dispatch.TorchDispatchMode._should_skip_dynamo")


# --- torch.compile ------------------------------------------------------------------------------


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module go to torch.compile: one that it returned, or compiled in place.

    Without the name the latter looks like any other module, and its first call may be eager.
    """
    in_place = getattr(module, "_compiled_call_impl", None)
    return in_place is not None or "_orig_mod" in module._modules


def never_compile_alone(function: Callable[..., Any]) -> None:
    """Keep Dynamo from compiling a call of ``function`` that is not part of a larger graph.

    Without it a compiled optimizer step makes a graph of its own for each value.
    """
    if _skip_code is not None:
        _skip_code(function.__code__)
    elif None not in (_set_strategy, _FrameStrategy, _FrameAction):
        strategy = _FrameStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT)
        _set_strategy(function.__code__, strategy)


_skip_code = _find("torch._C._dynamo.eval_frame.skip_code")  # torch 2.6
# Later ones.
_set_strategy = _find("torch._C._dynamo.eval_frame.set_code_exec_strategy")
_FrameStrategy = _find("torch._C._dynamo.eval_frame._FrameExecStrategy")
_FrameAction = _find("torch._C._dynamo.eval_frame._FrameAction")


def call_while_tracing(function: Callable[..., Any]) -> None:
    """Have Dynamo call ``function`` while it traces, and leave nothing of it in the graph.

    No guard, no side effect. ``torch.compiler.assume_constant_result`` sets the same attribute, but
    imports all of Dynamo. Where Dynamo does not read it, it traces ``function``.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


#: Makes a function one that Dynamo does not trace, without importing Dynamo as
#: ``torch.compiler.disable`` does, which is used without it.
disable_dynamo: Callable[[Callable[..., Any]], Callable[..., Any]] = (
    _find("torch._disable_dynamo") or torch.compiler.disable
)


def is_dynamo_imported() -> bool:
    """Whether Dynamo is imported: else nothing can be compiled.

    Where it has another name, what is compiled may be compiled once more.
    """
    return "torch._dynamo" in sys.modules


# --- classes ------------------------------------------------------------------------------------


class _NoFakeTensorMode:
    def __init__(self, **kwargs: Any) -> None:
        raise NotImplementedError("this torch has no FakeTensorMode")


# A tensor without memory, and the mode that makes them. Without the one no tensor is such a one;
# without the other the mode cannot be entered, and what would be traced with it runs on numbers.
if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
else:
    FakeTensor = _find("torch._subclasses.fake_tensor.FakeTensor") or _Nothing
    FakeTensorMode = _find("torch._subclasses.fake_tensor.FakeTensorMode") or _NoFakeTensorMode


def _classes(name: str, *known: str) -> tuple[type[nn.Module], ...]:
    """Return the common base of some classes of torch.nn; without it those classes."""
    base = _find(name)
    return (base,) if base is not None else tuple(getattr(nn, cls) for cls in known)


#: Of all convolutions.
CONV_CLASSES = _classes(
    "torch.nn.modules.conv._ConvNd",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
)
#: Of all batch norms.
BATCH_NORM_CLASSES = _classes(
    "torch.nn.modules.batchnorm._BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "SyncBatchNorm",
)
#: Of those that get their shape in their first forward.
LAZY_NORM_CLASSES = _classes(
    "torch.nn.modules.batchnorm._LazyNormBase",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
)


def is_fake_class(cls: type) -> bool:
    """Whether torch made this class of tensors to trace a model without memory."""
    return f"{cls.__module__}.".startswith("torch._subclasses.")


def is_shard_class(cls: type) -> bool:
    """Whether a tensor of this class is a shard of one that lies on several ranks."""
    return f"{cls.__module__}.".startswith(("torch.distributed.tensor.", "torch.distributed._"))


# --- torch.distributed --------------------------------------------------------------------------


def timeout_of(group: Any, device: torch.device) -> timedelta | None:
    """Return how long a process group waits for a rank; without it None, torch's default."""
    if not _HAS_TIMEOUT:
        return None
    return getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)


_HAS_TIMEOUT = None not in [
    _find("torch.distributed.ProcessGroup._get_backend"),
    _find("torch._C._distributed_c10d.Backend.Options._timeout"),
]


# --- functions ----------------------------------------------------------------------------------

#: ``F.linear``, also where a tool has put its own there before this import. Without it what is
#: there now.
linear: Callable[..., Tensor] = _find("torch._C._nn.linear") or nn.functional.linear


_Function = TypeVar("_Function", bound=Callable[..., Any])


class _DecoratorContextManager:
    """As torch's own: a context manager that also decorates, with a fresh one for each call."""

    def __call__(self, function: _Function) -> _Function:
        if inspect.isclass(function):
            raise TypeError("a class cannot be decorated: decorate its methods")
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def run_generator(*args: Any, **kwargs: Any) -> Any:
                # Inside while it runs, outside while it waits at a yield.
                generator = function(*args, **kwargs)
                resume: Callable[[], Any] = functools.partial(next, generator)
                while True:
                    try:
                        with self.clone():
                            value = resume()
                    except StopIteration as end:
                        return end.value
                    try:
                        resume = functools.partial(generator.send, (yield value))
                    except GeneratorExit:
                        with self.clone():
                            generator.close()
                        raise
                    except BaseException as error:
                        resume = functools.partial(generator.throw, error)

            return cast(_Function, run_generator)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.clone():
                return function(*args, **kwargs)

        return cast(_Function, run)

    def __enter__(self) -> Any:
        raise NotImplementedError

    def __exit__(self, *exc_info: object) -> None:
        raise NotImplementedError

    def clone(self) -> Any:
        """Return a fresh one."""
        return type(self)()


# The base of ``torch.no_grad``: a context manager that is a decorator too, of generators as well.
# Without it one of our own that does the same.
if TYPE_CHECKING:
    DecoratorContextManager = _DecoratorContextManager
else:
    DecoratorContextManager = (
        _find("torch.utils._contextlib._DecoratorContextManager") or _DecoratorContextManager
    )


# --- trees --------------------------------------------------------------------------------------


def _tree_map(
    function: Callable[[Any], Any], tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    if is_leaf is not None and is_leaf(tree):
        return function(tree)
    again = functools.partial(_tree_map, function, is_leaf=is_leaf)
    if type(tree) in (list, tuple):
        return type(tree)(map(again, tree))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(again, tree))
    if isinstance(tree, dict):
        made = tree.copy()  # with the order and the default of its class
        for key, value in tree.items():
            made[key] = again(value)
        return made
    return function(tree)


def _tree_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    found: list[Any] = []
    _tree_map(found.append, tree, is_leaf)
    return found


def _tree_map_only(cls: type, function: Callable[[Any], Any], tree: Any) -> Any:
    return _tree_map(lambda leaf: function(leaf) if isinstance(leaf, cls) else leaf, tree)


#: The leaves of nested tuples, lists and dicts; and such a tree with a function's value in place of
#: each leaf, or of each leaf of a class. Without them our own, which look into no other containers.
tree_leaves: Callable[..., list[Any]] = _find("torch.utils._pytree.tree_leaves") or _tree_leaves
tree_map: Callable[..., Any] = _find("torch.utils._pytree.tree_map") or _tree_map
tree_map_only: Callable[..., Any] = _find("torch.utils._pytree.tree_map_only") or _tree_map_only
