"""Which layers can get a sparse backward, and why others cannot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .._torch_compat import CONV_CLASSES
from ..class_swap import is_patched, is_patched_class, original_class
from .gradient_hooks import hooked_by
from .layer_kinds import LAYERS, base_layer, has_own_forward, overrides_forward
from .layers import patched_class
from .reasons import Reason, Verdict
from .weights import why_not

Types = type[nn.Module] | Sequence[type[nn.Module]]

#: What is converted unless other classes are named.
DEFAULT_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def judge(module: nn.Module, types: tuple[type[nn.Module], ...]) -> Verdict:
    """Return what a conversion of ``types`` does to a layer, and why."""
    cls = type(module)
    if is_wrapped(module):
        return Verdict(
            Reason.WRAPPED_CLASS,
            f"{cls.__name__} was put on after conversion: take it off first (for parametrizations "
            "torch.nn.utils.parametrize.remove_parametrizations), then convert or revert",
        )
    cls = original_class(cls)
    if issubclass(cls, LazyModuleMixin):
        return Verdict(
            Reason.LAZY, "lazy: run one forward first, so that it gets its shape and its class"
        )
    if isinstance(module, torch.jit.ScriptModule):
        return Verdict(Reason.TORCHSCRIPT, "TorchScript: convert before scripting")
    base = base_layer(cls)
    if not isinstance(module, types):
        return _not_among_types(base)
    if getattr(module, "out_features" if base is nn.Linear else "out_channels", None) == 1:
        return Verdict(Reason.ONE_CHANNEL, "one output channel: nothing to choose from")
    if any(p.is_complex() for p in module.parameters()):
        return Verdict(Reason.COMPLEX, "complex weights")
    # Not by getattr: a parametrization would compute it.
    weight = module._parameters.get("weight")
    unfit = None if weight is None or has_own_forward(cls) else why_not(weight)
    if unfit is not None:
        return Verdict(Reason.UNFIT_WEIGHT, unfit)
    if not is_patched(module) and (library := hooked_by(module)) is not None:
        return Verdict(
            Reason.HOOKED,
            f"{library} computes gradients of its parameters by hooks, as if the backward were "
            "dense: take those off first",
        )
    if issubclass(cls, NonDynamicallyQuantizableLinear):
        return Verdict(
            Reason.ATTENTION, "nn.MultiheadAttention reads its weight and never calls it"
        )
    if overrides_forward(cls) and "forward" in vars(module):
        return Verdict(
            Reason.WRAPPED_FORWARD,
            "its forward is wrapped on the instance: convert before it is wrapped",
        )
    try:
        patched_class(cls)  # made once, and kept
    except Exception as error:
        return Verdict(
            Reason.FINAL_CLASS,
            f"its class {cls.__qualname__} cannot have a subclass: {type(error).__name__}: {error}",
        )
    if not has_own_forward(cls):
        return Verdict(Reason.STOCK_FORWARD, "stock forward")
    caught = "F.linear" if base is nn.Linear else "F.conv"
    return Verdict(Reason.OWN_FORWARD, f"own forward: its calls of {caught} are caught")


def _not_among_types(base: type[nn.Module] | None) -> Verdict:
    if base is None:
        return Verdict(
            Reason.CONVOLVES_BY_ITSELF,
            "not a Conv1d, Conv2d or Conv3d: computes its convolution in its own way",
        )
    kind = "transposed convolution: " if LAYERS[base].transposed else ""
    return Verdict(Reason.NOT_AMONG_TYPES, f"{kind}nn.{base.__name__} is not among types")


def check_types(types: Types) -> tuple[type[nn.Module], ...]:
    """Return ``types`` as a tuple.

    Raises:
        TypeError: If they are not classes of layers.
        ValueError: If there are none, or one cannot have a sparse backward.
    """
    found = (types,) if isinstance(types, type) else tuple(types)
    for cls in found:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"types must be classes of layers, got {cls!r}")
        # A layer of another library that computes its convolution with torch's functions may be
        # named; whether it does shows when it runs, and a warning says so where it does not.
        if base_layer(cls) is None and "conv" not in cls.__name__.lower():
            names = ", ".join(f"nn.{base.__name__}" for base in LAYERS)
            raise ValueError(
                f"types: {cls.__name__} has no sparse backward; there is one for {names}, their "
                "subclasses, and other classes of convolutions"
            )
    if not found:
        raise ValueError("types is empty: name at least one class of layers, such as nn.Conv2d")
    return found


def is_wrapped(module: nn.Module) -> bool:
    """Whether something was put on the class of a patched layer or norm."""
    return is_patched(module) and not is_patched_class(type(module))


def other_products(module: nn.Module) -> Verdict | None:
    """Return why a layer stays dense that is no convolution, yet multiplies matrices; or None."""
    cls = original_class(type(module))
    if issubclass(cls, nn.Linear) and not issubclass(cls, NonDynamicallyQuantizableLinear):
        return _not_among_types(nn.Linear)
    if issubclass(cls, (nn.MultiheadAttention, nn.RNNBase)):
        return Verdict(Reason.NO_SPARSE_BACKWARD, f"there is no sparse backward for {cls.__name__}")
    return None


def looks_like_convolution(module: nn.Module) -> bool:
    """Whether a layer computes a convolution, so that a plan says what becomes of it."""
    if isinstance(module, CONV_CLASSES):
        return True
    # Layers of other libraries that hold a weight and say what they are.
    name = getattr(module, "original_name", type(module).__name__)
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return "conv" in name.lower() and weight is not None and weight.dim() > 1
