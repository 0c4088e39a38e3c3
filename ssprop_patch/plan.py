"""What a conversion does to each layer of a model, and why: decided before it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ._validate import check_drop_rate
from .calls import what_ran
from .eligible import (
    DEFAULT_TYPES,
    Types,
    check_types,
    is_wrapped,
    judge,
    looks_like_convolution,
)
from .modules import is_patched_layer, original_class
from .patterns import check_patterns, matches
from .planned import Plan, PlanNetwork, PlanRow
from .readers import Readers
from .selection import Selection, resolve_selection

if TYPE_CHECKING:
    from .timing.calls import Inputs
    from .timing.layers import LayerTime

__all__ = ["DEFAULT_TYPES", "FilterFn", "Plan", "PlanNetwork", "PlanRow", "Types", "plan"]

FilterFn = Callable[[nn.Module, str], bool]


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
    selection: Selection = "l1",
    autocast: torch.dtype | None = None,
    iterations: int = 15,
) -> Plan:
    """Say what :func:`ssprop_patch.convert` would do to each layer, and change nothing.

    With ``measure`` also what it would save on this machine. Each layer that would be converted is
    timed alone, dense and sparse in turns; then the whole network with none of them converted,
    those that paid alone, and all. ``filter_fn=plan.pays`` converts what was fastest, maybe none;
    what else is given to ``convert`` should be as it was measured::

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
            controller's rate is above 0. The first pattern that matches counts. Layers are measured
            at them, too.
        measure: Whether to time layers and network: forward and backward of a training step, as
            :func:`ssprop_patch.timing.time_layers` and ``time_networks`` do.
            A layer pays alone if its sparse median is below 0.97 of the dense one; a converted
            network is faster than the dense one if its median is below 0.99 of that. A compiled
            model runs compiled, once for each choice. Measure before wrapping in DDP.
        inputs: What the model is called with while measuring, on the device and in the memory
            format of the training: a tensor, a tuple of positional or a dict of keyword arguments.
        drop_rate, align, selection: Of the sparse side while measuring, as for
            :func:`ssprop_patch.convert`.
        autocast: The dtype of autocast while measuring, or None for none.
        iterations: Measurements of each side.

    Returns:
        The plan, with a row for every convolution and every layer of ``types``, in the order of
        ``model.modules()``.

    Raises:
        TypeError: If ``model`` is not a module, a pattern not text, or ``types`` not classes.
        ValueError: If a pattern matches no layer of the plan (the nearest names are shown), a rate
            is not in [0, 1), one of ``types`` cannot have a sparse backward, there is no such
            ``selection``, or ``measure`` and ``inputs`` come without each other.
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
    resolve_selection(selection)
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
        if isinstance(m, types)
        or is_patched_layer(m)
        or looks_like_convolution(m)
        or is_wrapped(m)
    }
    check_patterns((*exclude, *overrides), layers)

    rows, readers = [], Readers(model)
    for module, aliases in layers.items():
        action, reason = judge(module, types)
        rate, never_called = None, False
        if action == "convert" and (read := readers.judge(module)) is not None:
            never_called, who = read
            action, reason = ("skip", who) if never_called else (action, f"{reason}; {who}")
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
        cls = original_class(type(module))
        ran, remark = what_ran(module)
        rows.append(
            PlanRow(
                aliases[0], module, cls, action, reason + remark, rate,
                ran=ran, never_called=never_called,
            )
        )  # fmt: skip
    if not measure:
        return Plan(tuple(rows))
    from .timing import time_layers, time_networks  # which themselves begin with a plan

    timing = {
        "types": types, "overrides": overrides, "align": align, "selection": selection,
        "autocast": autocast, "iterations": iterations,
    }  # fmt: skip
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
