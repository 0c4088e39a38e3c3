"""What a sparse backward saves on paper: FLOPs of each layer, and a summary of a model.

A multiply-add is two FLOPs. The counts are of the work the gradient needs: where a kernel that
masks is faster than one that gathers (see :mod:`ssprop_patch.kernels`), the device does more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .._text import counted
from .._torch_compat import CONV_CLASSES
from .._validate import check_count, check_drop_rate
from ..core.operations import OutputMask
from ..core.rule import (
    TOP_K,
    BackwardRule,
    Extent,
    Remainder,
    Selection,
    kind_of,
    resolve_rule,
)
from ..core.selection import kept_channels, selectable_channels
from ..patching.dry_run import dry_run
from ..patching.eligibility import DEFAULT_TYPES, Types
from ..patching.layer_kinds import is_patched_layer
from ..patching.layer_rules import why_not_ahead
from ..schedule import presets
from ..schedule.controller import SparsityController
from ..schedule.schedules import Schedule, as_schedule
from .gradient import ConvFlops, layer_flops, mean_flops
from .summary import LayerFlops, Summary
from .torch_counter import tell_torch
from .totals import Flops
from .trace import TracedCall, trace

tell_torch()


def conv_flops(
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    y_shape: Sequence[int],
    *,
    drop_rate: float = 0.0,
    output_mask: OutputMask = (True, True, False),
) -> ConvFlops:
    """Return the FLOPs of one convolution, forward and backward.

    With M = N * output positions and n = (C_in / groups) * kernel size: forward 2 M n C_out;
    backward 2 M n k for each of dX and dW and M k for db, with k = C_out when dense; and, only
    when k < C_out, 2 M C_out for the importance. Source: arXiv 2408.12561, made group-aware.

    Args:
        x_shape: Input, (N, C_in, *in) or unbatched.
        w_shape: Weight, (C_out, C_in / groups, *kernel); the groups follow from it and C_in.
        y_shape: Output, (N, C_out, *out) or unbatched.
        drop_rate: Fraction of the channels dropped in the backward, in [0, 1).
        output_mask: Whether dX, dW and db are needed; no dX for a first layer.

    Raises:
        ValueError: If the shapes do not fit each other, or the rate is outside [0, 1).
    """
    at = -(len(w_shape) - 1)  # where the channels are, with or without a batch
    channels = w_shape[0]
    groups, rest = divmod(x_shape[at], w_shape[1])
    if rest or y_shape[at] != channels or channels % max(groups, 1):
        raise ValueError(f"no convolution has input {x_shape}, weight {w_shape}, output {y_shape}")
    k = kept_channels(selectable_channels(channels, groups), check_drop_rate(drop_rate))
    extent = Extent.of(x_shape, w_shape, y_shape, groups)
    return layer_flops(extent, TOP_K, k, output_mask)


def summary(
    model: nn.Module,
    *,
    input_size: Sequence[int] | Sequence[Sequence[int]] | None = None,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    types: Types = DEFAULT_TYPES,
    align: int | None = None,
    selection: Selection | None = None,
    remainder: Remainder = None,
    drop_rate: float | None = None,
    schedule: Schedule | float | Callable[[int], float] | None = None,
    epochs: int | None = None,
    steps_per_epoch: int | None = None,
) -> Summary:
    """Count the FLOPs of a model's training step, dense and sparse.

    All convolutions, matrix products and attention count; no norms, activations, loss, optimizer.
    Convolution modules, and linear layers where they are converted or named in ``types``, have a
    row of their own, and the rest of the network one together. A converted model counts as it is
    (a layer that is not converted, or frozen in eval mode, as dense), an unconverted one as
    ``convert(model, types=types)`` would make it. The model is run once, on tensors without
    data; where that fails (its path depends on the data), for real and in eval mode. Either way
    it is left exactly as it was, and so are its gradients and the random state.

    Args:
        model: Any module. One in eval mode is counted as if it were in training mode.
        input_size: Shape of the input, batch included, or a list of shapes of several. Of the
            model's own dtype and device. Give this or ``inputs``.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        types: Classes of layers that a conversion would take, as for :func:`ssprop_patch.convert`.
        align: Round the number of kept channels up to a multiple of this, as ``convert(align=)``
            does. Default: as the model was converted, else 1.
        selection: Count with this selection, as ``convert(selection=)``. Default: as the model was
            converted, else the paper's. Refreshes of directions count with their mean.
        remainder: As ``convert(remainder=)``; given one of the two, both count.
        drop_rate: Count with this rate.
        schedule: Count the mean over t = 0, 1, ... of this schedule, for ``epochs`` epochs, each t
            with its own number of kept channels. With neither: the model's controller's schedule
            if ``epochs`` is given, else its rate now; unconverted, the paper's default.
        epochs: How many epochs to average over.
        steps_per_epoch: Optimizer steps in one, for a schedule that counts steps. Default: the
            controller's.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If arguments contradict each other or are missing, if the input does not fit
            the model, or if it has no convolution.
    """
    tell_torch()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if (input_size is None) == (inputs is None):
        raise ValueError("give input_size or inputs, one of the two")
    if drop_rate is not None and schedule is not None:
        raise ValueError("give drop_rate or schedule, not both")
    align = None if align is None else check_count(align, "align", 1)
    chosen = None
    if selection is not None or remainder is not None:
        chosen = resolve_rule("l1" if selection is None else selection, remainder)
    while isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module  # their own forward communicates
    found = dry_run(model, types=types)
    rows = {row.module: row for row in found if isinstance(row.module, (*CONV_CLASSES, nn.Linear))}
    if not rows:
        raise ValueError(f"no convolution in this {type(model).__name__}")
    for row in rows.values():
        if row.action == "refuse" and not is_patched_layer(row.module):
            raise ValueError(f"{row.name or '(model)'}: {row.reason}")

    policies: dict[nn.Module, Any] = {
        m: vars(m)["_ssprop_policy"] for m in rows if is_patched_layer(m)
    }
    labels: dict[str, None] = {}  # an ordered set

    @cache
    def rates(controller: SparsityController | None) -> Mapping[float, int]:
        counts, label = _rates(controller, drop_rate, schedule, epochs, steps_per_epoch)
        labels[label] = None
        return counts

    @cache  # by number of channels: a schedule may have a million rates, but few layers differ
    def kept(
        controller: SparsityController | None, override: float | None, to: int, channels: int
    ) -> tuple[Counter[int], float]:
        counts: Counter[int] = Counter()
        mean = 0.0
        for rate, n in rates(controller).items():
            rate = _own_rate(override, rate)
            k = kept_channels(channels, rate, to)
            counts[k] += n
            mean += n * (rate if to == 1 else 1 - k / channels)
        return counts, mean / counts.total()

    # Before the model runs, so that a mistake in the arguments shows at once.
    for controller in dict.fromkeys(p.controller for p in policies.values()) or [None]:
        rates(controller)

    def read(call: TracedCall, rule: BackwardRule, k: int) -> int:
        """Return how many channels of a call's dX the layers before read that chose ahead."""
        wanted = set()
        for module in call.before if rule.ahead is not None else ():
            policy = policies.get(module)
            row, own = rows[module], chosen or (policy.rule if policy else rule)
            chosen_ahead = own.ahead is not None and not why_not_ahead(module)
            if not chosen_ahead or (row.action != "convert" if not policies else policy is None):
                return 0
            to = (policy.align if policy else 1) if align is None else align
            controller, override = (policy.controller, policy.override) if policy else (None, None)
            each = selectable_channels(call.channels, getattr(call.module, "groups", 1))
            mine = policies.get(call.module)
            wanted |= {
                kept_channels(call.input_shape[1], _own_rate(override, rate), to)
                for rate in rates(controller)
                if kept_channels(each, _own_rate(mine and mine.override, rate), to) == k
            }
        depthwise = len(call.weight_shape) > 2 and call.weight_shape[1] == 1 < call.channels
        if depthwise and wanted != {k}:  # whose channels are those of its input
            return 0
        return max(wanted, default=0)

    layers = []
    given = [chosen] if chosen else [policy.rule for policy in policies.values()]
    follow = any(rule.ahead is not None for rule in given)
    traced = trace(model, list(rows), input_size, inputs, follow=follow)
    for call, calls in traced.calls.items():
        module, row = call.module, rows[call.module]
        each = selectable_channels(call.channels, getattr(module, "groups", 1))
        policy, frozen = policies.get(module), model.training and not module.training
        rule = chosen or BackwardRule()
        converted = row.action == "convert" if not policies else policy is not None
        if policy is not None and not frozen:
            to, rule = policy.align if align is None else align, chosen or policy.rule
            ks, rate = kept(policy.controller, policy.override, to, each)
        elif converted and not frozen:
            ks, rate = kept(None, None, align or 1, each)
        else:
            ks, rate = Counter([each]), 0.0
        flops = {k: _call_flops(call, rule, k, read(call, rule, k)) for k in ks}
        fewest, total = flops[min(ks)], ks.total()
        sparse = (sum(n * flops[k].backward for k, n in ks.items()) * calls + total // 2) // total
        layers.append(
            LayerFlops(
                row.name,
                row.cls.__name__,
                calls,
                call.input_shape,
                call.weight_shape,
                call.output_shape,
                fewest.kept,
                call.channels,
                rate,
                calls * fewest.forward,
                calls * fewest.dense_backward,
                sparse,
                converted,
            )
        )
    unlisted = tuple(row.name or "(model)" for row in found if row.module not in rows)
    label = " / ".join(labels)
    aligned = {p.align for p in policies.values()} if align is None else {align}
    if aligned - {1}:
        label += f"; kept channels rounded up to multiples of {'/'.join(map(str, sorted(aligned)))}"
    forward = sum(product.forward for product in traced.products)
    backward = sum(product.backward for product in traced.products)
    others = None if traced.unknown else Flops(forward, backward, backward)
    return Summary(tuple(layers), label, unlisted, others, traced.unknown)


def _own_rate(override: float | None, rate: float) -> float:
    return rate if override is None or rate == 0.0 else override


def _call_flops(call: TracedCall, rule: BackwardRule, k: int, read: int) -> ConvFlops:
    extent = Extent.of(
        call.input_shape,
        call.weight_shape,
        call.output_shape,
        getattr(call.module, "groups", 1),
        getattr(call.module, "transposed", False),
        rule.block,
    )
    kind, mask = kind_of(rule, extent, k), call.output_mask
    if rule.subspace is not None:
        interval = rule.subspace.settings.refresh_interval
        return mean_flops(extent, kind, kind._replace(refreshed=True), k, mask, interval)
    if rule.ahead is not None and not why_not_ahead(call.module):
        usually = kind._replace(inputs=read, scored=False)
        return mean_flops(extent, usually, kind, k, mask, rule.ahead.settings.look_interval)
    return layer_flops(extent, kind, k, mask)


def _rates(
    controller: SparsityController | None,
    drop_rate: float | None,
    schedule: Any,
    epochs: int | None,
    steps: int | None,
) -> tuple[Mapping[float, int], str]:
    """Return how often each rate occurs, and what that is in words."""
    if drop_rate is not None:
        rate = check_drop_rate(drop_rate)
        return {rate: 1}, f"drop rate {rate:g}"
    if schedule is None and controller is not None:
        if epochs is None:
            return {controller.drop_rate: 1}, f"drop rate {controller.drop_rate:g}, as it is now"
        schedule = controller.schedule
        steps = controller.steps_per_epoch if steps is None else steps
    elif schedule is None:
        schedule, epochs = presets.PAPER, presets.PAPER.period if epochs is None else epochs
    schedule = as_schedule(schedule)
    if schedule.is_constant:
        return {schedule(0): 1}, repr(schedule)
    if epochs is None:
        raise ValueError(f"give epochs=..., how many to average {schedule!r} over")
    total = check_count(epochs, "epochs", 1)
    if schedule.interval == "step":
        if steps is None:
            raise ValueError(f"give steps_per_epoch=...: {schedule!r} counts optimizer steps")
        total *= check_count(steps, "steps_per_epoch", 1)
    return Counter(
        map(schedule, range(total))
    ), f"{schedule!r}, mean over {counted(epochs, 'epoch')}"
