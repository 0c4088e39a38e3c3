"""How a conversion is doing: what ran sparse, at what rate, and what the watchdog saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .._text import percent
from ..ops import native, triton_kernels
from ..schedule.call_counts import Ran, was_compiled
from ..schedule.controller import get_controller
from ..schedule.schedules import Interval
from .dry_run import dry_run


@dataclass(frozen=True)
class Status:
    """How a converted model is doing; prints as a line, and one for each finding.

    Attributes:
        layers: The layers that :func:`ssprop_patch.plan` lists.
        converted: Those with a sparse backward.
        ran_sparse: Those that have run sparse at least once.
        drop_rate: In force now.
        t: The controller's counter.
        interval: What t counts, ``"epoch"`` or ``"step"``.
        ran: The calls of all converted layers, added up.
        compiled: Whether torch.compile has traced converted layers in this process: what compiled
            code runs is not counted.
        findings: What the watchdog has warned of.
        kind: What the layers are: ``"convolutions"``, or ``"layers"`` if others are among them.
        saved: Share of the whole network's FLOPs saved so far; None without a
            :class:`ssprop_patch.Meter` on the model, and where that does not know it.
        backend: Whether the C functions, or for a model on a GPU the Triton kernels, are on, and
            why not.
    """

    layers: int
    converted: int
    ran_sparse: int
    drop_rate: float
    t: int
    interval: Interval
    ran: Ran
    compiled: bool
    findings: tuple[str, ...]
    kind: str = "layers"
    saved: float | None = None
    backend: str = ""

    def __str__(self) -> str:
        of = f"{self.converted} of {self.layers} {self.kind}"
        all_sparse = self.drop_rate > 0 and self.ran_sparse == self.converted
        parts = [
            f"{of} sparse" if all_sparse else f"{of} converted, {self.ran_sparse} have run sparse",
            f"drop rate {self.drop_rate:g}",
            f"{self.interval} {self.t}",
        ]
        if self.saved is not None:
            parts.append(f"{percent(self.saved)} of the training's FLOPs saved so far")
        if self.backend:
            parts.append(self.backend)
        calls = f"; calls: {self.ran}" + ", compiled ones not counted" * self.compiled
        return "\n".join([", ".join(parts) + calls, *(f"warning: {f}" for f in self.findings)])


def status(model: nn.Module) -> Status:
    """Say how a converted model is doing: ``print(ssp.status(model))``.

    Per layer, ``print(ssp.plan(model))`` says it.

    Args:
        model: A converted model, a part of one, or what wraps it.

    Raises:
        ValueError: If nothing in it is converted, or its parts have different controllers.
    """
    controller = get_controller(model)
    rows = dry_run(model)
    converted = [row for row in rows if row.ran is not None]
    ran = [row.ran for row in converted if row.ran is not None]
    policies = (vars(row.module).get("_ssprop_policy") for row in rows)
    observers = (p.observer for p in policies if p is not None and p.observer is not None)
    observer = next(observers, None)
    return Status(
        layers=len(rows),
        converted=len(ran),
        ran_sparse=sum(r.sparse > 0 for r in ran),
        drop_rate=controller.drop_rate,
        t=controller.t,
        interval=controller.schedule.interval,
        ran=sum(ran, Ran()),
        compiled=was_compiled(),
        findings=tuple(controller.watchdog.findings.values()),
        kind="layers" if any(issubclass(r.cls, nn.Linear) for r in rows) else "convolutions",
        saved=None if observer is None else observer.saved_so_far(),
        backend=_backend([row.module for row in converted]),
    )


def _backend(layers: Sequence[nn.Module]) -> str:
    """Return which functions of this package's own compute these layers, or why none do."""
    tensors = [p for layer in layers for p in layer.parameters(recurse=False)]
    devices = {t.device.type for t in tensors}
    if "cuda" in devices:
        name, why = "Triton kernels", triton_kernels.why_unavailable()
    elif devices and devices != {"cpu"}:
        name, why = "C functions", f"they are for CPUs, the model is on {'/'.join(sorted(devices))}"
    elif tensors and not any(t.dtype in (torch.float32, torch.float64) for t in tensors):
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        name, why = "C functions", f"they take float32 and float64, the weights are {dtype}"
    else:
        name, why = "C functions", native.why_unavailable()
    return f"{name} on" if why is None else f"{name} off: {why}"
