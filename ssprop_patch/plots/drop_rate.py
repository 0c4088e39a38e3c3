"""The picture of a schedule: the drop rate over a training."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING

from .._validate import check_count
from ..schedule.schedules import Schedule, as_schedule
from . import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def schedule(
    schedule: Schedule | float | Callable[[int], float],
    epochs: int,
    steps_per_epoch: int | None = None,
    *,
    ax: Axes | None = None,
) -> Figure:
    """Draw the drop rate over a training.

    Args:
        schedule: What :func:`ssprop_patch.convert` takes.
        epochs: How long the training is.
        steps_per_epoch: For a schedule that counts optimizer steps.
        ax: Where to draw. Default: a new figure.

    Returns:
        The new figure, or that of ``ax``.

    Raises:
        TypeError, ValueError: If an argument is not as described.
    """
    plan = as_schedule(schedule)
    total, per_epoch = check_count(epochs, "epochs", 1), 1
    if plan.interval == "step":
        if steps_per_epoch is None:
            raise ValueError(f"give steps_per_epoch=...: {plan!r} counts optimizer steps")
        per_epoch = check_count(steps_per_epoch, "steps_per_epoch", 1)
        total *= per_epoch
    rates = [plan(t) for t in range(total)]
    edges = [t / per_epoch for t in range(total + 1)]
    with style.panels(ax, 1, 2.6) as (figure, (axes,)):
        axes.stairs(rates, edges, fill=True, color=style.SPARSE, alpha=0.25)
        axes.stairs(
            rates, edges, color=style.SPARSE, linewidth=1.5, baseline=None, label="drop rate"
        )
        axes.axhline(
            fmean(rates),
            color=axes.xaxis.label.get_color(),
            linestyle="--",
            linewidth=1,
            label=f"mean {fmean(rates):.2f}",
        )
        # Above the highest rate that there is, so that the legend hides nothing.
        axes.set(xlim=(0, edges[-1]), ylim=(0, 1 + style.legend_room(axes, 1)))
        axes.set(xlabel="epoch", ylabel="drop rate", yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
        axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # of MaxNLocator
        axes.legend(loc="upper right", ncols=2, frameon=False, borderaxespad=0.2)
        axes.set_title(style.wrapped(repr(plan), style.inches(axes)[0], lines=2), loc="left")
    return figure
