"""Sparse or dense: what one call of a converted layer does, and its count."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.geometry import Geometry
from ..core.operations import Operation
from ..core.rule import BackwardRule
from ..core.selection import kept_channels, l1_scores, l2_scores
from ..ops import autotune
from ..ops.autograd import Compiled, needs_backward, sparse
from ..ops.transforms import in_transform
from ..schedule.call_counts import note_compiled
from ..schedule.layer_policy import LayerPolicy
from .layer_kinds import is_own_weight
from .weights import is_plain


def is_sparse(
    module: Any, policy: LayerPolicy, input: Tensor, weight: Tensor, bias: Tensor | None
) -> bool:
    """Whether a call of a stock layer is sparse; a dense one is counted."""
    if policy.active and module.training:
        # Before anything is read of the weight: some subclasses answer to calls of layers only.
        if not (type(weight) in PLAIN or is_plain(type(weight))):
            if not torch.compiler.is_compiling():
                module._ssprop_membership.calls.had_foreign_weight(type(module), type(weight))
            return False
        if needs_backward(input, weight, bias) and not (is_tracing() or is_exporting()):
            return True
    count_dense(module, input, weight, bias)
    return False


PLAIN = (nn.Parameter, Tensor)


def count_dense(module: Any, *tensors: Tensor | None) -> None:
    """Count a call in torch's own way.

    Args:
        module: The layer.
        *tensors: Input, weight and bias; without them, the layer's parameters are asked.
    """
    if torch.compiler.is_compiling():
        if not is_exporting():
            note_compiled()
        return
    if tensors and type(tensors[1]) in PLAIN:
        needed = needs_backward(*tensors)  # type: ignore[arg-type]  # bias alone may be None
    else:
        # Nothing is asked of a subclass that answers to calls of layers only, not even that.
        given: Iterable[Tensor | None] = tensors or module.parameters()
        found = (t for t in given if t is not None)
        needed = torch.is_grad_enabled() and any(
            t.requires_grad for t in found if type(t) in PLAIN or is_plain(type(t))
        )
    calls = module._ssprop_membership.calls
    if not needed:
        calls.no_gradient += 1
    elif not module.training:
        calls.was_evaluated()
    elif module._ssprop_policy.active:
        calls.recorded += 1
    else:
        calls.ran_at_rate_zero()


# Whether a tool records the network for use elsewhere: that gets the dense one.
is_tracing = torch.jit.is_tracing
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch >= 2.7


def dispatch(
    operation: Operation,
    policy: LayerPolicy,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    module: Any,
) -> Tensor:
    """Call ``operation`` sparsely as ``policy`` says; densely where it keeps every channel."""
    channels = operation.selectable(weight, geometry.groups)
    own = not policy.remembers or is_own_weight(module, weight, geometry.groups)
    if torch.compiler.is_compiling():
        note_compiled()
        if (channels > 1 and policy.can_drop) or policy.is_metered:
            return _compiled(operation, policy, input, weight, bias, geometry, channels, own)
    else:
        k = policy.kept(channels)
        if k < channels:
            module._ssprop_membership.calls.ran_sparse()
            return sparse(
                operation,
                input,
                weight,
                bias,
                geometry,
                k=k,
                rule=policy.rule if own else policy.rule.without_memory(),
                observer=policy.observer,
            )
        module._ssprop_membership.calls.kept_all(policy.drop_rate)
    out = operation.run(input, weight, bias, geometry)
    if policy.is_metered and not (
        torch.compiler.is_compiling() or in_transform(input, weight, bias)
    ):
        policy.observer.dense(input, weight, bias, out)  # type: ignore[union-attr]  # it has one
    return out


def _compiled(
    operation: Operation,
    policy: LayerPolicy,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    channels: int,
    own: bool,
) -> Tensor:
    """Call ``operation`` where torch.compile traces it.

    Reading the rate here makes one graph per value, in which the compiler sees the backward: for
    the few that :mod:`ssprop_patch.schedule.traced_rates` lists. Else an operator reads it.
    """
    rate, token = policy.controller.rate_tensor, policy.token if own else policy.token_of_others
    compiled = Compiled(rate, token)
    # Text, which is guarded on as it is; the rate only where there may be a graph for it.
    traced_as = policy.traced_as if own and not autotune.benchmark else None
    traced_rate = None if traced_as is None else policy.controller.traced_rate
    if traced_as is not None and traced_rate is not None:
        name, block, align = traced_as.split(" ")
        k = kept_channels(channels, float(traced_rate), int(align))
        if k == channels:
            return operation.run(input, weight, bias, geometry)
        if name != "principal":
            rule = BackwardRule(l1_scores if name == "l1" else l2_scores, int(block))
            return sparse(operation, input, weight, bias, geometry, k=k, rule=rule)
        compiled = Compiled(rate, token, k, int(block))
    return sparse(operation, input, weight, bias, geometry, compiled=compiled)
