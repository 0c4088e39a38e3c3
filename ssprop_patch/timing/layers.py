"""Each layer alone, dense and sparse: does its sparse backward save time on this machine?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._device import waiter
from .._torch_compat import tree_leaves
from .._validate import check_count, check_drop_rate
from ..core.rule import TOP_K, BackwardKind, Remainder, Selection, resolve_rule
from ..flops.trace import Shape
from ..metering.instrument import unmetered
from ..ops.autograd import make_lazy
from ..ops.channel_scores import lazy_order
from ..patching.convert import convert
from ..patching.dry_run import dry_run
from ..patching.eligibility import DEFAULT_TYPES, Types
from ..patching.filters import FilterFn
from .interleaved import Quantiles, alternate
from .recorded_calls import Inputs, RecordedCall, autocasting, isolated, record_calls

# A layer runs so often in a row that one measurement lasts about this long: waiting for the device
# then weighs nothing, and its queue stays filled, as in a training.
_BURST_SECONDS = 2e-3
_LONGEST_BURST = 50


@dataclass(frozen=True)
class LayerTime:
    """One layer on inputs of one shape, alone: forward and backward of one call.

    Attributes:
        name: Fully qualified name.
        cls: Name of its class.
        calls: How often it runs on such an input in one forward pass.
        input_shape, weight_shape, output_shape: Of one call.
        dense_ms, sparse_ms: Milliseconds.
        kernel: How the sparse backward is computed: ``"gather"``,
            ``"matmul"``, ``"mask"``, ..., or ``"forward/mask"`` where dX and dW differ;
            ``"output side"`` or ``"input side"`` of directions; ``"dense"`` where it keeps all.
        with_norm: Whether the batch norm right after it is in both times, because the sparse side
            saves a part of its backward, too.
    """

    name: str
    cls: str
    calls: int
    input_shape: Shape
    weight_shape: Shape
    output_shape: Shape
    dense_ms: Quantiles
    sparse_ms: Quantiles
    kernel: str
    with_norm: bool = False

    @property
    def share(self) -> float:
        """The sparse median as a share of the dense one."""
        return self.sparse_ms.p50 / self.dense_ms.p50

    @property
    def pays(self) -> bool:
        """As :func:`pays`, of this shape alone."""
        return pays((self,))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        times = {side: getattr(self, side)._asdict() for side in ("dense_ms", "sparse_ms")}
        return {**asdict(self), **times, "share": self.share, "pays": self.pays}


# What two measurements of the same layer may differ by on a quiet machine.
_CLEARLY = 0.97


def pays(times: Sequence[LayerTime]) -> bool:
    """Whether all calls together took clearly less time with a sparse backward: below 0.97.

    No call at all does not pay.
    """
    dense = sum(t.calls * t.dense_ms.p50 for t in times)
    return sum(t.calls * t.sparse_ms.p50 for t in times) < _CLEARLY * dense


def time_layers(
    model: nn.Module,
    inputs: Inputs,
    drop_rate: float = 0.8,
    *,
    types: Types = DEFAULT_TYPES,
    filter_fn: FilterFn | None = None,
    overrides: Mapping[str, float] | None = None,
    align: int = 1,
    selection: Selection = "l1",
    remainder: Remainder = None,
    autocast: torch.dtype | None = None,
    iterations: int = 15,
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerTime]:
    """Time each layer that a conversion would take, alone, on inputs like those it gets.

    The model runs once, to see shapes, strides and dtypes, and is left as it was. What is timed
    are copies, one layer at a time, together with the batch norm right after it where that would
    form its gradient for the kept channels only; layers that are alike are timed once.

    Args:
        model: Any module, converted or not; on the device and in the memory format to be timed.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        drop_rate: Of the sparse side.
        types, filter_fn: Which layers, as for :func:`ssprop_patch.convert`.
        overrides, align, selection, remainder: Of the sparse side, as there. Refreshes of
            directions are rare: a median does not show them.
        autocast: The dtype of autocast, or None for none.
        iterations: Measurements of each side.
        progress: Is called with how many of how many layers are done.

    Returns:
        A row for each layer and shape, in order of the first call. Layers that need no gradient,
        or are frozen in eval mode, have none.

    Raises:
        TypeError, ValueError: If an argument is not as described, or the model does not run.
    """
    rate = check_drop_rate(drop_rate)
    iterations = check_count(iterations, "iterations", 1)
    todo = dry_run(model, types=types, filter_fn=filter_fn, overrides=overrides)
    rows = {row.module: row for row in todo.converted}
    rule = resolve_rule(selection, remainder)
    order = lazy_order(rule.score_fn) if rule.is_top_k else None
    with unmetered(model):
        calls = record_calls(model, list(rows), inputs, autocast, order)
    timed: dict[tuple[str, float], tuple[Quantiles, Quantiles, str]] = {}
    found = []
    for done, (call, count) in enumerate(calls, 1):
        row = rows[call.module]
        # An override is in force whenever the rate of all is above 0.
        own = rate if row.drop_rate is None or rate == 0 else row.drop_rate
        key = call.key, own
        if key not in timed:
            sparse = {
                "schedule": own,
                "types": types,
                "align": align,
                "selection": selection,
                "remainder": remainder,
            }
            timed[key] = _time(call, sparse, autocast, iterations)
        found.append(
            LayerTime(
                row.name,
                row.cls.__name__,
                count,
                call.input.shape,
                call.weight_shape,
                call.output_shape,
                *timed[key],
                call.norm is not None,
            )
        )
        if progress is not None:
            progress(done, len(calls))
    return found


def _time(
    call: RecordedCall,
    sparse: Mapping[str, Any],
    autocast: torch.dtype | None,
    iterations: int,
) -> tuple[Quantiles, Quantiles, str]:
    device = call.input.device
    layers: dict[str, Any] = {
        "dense": _WithNorm(call),
        "sparse": convert(_WithNorm(call), **sparse),
    }
    with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        runs = {side: _training_pass(layer, call, autocast) for side, layer in layers.items()}
        wait = waiter(device)

        def seconds(run: Callable[[], None], times: int) -> float:
            if device.type == "cpu":  # each for itself: the median leaves out interruptions
                return statistics.median(timed(run, 1) for _ in range(times))
            return timed(run, times)

        def timed(run: Callable[[], None], times: int) -> float:
            wait()
            start = time.perf_counter()
            for _ in range(times):
                run()
            wait()
            return (time.perf_counter() - start) / times

        def milliseconds(run: Callable[[], None]) -> list[float]:
            return [1e3 * seconds(run, burst)]

        # Both have run once then: the first time kernels are chosen and memory is taken.
        runs["dense"]()
        kernel = _kernel(layers["sparse"].layer, runs["sparse"])
        once = min(seconds(run, 1) for run in runs.values())
        burst = min(max(1, int(_BURST_SECONDS / once)), _LONGEST_BURST)
        taken = alternate(
            {side: partial(milliseconds, run) for side, run in runs.items()},
            iterations,
        )
    return taken["dense"][0], taken["sparse"][0], kernel


class _WithNorm(nn.Module):
    """Copies of a layer and of the norm after it, if there is one to be timed with it.

    There the norm's gradient is lazy, as it is with another sparse convolution after it.
    """

    def __init__(self, call: RecordedCall) -> None:
        super().__init__()
        self.layer = isolated(call.module)
        self.norm = None if call.norm is None else isolated(call.norm)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.layer(*args, **kwargs)
        if self.norm is not None:
            out = self.norm(out)
            make_lazy(out)
        return out


def _training_pass(
    layer: nn.Module, call: RecordedCall, autocast: torch.dtype | None
) -> Callable[[], None]:
    """Return a function that runs forward and backward of ``layer`` once."""
    device = call.input.device
    args, kwargs = call.make_inputs(torch.Generator(device).manual_seed(0))
    tensors = tree_leaves((args, kwargs, list(layer.parameters())))
    wanted = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
    gradients: list[Tensor] = []

    def run() -> None:
        with autocasting(device, autocast):
            out = layer(*args, **kwargs)
        ys = [y for y in tree_leaves(out) if isinstance(y, Tensor) and y.requires_grad]
        if not gradients:
            gradients.extend(torch.randn_like(y) for y in ys)
        torch.autograd.grad(ys, wanted, gradients, allow_unused=True)

    return run


_KERNELS = {"all": "dense", "output": "output side", "input": "input side"}


class _KernelRecord:
    """Takes note of how the sparse backward of a layer is computed."""

    kernel = "dense"

    def forward(self, x: Tensor, w: Tensor, y: Tensor) -> None:
        pass

    def selected(self, index: Tensor) -> None:
        self.kernel = "matmul"  # of a linear layer; convolutions say more

    def dense(self, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> None:
        pass

    def backward(
        self, x: Tensor, w: Tensor, dy: Tensor, k: int, mask: Any, kind: BackwardKind = TOP_K
    ) -> None:
        if kind.selected != "channels":
            self.kernel = _KERNELS[kind.selected]

    def computed(self, algorithms: str) -> None:
        self.kernel = algorithms


def _kernel(layer: Any, run: Callable[[], None]) -> str:
    """Run a converted layer once and return its kernel."""
    policy = layer._ssprop_policy
    record = _KernelRecord()
    layer._ssprop_policy = policy.metered(record)
    run()
    layer._ssprop_policy = policy
    return record.kernel
