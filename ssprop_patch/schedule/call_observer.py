"""The interface between layers and a meter: what is reported of each call."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..core.operations import OutputMask
from ..core.rule import TOP_K, BackwardKind


class CallObserver(Protocol):
    """Gets a report of each call of a layer that is being metered."""

    def forward(self, x: Tensor, w: Tensor, y: Tensor) -> None:
        """A forward pass ran."""

    def backward(
        self,
        x: Tensor,
        w: Tensor,
        dy: Tensor,
        k: int,
        output_mask: OutputMask,
        kind: BackwardKind = TOP_K,
    ) -> None:
        """A backward pass ran, with ``k`` channels, or directions, of each choice."""

    def selected(self, index: Tensor) -> None:
        """The kept channels, in a sparse backward."""

    def computed(self, algorithms: str) -> None:
        """How a sparse backward of a convolution was computed, by the names of its algorithms."""

    def dense(self, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> None:
        """A forward ran in torch's own way, and so will its backward."""

    def saved_so_far(self) -> float | None:
        """Share of the FLOPs of the whole network saved so far; None if that is not known."""
