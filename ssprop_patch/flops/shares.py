"""Which layers of a network hold its FLOPs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..class_swap import original_class
from ..patching.plan import Plan, PlanRow
from ..patching.reasons import Reason
from .trace import trace

# What holds less than this of the FLOPs, and is no layer that could be converted, has no row.
_LEAST = 0.005


def with_shares(plan: Plan, model: nn.Module, input_size: Any, inputs: Any) -> Plan:
    """Return a plan that says what each layer holds of the FLOPs of a dense step.

    Args:
        plan: Of ``model``.
        model, input_size, inputs: As for :func:`ssprop_patch.summary`.

    Returns:
        The plan; as it is, if not all of the network can be counted.

    Raises:
        TypeError, ValueError: If the model does not run on these inputs.
    """
    while isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module  # their own forward communicates
    modules = {module: name for name, module in model.named_modules()}
    names = {m: name for m, name in modules.items() if not isinstance(m, torch.jit.ScriptModule)}
    traced = trace(model, (), input_size, inputs, also=list(names))
    held: Counter[nn.Module | None] = Counter()
    for product in traced.products:
        held[product.layer] += product.forward + product.backward
    total = held.total()
    if traced.unknown or not total:
        return plan

    def shared(row: PlanRow) -> PlanRow:
        return replace(row, share=held.pop(row.module, 0) / total)

    rows, others = tuple(map(shared, plan.rows)), list(map(shared, plan.others))
    for module, flops in held.items():
        if module is not None and flops >= _LEAST * total:
            cls, why = original_class(type(module)), Reason.NO_SPARSE_BACKWARD
            text = "no layer: attention or functional calls in its forward"
            others.append(PlanRow(names[module], module, cls, why, text, share=flops / total))
    return replace(plan, rows=rows, others=tuple(others))
