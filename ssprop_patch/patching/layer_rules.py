"""What a selection comes to in each layer: not every one can be projected on directions."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import nn

from ..core.principal import cheaper_side, projected_share
from ..core.rule import PAYS, BackwardRule, Selected
from ..core.selection import kept_channels
from .layer_kinds import weight_shape

_SIDES: dict[Any, str] = {"output": "output side", "input": "input side"}


class Choice(NamedTuple):
    """What of a layer's gradient is selected, and a few words on it."""

    selected: Selected
    remark: str = ""


def rule_of_layer(rule: BackwardRule, module: nn.Module) -> BackwardRule:
    """Return the rule that one layer goes by, with a state of its own if it has any use for it."""
    if rule.subspace is not None and _why_no_directions(module):
        return rule._replace(subspace=None)
    if rule.ahead is not None and why_not_ahead(module):
        return rule._replace(ahead=None)
    return rule.for_another_layer()


def choice_of_layer(
    rule: BackwardRule, module: nn.Module, drop_rate: float, align: int = 1
) -> Choice:
    """Return what a layer's gradient is at a drop rate, as far as that can be told without inputs.

    Args:
        rule: Of the conversion.
        module: A layer that is converted.
        drop_rate: Of the layer.
        align: As for ``convert``.
    """
    if rule.ahead is not None:
        why = why_not_ahead(module)
        return Choice("channels", f"chosen in each backward: {why}" if why else "chosen ahead")
    if rule.subspace is None:
        return Choice("channels")
    why = _why_no_directions(module)
    if why:
        return Choice("channels", f"the paper's choice: {why}")
    layer: Any = module
    shape, groups = weight_shape(module), getattr(module, "groups", 1)
    assert shape is not None
    transposed = getattr(module, "transposed", False)
    channels = shape[1] if transposed else shape[0] // groups
    reads: float = math.prod(shape[1:])
    if transposed:
        reads = shape[0] // groups * math.prod(shape[2:]) / math.prod(layer.stride)
    side = cheaper_side(channels, reads, transposed)
    kept = kept_channels(channels, drop_rate, align)
    share = projected_share(channels, reads, side, kept / channels, math.inf)
    if kept == channels or share < PAYS:
        return Choice(side, f"principal, {_SIDES[side]}")
    return Choice(
        "channels",
        f"the paper's choice: directions would cost {share:.2f} of the dense gradient at drop rate "
        f"{drop_rate:g}",
    )


def _why_no_directions(module: nn.Module) -> str:
    """Return why a layer has no directions whatever the rate, or nothing."""
    shape = weight_shape(module)
    if shape is None:
        return "its weight may have another shape in each call"
    if getattr(module, "groups", 1) == getattr(module, "out_channels", 1) > 1:
        return "depthwise, no channels to combine"
    return ""


def why_not_ahead(module: nn.Module) -> str:
    """Return why a layer's channels are not chosen ahead, or nothing."""
    if isinstance(module, nn.Linear):
        return "no convolution"
    if getattr(module, "transposed", False):
        return "transposed"
    if weight_shape(module) is None:
        return "its weight may have another shape in each call"
    groups = getattr(module, "groups", 1)
    depthwise = groups == module.in_channels == module.out_channels
    return "" if groups == 1 or depthwise else "it has groups"
