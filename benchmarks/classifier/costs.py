"""What a training step costs in FLOPs, and so how many steps each method gets.

Counted are the convolutions, by ssprop_patch's own formula, and the matrix products (the linear
layers, attention), by torch's counter. Element-wise work, norms and the optimizer are not: they
are a few per cent, and the same on all sides of a step.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ssprop_patch as ssp
from classifier.options import METHODS, UserError
from ssprop_patch.flops import conv_flops


class StepCost:
    """FLOPs of one training step of a model, at any drop rate."""

    def __init__(self, model: nn.Module, batch_shape: tuple[int, ...]) -> None:
        forward, self._other_backward = _matrix_products(model, batch_shape)
        # At the highest rate every layer shows whether it can be sparse at all.
        try:
            found = ssp.summary(model, input_size=batch_shape, drop_rate=0.999)
        except ValueError as error:
            raise UserError(f"--model: {error}") from error
        self._layers = found.layers
        self.forward = found.forward + forward

    @functools.cache  # noqa: B019 -- lives as long as the program
    def backward(self, drop_rate: float) -> int:
        """Return the FLOPs of one backward pass at this rate.

        The sum that ``ssp.summary(..., drop_rate=...)`` gives, but without tracing the model
        again, since a schedule may have another rate at every step.
        """
        total = self._other_backward
        for layer in self._layers:
            shapes = (layer.input_shape, layer.weight_shape, layer.output_shape)
            kept = conv_flops(*shapes, drop_rate=drop_rate).kept
            if layer.kept == layer.channels or kept == layer.channels:
                total += layer.dense_backward
            else:
                importance = 2 * layer.calls * math.prod(layer.output_shape)
                total += layer.dense_backward // layer.channels * kept + importance
        return total

    def total(self, rates: Sequence[float]) -> tuple[int, int]:
        """Return forward and backward FLOPs of a run with these drop rates, one a step."""
        return self.forward * len(rates), sum(map(self.backward, rates))


def _matrix_products(model: nn.Module, batch_shape: tuple[int, ...]) -> tuple[int, int]:
    """Return forward and backward FLOPs of a step in what is not a convolution."""
    # On the meta device nothing is computed; in training mode, since the backward is wanted.
    model = copy.deepcopy(model).to("meta").train()
    counts = []
    with FlopCounterMode(display=False) as counter:
        loss = model(torch.zeros(batch_shape, device="meta")).sum()
        counts.append(_not_convolutions(counter))
        loss.backward()
        counts.append(_not_convolutions(counter))
    return counts[0], counts[1] - counts[0]


def _not_convolutions(counter: FlopCounterMode) -> int:
    by_operator = counter.get_flop_counts().get("Global", {})
    return sum(n for op, n in by_operator.items() if "convolution" not in str(op))


@dataclass(frozen=True)
class Plan:
    """How long each method trains."""

    steps: dict[str, int]
    rates: list[float]  # the schedule's drop rate at each step of the sparse method


def plan(cost: StepCost, schedule: Any, epochs: int, steps_per_epoch: int) -> Plan:
    """Return the steps of each method.

    The dense run of equal compute gets the number of steps whose FLOPs are nearest to the sparse
    run's, so they differ by half a step at most.
    """
    steps = epochs * steps_per_epoch
    per_t = 1 if schedule.interval == "step" else steps_per_epoch
    rates = [schedule(step // per_t) for step in range(steps)]
    sparse = sum(cost.total(rates))
    equal = max(1, round(sparse / sum(cost.total([0.0]))))
    return Plan({m: equal if METHODS[m].equal_compute else steps for m in METHODS}, rates)


def check(model: nn.Module, batch_shape: tuple[int, ...], name: str) -> None:
    """Try the model on one batch without computing anything.

    Raises:
        UserError: If it does not take such images or does not return one tensor of logits.
    """
    try:
        out = copy.deepcopy(model).to("meta").train()(torch.zeros(batch_shape, device="meta"))
    except Exception as error:
        # Whatever the model's own code raises for an image that is too small, or not its size.
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        shape = "x".join(map(str, batch_shape[1:]))
        made_for = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))[-1]
        raise UserError(
            f"--model {name} cannot be trained on images of {shape}: {line}; "
            f"it is made for --image-size {made_for}"
        ) from error
    if not isinstance(out, torch.Tensor) or out.ndim != 2:
        raise UserError(f"--model {name} does not return logits, so it is not a classifier")
