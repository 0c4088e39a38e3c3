"""How a conversion is doing: what ran sparse, at what rate, and what the watchdog saw."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..schedule.call_counts import Ran, was_compiled
from ..schedule.controller import get_controller
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
    """

    layers: int
    converted: int
    ran_sparse: int
    drop_rate: float
    t: int
    interval: str
    ran: Ran
    compiled: bool
    findings: tuple[str, ...]

    def __str__(self) -> str:
        line = (
            f"{self.converted} of {self.layers} layers converted, {self.ran_sparse} have run "
            f"sparse; drop rate {self.drop_rate:g}, {self.interval} {self.t}; calls: {self.ran}"
            + ", compiled ones not counted"
            * self.compiled
        )
        return "\n".join([line, *(f"warning: {finding}" for finding in self.findings)])


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
    ran = [row.ran for row in rows if row.ran is not None]
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
    )
