"""torch's own FLOP counter, told what the package's operators for torch.compile cost."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..core.rule import BackwardRule, Extent, kind_of
from ..core.selection import selectable_channels
from ..ops import custom_ops
from ..schedule.settings import settings_of
from .gradient import layer_flops

# As torch counts aten.convolution_backward and mm: multiply-adds only, no bias, no importance. (Of
# directions and the coarse remainder all is counted, as summary does.)


def _conv_operator_flops(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    transposed: bool,
    output_padding: Any,
    rate: Tensor,
    token: Tensor,
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    channels = dy.shape[1]
    each = selectable_channels(channels, groups)
    settings = settings_of(token)
    k = settings.kept(each, float(rate))
    if not settings.rule.is_top_k:
        return _rule_flops(dy, x, w, groups, transposed, settings.rule, k, output_mask)
    kept = k * (channels // each)
    at = x if transposed else dy  # where the kernel is applied
    macs = at.numel() // at.shape[1] * w.numel() // channels * kept
    return 2 * macs * (output_mask[0] + output_mask[1])


def _rule_flops(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    groups: int,
    transposed: bool,
    rule: BackwardRule,
    k: int,
    output_mask: Sequence[bool],
) -> int:
    need_x, need_w, need_b = output_mask
    extent = Extent.of(x.shape, w.shape, dy.shape, groups, transposed, rule.block)
    return layer_flops(extent, kind_of(rule, extent, k), k, (need_x, need_w, need_b)).backward


def _linear_operator_flops(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    rate: Tensor,
    token: Tensor,
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    settings = settings_of(token)
    kept = settings.kept(w.shape[0], float(rate))
    if not settings.rule.is_top_k:
        return _rule_flops(dy, x, w, 1, False, settings.rule, kept, output_mask)
    return 2 * (dy.numel() // w.shape[0] * kept * w.shape[1]) * (output_mask[0] + output_mask[1])


def tell_torch() -> None:
    """Register the formulas with torch's ``FlopCounterMode``, if that has been imported.

    Else there is nobody to tell, and importing it brings Triton, or a warning that there is none.
    """
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    for operator, formula in (
        (custom_ops.conv_backward, _conv_operator_flops),
        (custom_ops.linear_backward, _linear_operator_flops),
    ):
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator, get_raw=True)(formula)
