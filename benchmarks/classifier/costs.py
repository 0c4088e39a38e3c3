"""What a training step costs in FLOPs, and so how many steps each method gets.

Counted are the convolutions, by ssprop_patch's own formula, and the matrix products (the linear
layers, attention), by torch's counter. Element-wise work, norms and the optimizer are not: they
are a few per cent, and the same on all sides of a step.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ssprop_patch as ssp
from classifier.options import METHODS, UserError

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
        tensors = inputs if isinstance(inputs[0], Tensor) else (torch.zeros(inputs, device="meta"),)
        shapes = {"inputs": inputs} if tensors is inputs else {"input_size": inputs}
        try:
            # At the highest rate every layer shows among how many groups of channels it chooses.
            found = ssp.summary(model, **shapes, types=tuple(types), drop_rate=_HIGHEST)
            todo = ssp.plan(model, types=tuple(types), exclude=exclude, overrides=overrides)
        except ValueError as error:
            raise UserError(f"--model: {error}") from error
        self._converted = None
        if selection == "principal" or remainder != "none":
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
        linear = {layer.name for layer in found.layers if layer.cls == "Linear"}
        forward, self._other_backward = _matrix_products(model, tensors, linear)
        self.forward = found.forward + forward

    @functools.cache  # noqa: B019 -- lives as long as the program
    def backward(self, drop_rate: float) -> int:
        """Return the FLOPs of one backward pass at this rate.

        The sum that ``ssp.summary(..., drop_rate=...)`` gives. Of the paper's rule without tracing
        the model again, since a schedule may have another rate at every step.
        """
        total = self._other_backward
        if self._converted is not None:
            found = ssp.summary(self._converted, **self._shapes, drop_rate=drop_rate)
            return total + found.sparse_backward
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


def _matrix_products(
    model: nn.Module, inputs: Sequence[Tensor], without: Collection[str]
) -> tuple[int, int]:
    """Return forward and backward FLOPs of a step in what is no convolution nor in ``without``."""
    # On the meta device nothing is computed; in training mode, since the backward is wanted.
    model = copy.deepcopy(model).to("meta").train()
    counts = []
    with FlopCounterMode(display=False) as counter:
        loss = model(*(tensor.to("meta") for tensor in inputs)).sum()
        counts.append(_not_convolutions(counter, without))
        loss.backward()
        counts.append(_not_convolutions(counter, without))
    return counts[0], counts[1] - counts[0]


def _not_convolutions(counter: FlopCounterMode, without: Collection[str]) -> int:
    by_module = counter.get_flop_counts()

    def products(by_operator: Mapping[Any, int]) -> int:
        return sum(n for op, n in by_operator.items() if "convolution" not in str(op))

    # The counter calls a module by its name after that of the model's class.
    apart = [ops for name, ops in by_module.items() if name.partition(".")[2] in without]
    return products(by_module.get("Global", {})) - sum(map(products, apart))


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
        shape = "x".join(map(str, batch_shape[1:]))
        made_for = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))[-1]
        raise UserError(
            f"--model {name} cannot be trained on images of {shape}: {line}; "
            f"it is made for --image-size {made_for}"
        ) from error
    if not isinstance(out, torch.Tensor) or out.ndim != 2:
        raise UserError(f"--model {name} does not return logits, so it is not a classifier")
