"""The plan of a conversion, and which of its layers pay on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from .._progress import Progress
from .._text import columns, sizes
from ..core.rule import Remainder, Selection
from ..flops.shares import with_shares
from ..patching.dry_run import dry_run
from ..patching.eligibility import DEFAULT_TYPES, Types
from ..patching.filters import FilterFn
from ..patching.plan import Plan, PlanRow
from .interleaved import Quantiles
from .layers import LayerTime, pays, time_layers
from .networks import time_networks
from .recorded_calls import Inputs

# What two measurements of the same network may differ by on a quiet machine.
_CLEARLY = 0.99


def plan(
    model: nn.Module,
    *,
    types: Types = DEFAULT_TYPES,
    filter_fn: FilterFn | None = None,
    exclude: str | Sequence[str] = (),
    overrides: Mapping[str, float] | None = None,
    measure: bool = False,
    inputs: Inputs | None = None,
    drop_rate: float = 0.8,
    align: int = 1,
    selection: Selection = "l1",
    remainder: Remainder = None,
    autocast: torch.dtype | None = None,
    iterations: int = 15,
    progress: bool = True,
) -> Plan:
    """Say what :func:`ssprop_patch.convert` would do to each layer, and change nothing.

    With ``inputs`` also what each holds of the network's FLOPs, and which ``types`` would convert
    more of them. With ``measure`` also what it would save on this machine. Each layer that would
    be converted is timed alone, dense and sparse in turns; then the whole network with none of
    them converted, those that paid alone, and all. ``filter_fn=plan.pays`` converts what was
    fastest, maybe none; what else is given to ``convert`` should be as it was measured::

        convert(model, filter_fn=plan(model, inputs=x, drop_rate=0.8, measure=True).pays)

    Args:
        model: Any module, converted or not.
        types: Classes of layers to convert, subclasses included, as for
            :func:`ssprop_patch.convert`.
        filter_fn: ``filter_fn(module, name) -> bool``: False leaves a layer dense.
        exclude: Patterns of layers to leave dense. A pattern is the exact name of a
            layer or of a module around it, the end of a name (``"conv1"`` means every
            ``*.conv1`` too), or a regular expression for the whole name (``"^conv1$"`` means the
            stem alone).
        overrides: ``{pattern: rate}``, rates of their own for some layers, in force whenever the
            controller's rate is above 0. The first pattern that matches counts. Layers are measured
            at them, too.
        measure: Whether to time layers and network: forward and backward of a training step, as
            :func:`ssprop_patch.timing.time_layers` and ``time_networks`` do.
            A layer pays alone if its sparse median is below 0.97 of the dense one; a converted
            network is faster than the dense one if its median is below 0.99 of that. A compiled
            model runs compiled, once for each choice. Measure before wrapping in DDP.
        inputs: What the model is called with: a tensor, a tuple of positional or a dict of keyword
            arguments; for measuring on the device and in the memory format of the training.
        drop_rate, align, selection, remainder: As for :func:`ssprop_patch.convert`, of the sparse
            side while measuring. And under ``selection="principal"`` the plan says what each layer
            gets at that rate: directions on the output or the input side, or the paper's choice,
            and why.
        autocast: The dtype of autocast while measuring, or None for none.
        iterations: Measurements of each side.
        progress: Whether to show on standard error how far the measurements have come: a bar on a
            terminal, elsewhere a line every half minute.

    Returns:
        The plan, with a row for every convolution and every layer of ``types``, in the order of
        ``model.modules()``, and others for what else multiplies matrices.

    Raises:
        TypeError: If ``model`` is not a module, a pattern not text, or ``types`` not classes.
        ValueError: If a pattern matches no layer of the plan (the nearest names are shown), a rate
            is not in [0, 1), one of ``types`` cannot have a sparse backward, there is no such
            ``selection`` or ``remainder``, ``measure`` comes without ``inputs``, or the model does
            not run on these.
    """
    if measure and inputs is None:
        raise ValueError(
            "measuring needs inputs to run the model on: plan(model, inputs=x, measure=True)"
        )
    planned = dry_run(
        model,
        types=types,
        filter_fn=filter_fn,
        exclude=exclude,
        overrides=overrides,
        selection=selection,
        remainder=remainder,
        drop_rate=drop_rate,
        align=align,
    )
    if inputs is not None:
        planned = with_shares(planned, model, None, inputs)
    if not measure or inputs is None:
        return planned
    timing: dict[str, Any] = {
        "types": types,
        "overrides": overrides,
        "align": align,
        "selection": selection,
        "remainder": remainder,
        "autocast": autocast,
        "iterations": iterations,
    }
    wanted = {row.module for row in planned.converted}
    times: dict[str, list[LayerTime]] = {}
    with Progress("timing layers", shown=progress) as show:
        for time in time_layers(
            model,
            inputs,
            drop_rate,
            filter_fn=lambda m, _: m in wanted,
            **timing,
            progress=show,
        ):
            times.setdefault(time.name, []).append(time)
    rows = tuple(MeasuredRow.of(row, times.get(row.name, ())) for row in planned)
    choices = _choices(rows)
    modules = {name: [row.module for row in chosen] for name, chosen in choices.items()}
    ms: dict[str, Quantiles] = {}
    if choices:
        with Progress("timing the whole network", shown=progress) as show:
            ms = time_networks(model, inputs, modules, drop_rate, **timing, progress=show)
    networks = (
        PlanNetwork(name, frozenset(row.name for row in chosen), ms[name])
        for name, chosen in choices.items()
    )
    return MeasuredPlan(rows, planned.others, tuple(networks))


def _choices(rows: Sequence[MeasuredRow]) -> dict[str, list[MeasuredRow]]:
    """Return which layers the whole network is to be timed with; nothing where none can train."""
    trained = [row for row in rows if row.times]
    if not trained:
        return {}
    paying = [row for row in trained if row.pays]
    some = {"those that pay alone": paying} if 0 < len(paying) < len(trained) else {}
    return {"none": [], **some, "all": trained}


@dataclass(frozen=True)
class MeasuredRow(PlanRow):
    """One layer, and what it took.

    Attributes:
        times: What its calls took, one entry for each shape of input.
    """

    times: tuple[LayerTime, ...] = ()

    @classmethod
    def of(cls, row: PlanRow, times: Sequence[LayerTime]) -> MeasuredRow:
        """Return a row with its times."""
        return cls(**{f.name: getattr(row, f.name) for f in fields(row)}, times=tuple(times))

    @property
    def pays(self) -> bool:
        """Whether all calls of the layer, alone, took clearly less time with a sparse backward.

        A layer that was measured and had no call to train does not pay.
        """
        return pays(self.times)


@dataclass(frozen=True)
class PlanNetwork:
    """The whole network with some of its layers converted.

    Attributes:
        choice: ``"none"`` of them, ``"those that pay alone"``, or ``"all"``.
        converted: Their names.
        ms: Milliseconds of forward and backward.
    """

    choice: str
    converted: frozenset[str]
    ms: Quantiles


@dataclass(frozen=True, repr=False)
class MeasuredPlan(Plan):
    """A plan whose layers were timed.

    Attributes:
        rows: One for each layer.
        networks: The choices of layers that the whole network was timed with, first ``"none"``;
            empty where there was no choice.
    """

    rows: tuple[MeasuredRow, ...]
    networks: tuple[PlanNetwork, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether the layers were timed."""
        return True

    @property
    def best(self) -> PlanNetwork | None:
        """The fastest choice: the dense network unless another is clearly faster; None of none."""
        if not self.networks:
            return None
        dense, *others = self.networks
        fastest = min(others, key=lambda network: network.ms.p50)
        return fastest if fastest.ms.p50 < _CLEARLY * dense.ms.p50 else dense

    def pays(self, module: nn.Module, name: str = "") -> bool:
        """Whether to convert a layer on this machine, as it was measured: a ``filter_fn``.

        A layer belongs to the fastest choice for the whole network: alone it may pay and in there
        not, or the other way round, as caches and memory are shared.

        Args:
            module: A layer of the model that was planned, or of a copy of it.
            name: Its fully qualified name, which finds it in a copy.
        """
        row = next((r for r in self.rows if r.module is module), None)
        if row is None:
            row = next((r for r in self.rows if r.name == name), None)
        return row is not None and self.best is not None and row.name in self.best.converted

    def _lines(self) -> list[str]:
        return columns(self._cells(), optional=(2, 5, 1), wrapped=2)  # weight, share, input

    def _cells(self) -> Sequence[Sequence[str]]:
        others = [_unmeasured(row) for row in self.others]
        return [_HEAD, *(line for row in self.rows for line in _lines(row)), *others]

    def _totals(self) -> str:
        first, *rest = super()._totals().splitlines()
        paying = sum(row.pays for row in self.rows)
        lines = [f"{first}; {paying} {'pays' if paying == 1 else 'pay'} alone", *rest]
        if self.best is not None:
            times = ", ".join(f"{n.choice} {n.ms.p50:.3f} ms" for n in self.networks)
            lines.append("forward and backward of the whole network, converted:")
            lines.append(f"  {times}; convert {self.best.choice}")
        return "\n".join(lines)


_HEAD = "name", "input", "weight", "dense ms", "sparse ms", "share", "kernel", "pays alone"


def _lines(row: MeasuredRow) -> list[tuple[str, ...]]:
    """Return a line for each shape of input that a layer was given; one that says why none was."""
    if not row.times:
        return [_unmeasured(row)]
    return [
        (
            row.shown_name,
            sizes(t.input_shape) + f" ({t.calls} times)" * (t.calls > 1),
            sizes(t.weight_shape),
            f"{t.dense_ms.p50:.3f}",
            f"{t.sparse_ms.p50:.3f}",
            f"{t.share:.2f}",
            t.kernel + ", norm" * t.with_norm,
            "yes" if row.pays else "no",
        )
        for t in row.times
    ]


def _unmeasured(row: PlanRow) -> tuple[str, ...]:
    why = row.reason if row.action != "convert" else "not run, or needs no gradient: no"
    return (row.shown_name, "", "", "", "", "", "", why)
