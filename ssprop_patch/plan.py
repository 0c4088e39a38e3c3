"""What a conversion does to each layer of a model, and why: decided before it is done."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ._validate import check_drop_rate
from .modules import (
    LAYERS,
    PatchedLayer,
    base_layer,
    has_own_forward,
    is_patched_class,
    original_class,
    overrides_forward,
)

FilterFn = Callable[[nn.Module, str], bool]
Types = type[nn.Module] | Sequence[type[nn.Module]]

#: What is converted unless other classes are named.
DEFAULT_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class PlanRow:
    """One layer.

    Attributes:
        name: Fully qualified name, ``""`` for the model itself; the first, where it has several.
        module: The layer.
        cls: Its class before conversion.
        action: ``"convert"``; ``"skip"``: stays dense; ``"refuse"``: conversion is an error.
        reason: Why.
        drop_rate: The layer's own rate from ``overrides``, or None.
    """

    name: str
    module: nn.Module
    cls: type[nn.Module]
    action: Literal["convert", "skip", "refuse"]
    reason: str
    drop_rate: float | None = None


@dataclass(frozen=True)
class Plan:
    """A dry run of :func:`ssprop_patch.convert`; prints as a table, iterates over its rows."""

    rows: tuple[PlanRow, ...]

    @property
    def converted(self) -> tuple[PlanRow, ...]:
        """The layers that get a sparse backward."""
        return tuple(row for row in self.rows if row.action == "convert")

    @property
    def skipped(self) -> tuple[PlanRow, ...]:
        """The layers that stay dense."""
        return tuple(row for row in self.rows if row.action == "skip")

    @property
    def refused(self) -> tuple[PlanRow, ...]:
        """The layers because of which conversion is an error."""
        return tuple(row for row in self.rows if row.action == "refuse")

    def __iter__(self) -> Iterator[PlanRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = [("name", "class", "action", "why")]
        cells += [(r.name or "(model)", r.cls.__name__, r.action, r.reason) for r in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in cells]
        lines.append(
            f"{len(self.rows)} layers: {len(self.converted)} to convert, "
            f"{len(self.skipped)} stay dense"
            + (f", {len(self.refused)} refused" if self.refused else "")
        )
        return "\n".join(lines)


def plan(
    model: nn.Module,
    *,
    types: Types = DEFAULT_TYPES,
    filter_fn: FilterFn | None = None,
    exclude: str | Sequence[str] = (),
    overrides: Mapping[str, float] | None = None,
) -> Plan:
    """Say what :func:`ssprop_patch.convert` would do to each layer, and change nothing.

    Args:
        model: Any module, converted or not.
        types: Classes of layers to convert, subclasses included, as for
            :func:`ssprop_patch.convert`.
        filter_fn: ``filter_fn(module, name) -> bool``: False leaves a layer dense.
        exclude: Patterns of layers to leave dense. A pattern is the exact name of a
            layer or of a module around it, the end of a name (``"conv1"`` means every
            ``*.conv1`` too), or a regular expression for the whole name (``"^conv1$"`` means the
            stem alone).
        overrides: ``{pattern: rate}``, rates of their own for some layers, in force whenever the
            controller's rate is above 0. The first pattern that matches counts.

    Returns:
        The plan, with a row for every convolution and every layer of ``types``, in the order of
        ``model.modules()``.

    Raises:
        TypeError: If ``model`` is not a module, a pattern not text, or ``types`` not classes.
        ValueError: If a pattern matches no layer of the plan (the nearest names are shown), a rate
            is not in [0, 1), or one of ``types`` cannot have a sparse backward.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    types = _check_types(types)
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    overrides = {
        pattern: check_drop_rate(rate, f"overrides[{pattern!r}]")
        for pattern, rate in (overrides or {}).items()
    }
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    layers = {
        m: aliases
        for m, aliases in names.items()
        if isinstance(m, (*types, PatchedLayer)) or _looks_like_convolution(m)
    }
    _check_patterns((*exclude, *overrides), layers)

    rows = []
    for module, aliases in layers.items():
        action, reason = _judge(module, types)
        rate = None
        if action == "convert":
            excluded = next((p for p in exclude if _matches(p, aliases)), None)
            if excluded is not None:
                action, reason = "skip", f"excluded by {excluded!r}"
            elif filter_fn is not None and not filter_fn(module, aliases[0]):
                action, reason = "skip", "filter_fn returned False"
            else:
                pattern = next((p for p in overrides if _matches(p, aliases)), None)
                if pattern is not None:
                    rate = overrides[pattern]
                    reason += f", drop rate {rate:g} by {pattern!r}"
        rows.append(PlanRow(aliases[0], module, _shown_class(module), action, reason, rate))
    return Plan(tuple(rows))


