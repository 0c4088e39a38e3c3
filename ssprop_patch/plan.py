"""What a conversion does to each convolution of a model, and why: decided before it is done."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin

from ._validate import check_drop_rate
from .modules import STOCK, PatchedConv, has_own_forward, is_patched_class, original_class

FilterFn = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class PlanRow:
    """One convolution.

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
            f"{len(self.rows)} convolutions: {len(self.converted)} to convert, "
            f"{len(self.skipped)} stay dense"
            + (f", {len(self.refused)} refused" if self.refused else "")
        )
        return "\n".join(lines)


def plan(
    model: nn.Module,
    *,
    filter_fn: FilterFn | None = None,
    exclude: str | Sequence[str] = (),
    overrides: Mapping[str, float] | None = None,
) -> Plan:
    """Say what :func:`ssprop_patch.convert` would do to each convolution, and change nothing.

    Args:
        model: Any module, converted or not.
        filter_fn: ``filter_fn(module, name) -> bool``: False leaves a convolution dense.
        exclude: Patterns of convolutions to leave dense. A pattern is the exact name of a
            convolution or of a module around it, the end of a name (``"conv1"`` means every
            ``*.conv1`` too), or a regular expression for the whole name (``"^conv1$"`` means the
            stem alone).
        overrides: ``{pattern: rate}``, rates of their own for some layers, in force whenever the
            controller's rate is above 0. The first pattern that matches counts.

    Returns:
        The plan, with a row for every convolution, in the order of ``model.modules()``.

    Raises:
        TypeError: If ``model`` is not a module, or a pattern not text.
        ValueError: If a pattern matches no convolution (the nearest names are shown), or a rate
            is not in [0, 1).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    overrides = {
        pattern: check_drop_rate(rate, f"overrides[{pattern!r}]")
        for pattern, rate in (overrides or {}).items()
    }
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    convolutions = {m: aliases for m, aliases in names.items() if _looks_like_convolution(m)}
    _check_patterns((*exclude, *overrides), convolutions)

    rows = []
    for module, aliases in convolutions.items():
        action, reason = _judge(module)
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


def _judge(module: nn.Module) -> tuple[Literal["convert", "skip", "refuse"], str]:
    cls = type(module)
    if isinstance(module, PatchedConv) and not is_patched_class(cls):
        return "refuse", (
            f"{cls.__name__} was put on after conversion: take it off first (for parametrizations "
            "torch.nn.utils.parametrize.remove_parametrizations), then convert or revert"
        )
    cls = original_class(cls)
    if issubclass(cls, LazyModuleMixin):
        return "refuse", "lazy: run one forward first, so that it gets its shape and its class"
    if isinstance(module, torch.jit.ScriptModule):
        return "skip", "TorchScript: convert before scripting"
    if issubclass(cls, _ConvTransposeNd):
        return "skip", "transposed convolution"
    if not issubclass(cls, tuple(STOCK)):
        return "skip", "not a Conv1d, Conv2d or Conv3d: computes its convolution in its own way"
    if module.out_channels == 1:
        return "skip", "one output channel: nothing to choose from"
    if any(p.is_complex() for p in module.parameters()):
        return "skip", "complex weights"
    if not has_own_forward(cls):
        return "convert", "stock forward"
    if "forward" in vars(module):
        return "skip", "own forward, wrapped on the instance: convert before it is wrapped"
    return "convert", "own forward: its calls of F.conv are caught"


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
    patterns: Sequence[str], convolutions: Mapping[nn.Module, Sequence[str]]
) -> None:
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"a pattern must be text, got {pattern!r}")
        if any(_matches(pattern, aliases) for aliases in convolutions.values()):
            continue
        names = [name for aliases in convolutions.values() for name in aliases]
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
        raise ValueError(
            f"the pattern {pattern!r} matches no convolution of the model; the nearest names are "
            f"{', '.join(map(repr, near)) or 'none, as it has no convolution'}"
        )
