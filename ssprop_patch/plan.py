"""What a conversion does to each layer of a model, and why: decided before it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from ._text import columns
from ._validate import check_drop_rate
from .eligible import (
    DEFAULT_TYPES,
    Types,
    check_types,
    is_wrapped,
    judge,
    looks_like_convolution,
)
from .modules import PatchedLayer, original_class
from .patterns import check_patterns, matches

if TYPE_CHECKING:
    from .timing.calls import Inputs
    from .timing.layers import LayerTime
    from .timing.turns import Quantiles

__all__ = ["DEFAULT_TYPES", "FilterFn", "Plan", "PlanRow", "Types", "plan"]

FilterFn = Callable[[nn.Module, str], bool]


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
        """Whether all calls of the layer, alone, took clearly less time with a sparse backward.

        A layer that was measured and had no call to train does not pay.
        """
        dense = sum(t.calls * t.dense_ms.p50 for t in self.times)
        sparse = sum(t.calls * t.sparse_ms.p50 for t in self.times)
        return sparse < _CLEARLY * dense


# What two measurements of the same layer, or network, may differ by on a quiet machine.
_CLEARLY, _NETWORK_CLEARLY = 0.97, 0.99


@dataclass(frozen=True)
class PlanNetwork:
    """The whole network with some of its layers converted.

    Attributes:
        choice: ``"none"`` of them, ``"those that pay alone"``, or ``"all"``.
        converted: Their names.
        ms: Milliseconds of forward and backward.
    """

    choice: str
    converted: frozenset[str]
    ms: Quantiles


@dataclass(frozen=True)
class Plan:
    """A dry run of :func:`ssprop_patch.convert`; prints as a table, iterates over its rows.

    Attributes:
        rows: One for each layer.
        measured: Whether they were timed.
        networks: The choices of layers that the whole network was timed with, first ``"none"``;
            empty where there was no choice.
    """

    rows: tuple[PlanRow, ...]
    measured: bool = False
    networks: tuple[PlanNetwork, ...] = ()

    @property
    def best(self) -> PlanNetwork | None:
        """The fastest choice: the dense network unless another is clearly faster; None of none."""
        if not self.networks:
            return None
        dense, *others = self.networks
        fastest = min(others, key=lambda network: network.ms.p50)
        return fastest if fastest.ms.p50 < _NETWORK_CLEARLY * dense.ms.p50 else dense

    def pays(self, module: nn.Module, name: str = "") -> bool:
        """Whether to convert a layer on this machine, as it was measured: a ``filter_fn``.

        A layer belongs to the fastest choice for the whole network: alone it may pay and in there
        not, or the other way round, as caches and memory are shared.

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
        return row is not None and self.best is not None and row.name in self.best.converted

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
            cells = [_HEAD, *(line for row in self.rows for line in _measured_lines(row))]
        else:
            cells = [("name", "class", "action", "why")]
            cells += [(r.name or "(model)", r.cls.__name__, r.action, r.reason) for r in self.rows]
        lines = columns(cells)
        lines.append(
            f"{len(self.rows)} layers: {len(self.converted)} to convert, "
            f"{len(self.skipped)} stay dense"
            + (f", {len(self.refused)} refused" if self.refused else "")
            + (f"; {sum(row.pays for row in self.converted)} pay alone" if self.measured else "")
        )
        if self.best is not None:
            times = (f"{n.choice} {n.ms.p50:.3f} ms" for n in self.networks)
            lines.append(
                f"forward and backward of the whole network, converted: {', '.join(times)}; "
                f"convert {self.best.choice}"
            )
        return "\n".join(lines)


_HEAD = "name", "input", "weight", "dense ms", "sparse ms", "share", "kernel", "pays alone"


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

    With ``measure`` also what it would save on this machine. Each layer that would be converted is
    timed alone, dense and sparse in turns; then the whole network with none of them converted,
    those that paid alone, and all. ``filter_fn=plan.pays`` converts what was fastest, maybe none::

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
        measure: Whether to time layers and network: forward and backward of a training step, under
            ``selection="l1"``, as :func:`ssprop_patch.timing.time_layers` and ``time_networks`` do.
            A layer pays alone if its sparse median is below 0.97 of the dense one; a converted
            network is faster than the dense one if its median is below 0.99 of that. A compiled
            model runs compiled, once for each choice. Measure before wrapping in DDP.
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
    types = check_types(types)
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
        if isinstance(m, (*types, PatchedLayer)) or looks_like_convolution(m) or is_wrapped(m)
    }
    check_patterns((*exclude, *overrides), layers)

    rows = []
    for module, aliases in layers.items():
        action, reason = judge(module, types)
        rate = None
        if action == "convert":
            excluded = next((p for p in exclude if matches(p, aliases)), None)
            if excluded is not None:
                action, reason = "skip", f"excluded by {excluded!r}"
            elif filter_fn is not None and not filter_fn(module, aliases[0]):
                action, reason = "skip", "filter_fn returned False"
            else:
                pattern = next((p for p in overrides if matches(p, aliases)), None)
                if pattern is not None:
                    rate = overrides[pattern]
                    reason += f", drop rate {rate:g} by {pattern!r}"
        rows.append(PlanRow(aliases[0], module, original_class(type(module)), action, reason, rate))
    if not measure:
        return Plan(tuple(rows))
    from .timing import time_layers, time_networks  # which themselves begin with a plan

    timing = {"types": types, "align": align, "autocast": autocast, "iterations": iterations}
    times = time_layers(model, inputs, drop_rate, filter_fn=_members(rows), **timing)
    by_name: dict[str, list[LayerTime]] = {}
    for time in times:
        by_name.setdefault(time.name, []).append(time)
    timed = tuple(replace(row, times=tuple(by_name.get(row.name, ()))) for row in rows)
    choices = _choices(timed)
    if not choices:
        return Plan(timed, measured=True)
    modules = {choice: [row.module for row in chosen] for choice, chosen in choices.items()}
    ms = time_networks(model, inputs, modules, drop_rate, **timing)
    networks = (
        PlanNetwork(choice, frozenset(row.name for row in chosen), ms[choice])
        for choice, chosen in choices.items()
    )
    return Plan(timed, measured=True, networks=tuple(networks))


def _choices(rows: Sequence[PlanRow]) -> dict[str, list[PlanRow]]:
    """Return which layers the whole network is to be timed with; nothing where none can train."""
    trained = [row for row in rows if row.times]
    if not trained:
        return {}
    pay = [row for row in trained if row.pays]
    choices = {"none": [], "those that pay alone": pay, "all": trained}
    return {
        name: chosen for name, chosen in choices.items()
        if name != "those that pay alone" or 0 < len(pay) < len(trained)
    }  # fmt: skip


def _members(rows: Sequence[PlanRow]) -> FilterFn:
    wanted = {row.module for row in rows if row.action == "convert"}
    return lambda module, name: module in wanted
