"""The picture of which channels a training keeps, and whether it is always the same ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..metering import ChannelHistory
from ..metering.channel_history import Winners
from . import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

_PANELS, _COLUMNS = 12, 3


def channels(
    history: ChannelHistory,
    layers: Sequence[str] | None = None,
    *,
    ax: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Draw which channels each layer keeps over time, and say whether it is always the same ones.

    A column is a window, a row a channel, the most often kept ones on top; windows without a
    sparse backward are grey. Where all rows are equally dark the channels take turns; where the
    upper ones are dark and the lower ones light the same ones always win. Numbers in the titles:
    see :class:`ssprop_patch.metering.Winners`.

    Args:
        history: Of ``ssprop_patch.Meter(model, channels_every=...)``.
        layers: Names of the layers to draw. Default: twelve at most, or as many as there are axes
            in ``ax``, evenly from the first to the last.
        ax: Where to draw: axes, or one for each layer. The bar that says what the colours mean is
            left to you then: ``figure.colorbar(ax.images[0])``. Default: a new figure.

    Returns:
        The new figure, or that of ``ax``.

    Raises:
        ValueError: If a layer is not in the history, or nothing is, or ``ax`` does not have an
            axes for each.
    """
    shares = history.shares(sparse_only=True)
    winners = history.winners()
    if not shares:
        raise ValueError(
            "no window is complete yet, or no channel was dropped in any: train longer, or give "
            "Meter(channels_every=...) fewer steps"
        )
    for name in layers or ():
        if name not in shares:
            raise ValueError(f"no layer {name!r} in the history; there are {', '.join(shares)}")
    most = _PANELS if ax is None else getattr(ax, "size", 1 if hasattr(ax, "plot") else len(ax))  # type: ignore[arg-type]
    names = list(layers or _evenly(list(shares), most))
    columns = min(_COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    with style.panels(ax, len(names), 1.2 + 1.9 * rows, columns=columns) as (figure, panels):
        for name, axes in zip(names, panels, strict=True):
            _panel(axes, name, shares[name], winners[name], history.every)
        if ax is not None:
            for axes in panels:
                axes.set(xlabel="optimizer step (grey: dense)", ylabel="channels")
        else:
            bar = figure.colorbar(panels[0].images[0], ax=panels, aspect=12 * rows, pad=0.01)
            bar.set_label("share of sparse backwards")
            style.tidy(bar.ax)
            bar.ax.grid(visible=False)
            figure.supxlabel("optimizer step (grey: dense)", fontsize=9)
            figure.supylabel("channels, most often kept on top", fontsize=9)
            in_turn = fmean(winners[name].kept / winners[name].channels for name in names)
            some = f"{len(names)} of {len(shares)}" if len(names) < len(shares) else "all"
            figure.suptitle(
                f"How often each channel was kept ({some} layers)\n"
                f"100 %: always the same ones; about {100 * in_turn:.0f} %: all take turns",
                fontsize=9,
            )
    return figure


def _panel(axes: Axes, name: str, share: Tensor, found: Winners, every: int) -> None:
    order = share.nanmean(0).argsort(descending=True)
    axes.imshow(
        share[:, order].t().numpy(),
        cmap=_colour_map(),
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(0, len(share) * every, found.channels, 0),
    )
    letters = int(72 * style.inches(axes)[0] / (0.6 * style.TEXT))
    lines = [
        name if len(name) <= letters else f"…{name[1 - letters :]}",
        f"the same {found.kept} of {found.channels}: {100 * found.top_share:.0f} %",
    ]
    if found.never:
        lines.append(f"never trained: {100 * found.never:.0f} %")
    axes.set_title("\n".join(lines), fontsize=style.TEXT)
    axes.grid(visible=False)
    axes.locator_params(axis="x", nbins=4, integer=True)
    axes.locator_params(axis="y", nbins=4, integer=True)


def _evenly(names: Sequence[str], most: int) -> list[str]:
    if len(names) <= most or most < 2:
        return list(names[:most])
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def _colour_map() -> Any:
    import matplotlib

    return matplotlib.colormaps["Blues"].with_extremes(bad="#DDDDDD")
