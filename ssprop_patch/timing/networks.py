"""A whole network with some of its layers converted, or others, or none: which is the fastest?"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._device import waiter
from .._torch_compat import tree_leaves
from .._validate import check_count, check_drop_rate
from ..core.rule import Remainder, Selection
from ..flops.trace import untouched
from ..metering.instrument import unmetered
from ..patching.conversion import Conversion, apply_conversion
from ..patching.convert import convert, revert
from ..patching.eligibility import DEFAULT_TYPES, Types
from .interleaved import Quantiles, alternate
from .recorded_calls import Inputs, as_arguments, autocasting, device_of


def time_networks(
    model: nn.Module,
    inputs: Inputs,
    choices: Mapping[str, Collection[nn.Module]],
    drop_rate: float = 0.8,
    *,
    types: Types = DEFAULT_TYPES,
    overrides: Mapping[str, float] | None = None,
    align: int = 1,
    selection: Selection = "l1",
    remainder: Remainder = None,
    autocast: torch.dtype | None = None,
    iterations: int = 15,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Quantiles]:
    """Time forward and backward of ``model`` with each choice of its layers converted, in turns.

    The model stays as it was: parameters, their gradients, buffers, conversion, random state. A
    compiled one runs compiled, once for each choice.

    Args:
        model: Any module, converted or not; on the device and in the memory format to be timed.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        choices: By name, the layers that are converted, at a constant rate; there may be none.
        drop_rate, types, overrides, align, selection, remainder: As for
            :func:`ssprop_patch.convert`.
        autocast: The dtype of autocast, or None for none.
        iterations: Measurements of each choice.
        progress: Is called with how many of how many measurements are done.

    Returns:
        Milliseconds by name.

    Raises:
        TypeError, ValueError: If an argument is not as described, or the model returns nothing that
            needs a gradient.
    """
    rate, iterations = check_drop_rate(drop_rate), check_count(iterations, "iterations", 1)
    with unmetered(model):
        before = Conversion.of(model)
        buffers = [(b, b.clone()) for b in model.buffers()]
        try:
            revert(model)
            conversions = {}
            for name, layers in choices.items():
                if layers:
                    convert(
                        model,
                        rate,
                        types=types,
                        overrides=overrides,
                        align=align,
                        selection=selection,
                        remainder=remainder,
                        filter_fn=partial(_is_among, layers),
                    )
                conversions[name] = Conversion.of(model)
                revert(model)
            with untouched(model, eager=False), torch.inference_mode(False), torch.enable_grad():
                if not model.training:
                    model.train()
                run = _forward_and_backward(model, inputs, autocast)

                def side(conversion: Conversion) -> list[float]:
                    apply_conversion(conversion, within=model)
                    return [run()]

                sides = {name: partial(side, c) for name, c in conversions.items()}
                try:
                    taken = alternate(sides, iterations, progress=progress)
                finally:
                    revert(model)  # first, as what is put back then are attributes
        finally:
            apply_conversion(before, within=model)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
    return {name: quantiles[0] for name, quantiles in taken.items()}


def _is_among(layers: Collection[nn.Module], module: nn.Module, name: str) -> bool:
    return module in layers


def _forward_and_backward(
    model: nn.Module, inputs: Inputs, autocast: torch.dtype | None
) -> Callable[[], float]:
    """Return a function that runs both once and returns the milliseconds."""
    args, kwargs = as_arguments(inputs)
    device = device_of(model, inputs)
    wanted = [p for p in model.parameters() if p.requires_grad]
    wait = waiter(device)

    def run() -> float:
        wait()
        start = time.perf_counter()
        with autocasting(device, autocast):
            out = model(*args, **kwargs)
        # Not backward(), which would add to the parameters' gradients and call their hooks.
        torch.autograd.grad(loss_of(out), wanted, allow_unused=True)
        wait()
        return 1e3 * (time.perf_counter() - start)

    return run


def loss_of(out: Any) -> Tensor:
    """Return a scalar on which everything depends that can be trained, whatever a model returns.

    Raises:
        ValueError: If nothing of it needs a gradient.
    """
    found = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
    if not found:
        raise ValueError("the model returns nothing that needs a gradient")
    first, *others = (t.float().square().mean() for t in found)
    return sum(others, first)
