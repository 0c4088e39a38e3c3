"""What a conversion does to each layer of a model, and why: decided before it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from .._validate import check_drop_rate
from ..class_swap import original_class
from ..core.rule import Remainder, Selection, resolve_rule
from ..schedule.watchdog import what_ran
from .eligibility import (
    DEFAULT_TYPES,
    Types,
    check_types,
    is_wrapped,
    judge,
    looks_like_convolution,
    other_products,
)
from .filters import FilterFn, check_filter, wants
from .layer_kinds import is_patched_layer
from .layer_rules import choice_of_layer
from .name_patterns import check_patterns, matches
from .plan import Plan, PlanRow
from .reasons import Reason, Verdict
from .weight_readers import Readers


def dry_run(
    model: nn.Module,
    *,
    types: Types = DEFAULT_TYPES,
    filter_fn: FilterFn | None = None,
    exclude: str | Sequence[str] = (),
    overrides: Mapping[str, float] | None = None,
    selection: Selection = "l1",
    remainder: Remainder = None,
    drop_rate: float = 0.8,
    align: int = 1,
) -> Plan:
    """Say what :func:`ssprop_patch.convert` would do to each layer, and change nothing.

    Args:
        model, types, filter_fn, exclude, overrides: As for :func:`ssprop_patch.plan`.
        selection, remainder, drop_rate, align: As there: what of each layer's gradient is selected.

    Raises:
        TypeError, ValueError: As :func:`ssprop_patch.plan`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    types = check_types(types)
    check_filter(filter_fn)
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    rates = {
        pattern: check_drop_rate(rate, f"overrides[{pattern!r}]")
        for pattern, rate in (overrides or {}).items()
    }
    rule, usual = resolve_rule(selection, remainder), check_drop_rate(drop_rate)
    layers = _layers_of(model, types)
    check_patterns((*exclude, *rates), layers, model)

    rows, readers = [], Readers(model)
    for module, aliases in layers.items():
        verdict, rate, selected = judge(module, types), None, None
        if verdict.action == "convert":
            verdict = readers.judge(module, verdict)
        if verdict.action == "convert":
            verdict = _chosen(verdict, module, aliases, exclude, filter_fn)
        if verdict.action == "convert":
            pattern = next((p for p in rates if matches(p, aliases)), None)
            if pattern is not None:
                rate = rates[pattern]
                verdict = verdict.but(f", drop rate {rate:g} by {pattern!r}")
        if verdict.action == "convert":
            at = usual if rate is None or usual == 0 else rate
            selected, words = choice_of_layer(rule, module, at, align)
            verdict = verdict.but(f", {words}" if words and at else "")
        ran, remark = what_ran(module)
        text = verdict.text + remark
        cls = original_class(type(module))
        rows.append(PlanRow(aliases[0], module, cls, verdict.reason, text, rate, ran, selected))
    return Plan(tuple(rows), _others(model, layers))


def _others(model: nn.Module, layers: Mapping[nn.Module, Sequence[str]]) -> tuple[PlanRow, ...]:
    """Return a row for each other layer that multiplies matrices."""
    found = []
    for name, module in model.named_modules():
        verdict = None if module in layers else other_products(module)
        if verdict is not None:
            found.append(PlanRow(name, module, type(module), verdict.reason, verdict.text))
    return tuple(found)


def _layers_of(model: nn.Module, types: tuple[type[nn.Module], ...]) -> dict[nn.Module, list[str]]:
    """Return the layers that can be chosen from, in order, with all their names."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return {
        m: aliases
        for m, aliases in names.items()
        if isinstance(m, types) or is_patched_layer(m) or looks_like_convolution(m) or is_wrapped(m)
    }


def _chosen(
    verdict: Verdict,
    module: nn.Module,
    aliases: Sequence[str],
    exclude: Sequence[str],
    filter_fn: FilterFn | None,
) -> Verdict:
    """Return the verdict on a layer that could be converted: does the user want it to be?"""
    excluded = next((p for p in exclude if matches(p, aliases)), None)
    if excluded is not None:
        return Verdict(Reason.EXCLUDED, f"excluded by {excluded!r}")
    if filter_fn is not None and not wants(filter_fn, module, aliases[0]):
        return Verdict(Reason.FILTERED, "filter_fn returned False")
    return verdict
