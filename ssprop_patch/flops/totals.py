"""FLOPs added up, and the two lines that say what of them a sparse backward saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .._text import counted, percent

#: What counts wherever the whole network is meant.
COUNTED = "convolutions, matrix products and attention of the whole network"


@dataclass(frozen=True)
class Flops:
    """FLOPs of some layers, or of a whole network, in one training step or in many.

    Attributes:
        forward: Of the forward passes.
        dense_backward: Of the backward passes, were they dense.
        backward: Of the backward passes as they are.
    """

    forward: int = 0
    dense_backward: int = 0
    backward: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.forward + other.forward,
            self.dense_backward + other.dense_backward,
            self.backward + other.backward,
        )

    @property
    def saved(self) -> int:
        """FLOPs saved; below 0 where choosing channels costs more than it saves."""
        return self.dense_backward - self.backward

    @property
    def backward_saved(self) -> float:
        """Share of the backward FLOPs saved."""
        return self.saved / (self.dense_backward or 1)

    @property
    def total_saved(self) -> float:
        """Share of the forward and backward FLOPs saved."""
        return self.saved / (self.forward + self.dense_backward or 1)


NOTHING = Flops()


def saved_lines(network: Flops | None, unknown: str, converted: Flops, layers: int) -> list[str]:
    """Return what is saved: of the whole network first, then of its converted layers alone.

    Args:
        network: All that is counted; None, if a part of it is not known.
        unknown: Why it is not.
        converted: The converted layers.
        layers: How many these are.
    """
    if network is None:
        first = f"not known of the whole network: {unknown}"
    else:
        first = (
            f"{percent(network.backward_saved)} of the backward FLOPs of the whole network, "
            f"{percent(network.total_saved)} of forward + backward"
        )
    if not layers:
        return [first, "no layer is converted"]
    which = "the 1 converted layer" if layers == 1 else f"the {layers} converted layers"
    return [
        first,
        f"{percent(converted.backward_saved)} of the backward FLOPs of {which} alone, "
        f"{percent(converted.total_saved)} of forward + backward",
    ]


def own_way(names: Sequence[str]) -> str:
    """Return which layers a table has no row for, and why: ``1 layer that convolves ...``."""
    shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    which = "convolves in its" if len(names) == 1 else "convolve in their"
    return f"{counted(len(names), 'layer')} that {which} own way: {shown}"


def human_flops(flops: int) -> str:
    """Return ``1.2 GFLOP``."""
    size, units = float(flops), ["", "k", "M", "G", "T", "P"]
    while size >= 999.95 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.1f} {units[0]}FLOP" if units[0] else f"{flops} FLOP"