def _judge(
    module: nn.Module, types: tuple[type[nn.Module], ...]
) -> tuple[Literal["convert", "skip", "refuse"], str]:
    cls = type(module)
    if isinstance(module, PatchedLayer) and not is_patched_class(cls):
        return "refuse", (
            f"{cls.__name__} was put on after conversion: take it off first (for parametrizations "
            "torch.nn.utils.parametrize.remove_parametrizations), then convert or revert"
        )
    cls = original_class(cls)
    if issubclass(cls, LazyModuleMixin):
        return "refuse", "lazy: run one forward first, so that it gets its shape and its class"
    if isinstance(module, torch.jit.ScriptModule):
        return "skip", "TorchScript: convert before scripting"
    base = base_layer(cls)
    if not isinstance(module, types):
        if base is None:
            return "skip", "not a Conv1d, Conv2d or Conv3d: computes its convolution in its own way"
        kind = "transposed convolution: " if LAYERS[base].transposed else ""
        return "skip", f"{kind}nn.{base.__name__} is not among types"
    if getattr(module, "out_features" if base is nn.Linear else "out_channels", None) == 1:
        return "skip", "one output channel: nothing to choose from"
    if any(p.is_complex() for p in module.parameters()):
        return "skip", "complex weights"
    if issubclass(cls, NonDynamicallyQuantizableLinear):
        return "skip", "nn.MultiheadAttention reads its weight and never calls it"
    if overrides_forward(cls) and "forward" in vars(module):
        return "skip", "its forward is wrapped on the instance: convert before it is wrapped"
    if not has_own_forward(cls):
        return "convert", "stock forward"
    caught = "F.linear" if base is nn.Linear else "F.conv"
    return "convert", f"own forward: its calls of {caught} are caught"


def _check_types(types: Types) -> tuple[type[nn.Module], ...]:
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


def _looks_like_convolution(module: nn.Module) -> bool:
    if isinstance(module, _ConvNd):
        return True
    # Layers of other libraries that hold a weight and say what they are.
    name = getattr(module, "original_name", type(module).__name__)
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return "conv" in name.lower() and weight is not None and weight.dim() > 1


def _shown_class(module: nn.Module) -> type[nn.Module]:
    return original_class(type(module))


def _matches(pattern: str, aliases: Sequence[str]) -> bool:
    return any(
        name == pattern
        or name.startswith(pattern + ".")
        or name.endswith("." + pattern)
        or _fullmatch(pattern, name)
        for name in aliases
    )


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False  # then it can only be a name


def _check_patterns(
    patterns: Sequence[str], layers: Mapping[nn.Module, Sequence[str]]
) -> None:
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"a pattern must be text, got {pattern!r}")
        if any(_matches(pattern, aliases) for aliases in layers.values()):
            continue
        names = [name for aliases in layers.values() for name in aliases]
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
        raise ValueError(
            f"the pattern {pattern!r} matches no layer to convert; the nearest names are "
            f"{', '.join(map(repr, near)) or 'none, as there is no such layer'}"
        )
