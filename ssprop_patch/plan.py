"""What a conversion does to each layer of a model, and why: decided before it is done."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ._text import columns
from ._validate import check_drop_rate
from .modules import (
    LAYERS,
    Patched,
    PatchedLayer,
    base_layer,
    has_own_forward,
    is_patched_class,
    original_class,
    overrides_forward,
)

if TYPE_CHECKING:
    from .timing.calls import Inputs
    from .timing.layers import LayerTime

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
        times: What its calls took, one entry for each shape of input, where it was measured.
    """

    name: str
    module: nn.Module
    cls: type[nn.Module]
    action: Literal["convert", "skip", "refuse"]
    reason: str
    drop_rate: float | None = None
    times: tuple[LayerTime, ...] = ()

    @property
    def pays(self) -> bool:
        """Whether all calls of the layer in one step took clearly less time with a sparse backward.

        A layer that was measured and had no call to train does not pay.
        """
        dense = sum(t.calls * t.dense_ms.p50 for t in self.times)
        sparse = sum(t.calls * t.sparse_ms.p50 for t in self.times)
        return sparse < _CLEARLY * dense


# What two measurements of the same layer may differ by on a quiet machine.
_CLEARLY = 0.97


@dataclass(frozen=True)
class Plan:
    """A dry run of :func:`ssprop_patch.convert`; prints as a table, iterates over its rows."""

    rows: tuple[PlanRow, ...]
    measured: bool = False

    def pays(self, module: nn.Module, name: str = "") -> bool:
        """Whether a layer pays on this machine, as it was measured: a ``filter_fn``.

        Args:
            module: A layer of the model that was planned, or of a copy of it.
            name: Its fully qualified name, which finds it in a copy.

        Raises:
            RuntimeError: If the plan was made without ``measure=True``.
        """
        if not self.measured:
            raise RuntimeError(
                "this plan has no times: make it with plan(model, inputs=x, measure=True)"
            )
        row = next((r for r in self.rows if r.module is module), None)
        if row is None:
            row = next((r for r in self.rows if r.name == name), None)
        return row is not None and row.pays

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
        if self.measured:
            head = ("name", "input", "weight", "dense ms", "sparse ms", "share", "kernel", "pays")
            cells = [head, *(line for row in self.rows for line in _measured_lines(row))]
        else:
            cells = [("name", "class", "action", "why")]
            cells += [(r.name or "(model)", r.cls.__name__, r.action, r.reason) for r in self.rows]
        lines = columns(cells)
        lines.append(
            f"{len(self.rows)} layers: {len(self.converted)} to convert, "
            f"{len(self.skipped)} stay dense"
            + (f", {len(self.refused)} refused" if self.refused else "")
            + (f"; {sum(row.pays for row in self.converted)} pay" if self.measured else "")
        )
        return "\n".join(lines)


def _measured_lines(row: PlanRow) -> list[tuple[str, ...]]:
    """Return a line for each shape of input that a layer was given; one that says why none was."""
    name = row.name or "(model)"
    if row.action != "convert":
        return [(name, "", "", "", "", "", "", row.reason)]
    if not row.times:
        return [(name, "", "", "", "", "", "", "not run, or needs no gradient: no")]
    return [
        (
            name,
            "x".join(map(str, t.input_shape)) + f" ({t.calls} times)" * (t.calls > 1),
            "x".join(map(str, t.weight_shape)), f"{t.dense_ms.p50:.3f}", f"{t.sparse_ms.p50:.3f}",
            f"{t.share:.2f}", t.kernel + ", norm" * t.with_norm, "yes" if row.pays else "no",
        )
        for t in row.times
    ]  # fmt: skip


def plan(
    model: nn.Module,
    *,
    types: Types = DEFAULT_TYPES,
    filter_fn: FilterFn | None = None,
    exclude: str | Sequence[str] = (),
    overrides: Mapping[str, float] | None = None,
    measure: bool = False,
    inputs: Inputs | None = None,
    drop_rate: float = 0.8,
    align: int = 1,
    autocast: torch.dtype | None = None,
    iterations: int = 15,
) -> Plan:
    """Say what :func:`ssprop_patch.convert` would do to each layer, and change nothing.

    With ``measure`` also what it would save on this machine: each layer that would be converted is
    timed alone, dense and sparse in turns, and ``filter_fn=plan.pays`` converts those that pay::

        convert(model, filter_fn=plan(model, inputs=x, drop_rate=0.8, measure=True).pays)

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
        measure: Whether to time the layers: forward and backward of one training step each, under
            ``selection="l1"``, as :func:`ssprop_patch.timing.time_layers` does. A layer pays if
            its sparse median is below 0.97 of the dense one.
        inputs: What the model is called with while measuring, on the device and in the memory
            format of the training: a tensor, a tuple of positional or a dict of keyword arguments.
        drop_rate, align: Of the sparse side while measuring, as for :func:`ssprop_patch.convert`.
        autocast: The dtype of autocast while measuring, or None for none.
        iterations: Measurements of each side.

    Returns:
        The plan, with a row for every convolution and every layer of ``types``, in the order of
        ``model.modules()``.

    Raises:
        TypeError: If ``model`` is not a module, a pattern not text, or ``types`` not classes.
        ValueError: If a pattern matches no layer of the plan (the nearest names are shown), a rate
            is not in [0, 1), one of ``types`` cannot have a sparse backward, or ``measure`` and
            ``inputs`` come without each other.
    """
    if measure != (inputs is not None):
        raise ValueError(
            "measuring needs inputs to run the model on: plan(model, inputs=x, measure=True)"
            if measure
            else "inputs are for measuring: plan(model, inputs=x, measure=True)"
        )
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
        if isinstance(m, (*types, PatchedLayer)) or _looks_like_convolution(m) or _is_wrapped(m)
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
    if not measure:
        return Plan(tuple(rows))
    from .timing import time_layers  # which itself begins with a plan

    times = time_layers(
        model, inputs, drop_rate, types=types, filter_fn=_members(rows), align=align,
        autocast=autocast, iterations=iterations,
    )  # fmt: skip
    by_name: dict[str, list[LayerTime]] = {}
    for time in times:
        by_name.setdefault(time.name, []).append(time)
    timed = (replace(row, times=tuple(by_name.get(row.name, ()))) for row in rows)
    return Plan(tuple(timed), measured=True)


def _members(rows: Sequence[PlanRow]) -> FilterFn:
    wanted = {row.module for row in rows if row.action == "convert"}
    return lambda module, name: module in wanted


def _judge(
    module: nn.Module, types: tuple[type[nn.Module], ...]
) -> tuple[Literal["convert", "skip", "refuse"], str]:
    cls = type(module)
    if _is_wrapped(module):
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


def _is_wrapped(module: nn.Module) -> bool:
    """Whether something was put on the class of a patched layer or norm."""
    return isinstance(module, Patched) and not is_patched_class(type(module))


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
