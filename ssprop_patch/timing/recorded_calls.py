"""What each layer is given when its network runs, and the layer taken out of its network."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .._torch_compat import (
    BATCH_NORM_CLASSES,
    LAZY_NORM_CLASSES,
    tree_leaves,
    tree_map,
    tree_map_only,
)
from ..flops.trace import Shape, untouched
from ..ops import channel_ops
from ..ops.lazy_grad.graph import is_large_enough
from ..patching.convert import revert

Inputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]


class TensorLike(NamedTuple):
    """All of a tensor that its time depends on."""

    shape: Shape
    stride: Shape
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, t: Tensor) -> TensorLike:
        """Describe ``t``."""
        return cls(tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad)

    def random(self, generator: torch.Generator) -> Tensor:
        """Return another tensor like it; an expanded one as what it stands for."""
        overlaps = any(s == 0 and n > 1 for s, n in zip(self.stride, self.shape, strict=True))
        like: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        if overlaps:
            t = torch.empty(self.shape, **like)
        else:
            t = torch.empty_strided(self.shape, self.stride, **like)
        if not self.dtype.is_floating_point:
            return t.zero_()
        return t.normal_(generator=generator).requires_grad_(self.requires_grad)


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call of a layer, and the batch norm right after it that can defer its gradient."""

    module: nn.Module
    arguments: Any  # (args, kwargs) with a TensorLike for each tensor
    output_shape: Shape
    key: str  # equal where layer and inputs are alike, so that one timing serves all
    norm: nn.Module | None = None

    @property
    def weight_shape(self) -> Shape:
        """Of the layer's weight; empty where it has none of that name."""
        return tuple(getattr(self.module, "weight", torch.empty(())).shape)

    @property
    def input(self) -> TensorLike:
        """The first tensor of the arguments."""
        return next(t for t in _leaves(self.arguments) if isinstance(t, TensorLike))

    def make_inputs(self, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments like those of the call, with random numbers."""
        return tree_map(
            lambda t: t.random(generator) if isinstance(t, TensorLike) else t,
            self.arguments,
            is_leaf=_is_tensor_like,
        )


def record_calls(
    model: nn.Module,
    layers: Sequence[nn.Module],
    inputs: Inputs,
    autocast: torch.dtype | None = None,
    order: int | None = 1,
) -> list[tuple[RecordedCall, int]]:
    """Run ``model`` once; return the calls of ``layers`` in order, with their number.

    The model stays as it was, its buffers and the random state too. One in eval mode runs in
    training mode. Calls whose output needs no gradient are left out, and so are layers that are
    frozen (in eval mode, in a model that is training).

    Args:
        model: Any module, converted or not.
        layers: Those of its layers whose calls are wanted.
        inputs: What the model is called with.
        autocast: The dtype of autocast, or None for none.
        order: Of the scores, see :func:`ssprop_patch.core.selection.lazy_order`: whether there are
            norms that belong to a call.

    Raises:
        TypeError: If ``inputs`` are none.
        ValueError: If the model does not run on them.
    """
    args, kwargs = as_arguments(inputs)
    found: dict[tuple[int, str], tuple[RecordedCall, int]] = {}
    latest: list[Any] = [None, None]  # the output of the latest call, and where in found that is

    def note_norm(norm: nn.Module, norm_args: Any, out: Any, x: Any) -> None:
        y, place = latest
        if x is y and y is not None and is_large_enough(y) and norm.training:
            call, count = found[place]
            key = f"{call.key} {_key(norm, norm_args)}"
            found[place] = replace(call, norm=norm, key=key), count

    def note(module: nn.Module, arguments: Any, out: Any, x: Any) -> None:
        y = next(t for t in tree_leaves(out) if isinstance(t, Tensor))
        if not (y.requires_grad and module.training):
            return
        key = _key(module, arguments)
        first = RecordedCall(module, arguments, tuple(y.shape), key)
        call, count = found.get((id(module), key), (first, 0))
        found[id(module), key] = call, count + 1
        latest[:] = y, (id(module), key)

    norms = _lazy_norms(model, order)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with untouched(model), torch.inference_mode(False), torch.enable_grad():
        if not model.training:
            model.train()
        for module in layers:
            vars(module)["forward"] = _noted(module, note)
        for norm in norms:
            vars(norm)["forward"] = _noted(norm, note_norm)
        try:
            with autocasting(device_of(model, inputs), autocast):
                torch.func.functional_call(model, buffers, args, kwargs)
        except Exception as error:
            shapes = [tuple(t.shape) for t in _leaves(inputs) if isinstance(t, Tensor)]
            raise ValueError(
                f"the model does not run on inputs of shapes {shapes}: "
                f"{type(error).__name__}: {error}"
            ) from error
    return list(found.values())


def _lazy_norms(model: nn.Module, order: int | None) -> list[nn.Module]:
    """Return the batch norms of ``model`` whose gradient may be formed in part."""
    devices = {p.device.type for p in model.parameters()}
    if order is None or not any(channel_ops.may_split_norm(device, order) for device in devices):
        return []
    others: tuple[type, ...] = (nn.SyncBatchNorm, *LAZY_NORM_CLASSES, torch.jit.ScriptModule)
    return [
        m
        for m in model.modules()
        if isinstance(m, BATCH_NORM_CLASSES)
        and not isinstance(m, others)
        and "forward" not in vars(m)
    ]


def isolated(module: nn.Module) -> nn.Module:
    """Return a dense copy of a layer in training mode, without its hooks.

    Pre-hooks stay, as they may make the weight.
    """
    memo: dict[int, Any] = {}  # what deepcopy takes for copied already
    for m in module.modules():
        for name in ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks"):
            memo[id(vars(m)[name])] = OrderedDict()
        for value in vars(m).values():  # made by a pre-hook; deepcopy refuses them
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
    return revert(copy.deepcopy(module, memo)).train()


@contextlib.contextmanager
def autocasting(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Run under autocast to ``dtype``, or as it is."""
    if dtype is None:
        yield
    else:
        with torch.autocast(device.type, dtype):
            yield


def as_arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments.

    Raises:
        TypeError: If ``inputs`` are neither a tensor, a tuple nor a dict.
    """
    if not isinstance(inputs, (Tensor, tuple, Mapping)):
        raise TypeError(
            "inputs must be a tensor, a tuple of positional arguments or a dict of keyword "
            f"arguments, got {type(inputs).__name__}"
        )
    kwargs: dict[str, Any] = dict(inputs) if isinstance(inputs, Mapping) else {}
    return (inputs,) if isinstance(inputs, Tensor) else () if kwargs else tuple(inputs), kwargs


def device_of(model: nn.Module, inputs: Inputs) -> torch.device:
    """Return the device of the inputs, or of the model where they hold no tensor."""
    tensors = [t for t in _leaves(inputs) if isinstance(t, Tensor)]
    return next((t.device for t in [*tensors, *model.parameters()]), torch.device("cpu"))


def _noted(module: nn.Module, note: Callable[..., None]) -> Callable[..., Any]:
    forward = module.forward  # not a hook, so that a call of .forward counts too

    def noted(*args: Any, **kwargs: Any) -> Any:
        arguments = tree_map_only(Tensor, TensorLike.of, (args, kwargs))
        out = forward(*args, **kwargs)
        note(module, arguments, out, args[0] if args else None)
        return out

    return noted


def _key(module: nn.Module, arguments: Any) -> str:
    needs = [
        (name, tuple(p.shape), p.stride(), p.dtype, p.requires_grad)
        for name, p in module.named_parameters()
    ]
    # Where anything else may be at work (parametrizations, pre-hooks) a layer is like no other.
    alike = not (module._forward_pre_hooks or list(module.children()))
    cls = f"{type(module).__module__}.{type(module).__qualname__}"
    return repr((cls, repr(module), needs, arguments, None if alike else id(module)))


def _is_tensor_like(value: Any) -> bool:
    return isinstance(value, TensorLike)


def _leaves(tree: Any) -> list[Any]:
    return tree_leaves(tree, is_leaf=_is_tensor_like)
