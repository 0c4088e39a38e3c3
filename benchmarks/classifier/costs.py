"""What a training step costs in FLOPs, and so how many steps each method gets.

Counted is what ``ssp.summary`` counts: convolutions, matrix products and attention. Element-wise
work, norms and the optimizer are not: they are a few per cent, and the same on all sides of a step.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ssprop_patch as ssp
from classifier.options import METHODS, UserError
from ssprop_patch._text import sizes

# So near 1 that of any number of channels one is kept.
_HIGHEST = 1 - 1e-12
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # what is converted if no types are named


class StepCost:
    """FLOPs of one training step of a model, at any drop rate.

    Args:
        model: Not converted.
        inputs: The shape of a batch of images, or the tensors that the model is called with.
        types, exclude, overrides, selection: As ``ssp.convert`` will be given them.
        remainder: The same, with "none" for None.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[int, ...] | tuple[Tensor, ...],
        *,
        types: Sequence[type[nn.Module]] = CONVOLUTIONS,
        exclude: Sequence[str] = (),
        overrides: Mapping[str, float] | None = None,
        selection: str = "l1",
        remainder: str = "none",
    ) -> None:
        shapes = {"inputs" if isinstance(inputs[0], Tensor) else "input_size": inputs}
        try:
            # At the highest rate every layer shows among how many groups of channels it chooses.
            found = ssp.summary(model, **shapes, types=tuple(types), drop_rate=_HIGHEST)
            todo = ssp.plan(model, types=tuple(types), exclude=exclude, overrides=overrides)
        except ValueError as error:
            raise UserError(f"--model: {error}") from error
        self._converted = None
        if selection in ("principal", "ahead") or remainder != "none":
            # What a layer then costs is no multiple of what it keeps: the package is asked.
            self._converted, self._shapes = copy.deepcopy(model), shapes
            ssp.convert(
                self._converted,
                0.0,
                types=tuple(types),
                exclude=exclude,
                overrides=overrides,
                selection=selection,
                remainder=None if remainder == "none" else remainder,
            )
        self._layers = found.layers
        self._own_rates = {row.name: row.drop_rate for row in todo.converted}
        if found.others is None:
            raise UserError(f"--model: its FLOPs are not known: {found.unknown}")
        self.forward, self._other_backward = found.forward, found.others.backward

    @functools.cache  # noqa: B019 -- lives as long as the program
    def backward(self, drop_rate: float) -> int:
        """Return the FLOPs of one backward pass at this rate.

        The sum that ``ssp.summary(..., drop_rate=...)`` gives. Of the paper's rule without tracing
        the model again, since a schedule may have another rate at every step.
        """
        if self._converted is not None:
            return ssp.summary(self._converted, **self._shapes, drop_rate=drop_rate).sparse_backward
        total = self._other_backward
        for layer in self._layers:
            own = self._own_rates.get(layer.name) if drop_rate > 0 else None
            choices = layer.kept  # one channel is kept of each group that is chosen from
            each = layer.channels // choices
            rate = drop_rate if own is None else own
            kept = max(1, int((1 - rate) * each + 0.5)) * choices
            unused = layer.dense_backward == 0  # of layers that are not trained
            if unused or layer.name not in self._own_rates or kept == layer.channels:
                total += layer.dense_backward
            else:
                importance = 2 * layer.calls * math.prod(layer.output_shape)
                total += layer.dense_backward // layer.channels * kept + importance
        return total

    def total(self, rates: Sequence[float]) -> tuple[int, int]:
        """Return forward and backward FLOPs of a run with these drop rates, one a step."""
        return self.forward * len(rates), sum(map(self.backward, rates))


@dataclass(frozen=True)
class Plan:
    """How long each method trains; those that are no dense training of equal compute, in full."""

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
    equal = equal_steps(cost, rates)
    return Plan({m: equal if METHODS[m].equal_compute else steps for m in METHODS}, rates)


def equal_steps(cost: StepCost, rates: Sequence[float]) -> int:
    """Return how many dense steps cost what steps of these drop rates do, at least 1."""
    return max(1, round(sum(cost.total(rates)) / sum(cost.total([0.0]))))


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
        shape = sizes(batch_shape[1:])
        made_for = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))[-1]
        raise UserError(
            f"--model {name} cannot be trained on images of {shape}: {line}; "
            f"it is made for --image-size {made_for}"
        ) from error
    if not isinstance(out, torch.Tensor) or out.ndim != 2:
        raise UserError(f"--model {name} does not return logits, so it is not a classifier")
