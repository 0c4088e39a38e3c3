"""Channels that are chosen ahead: before a gradient is there, by what earlier ones were like.

A layer that knows its kept channels before its gradient is formed lets the layers above it form no
more than these: see :mod:`.two_resolutions`. Now and then a layer *looks*: its gradient comes
whole, the channels are chosen from it as the paper does, and their scores are remembered.

Layers whose outputs are added, as those of a residual stage, or whose channels belong together, as
those of a depthwise convolution and of its input, are a *team* and keep the same channels: their
gradient is the same tensor.
"""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._validate import check_count
from .selection import topk_indices

# The gradients change fastest at the beginning.
_EARLY = 4


@dataclass(frozen=True)
class Ahead:
    """``selection="ahead"`` with other settings.

    Args:
        look_interval: A layer looks at its whole gradient in the first four passes and in every
            one of this number.
        momentum: Of the running mean of the scores, in [0, 1).

    Raises:
        TypeError, ValueError: If they are not that.
    """

    look_interval: int = 16
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_count(self.look_interval, "look_interval", 1)
        if not isinstance(self.momentum, numbers.Real):
            raise TypeError(f"momentum must be a number, got {self.momentum!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum!r}")

    def looks_at(self, number: int) -> bool:
        """Whether a layer looks in its pass of this number, from 0 on."""
        return number < _EARLY or number % self.look_interval == 0


class KeptSet:
    """The kept channels of some layers, for as long as their scores stay what they are.

    Args:
        index: (k,), ascending.
        channels: Of how many.

    Attributes:
        place: (channels,), where each one is among the kept; -1: it is not.
    """

    def __init__(self, index: Tensor, channels: int) -> None:
        self.index, self.channels, self.k = index, channels, index.shape[0]
        order = torch.arange(self.k, device=index.device)
        self.place = index.new_full((channels,), -1).index_copy_(0, index, order)


class Scores:
    """What one layer remembers of its gradients: state that lasts from step to step.

    Args:
        settings: Default: those of ``selection="ahead"``.

    Attributes:
        passes: Forward passes so far of which a sparse backward may follow.
        mean: Running mean of the scores, each time divided by their sum, (C,); None: none yet.
        team: The layers that keep the same channels, this one among them.
    """

    def __init__(self, settings: Ahead | None = None) -> None:
        self.settings = settings or Ahead()
        self.passes = 0
        self.mean: Tensor | None = None
        self.team = Team([self])

    def begin(self, k: int, channels: int, device: torch.device) -> KeptSet | None:
        """Take note of a forward pass; return its kept channels, None if it looks.

        Args:
            k: How many are kept.
            channels: Of how many. Of another number (a layer was pruned) it begins anew.
            device: Where.
        """
        looks = self.settings.looks_at(self.passes)
        self.passes += 1
        kept = None if looks else self.team.kept(k, device)
        return kept if kept is not None and kept.channels == channels else None

    def observe(self, scores: Tensor) -> None:
        """Take in the scores of a whole gradient, (C,); those that are not finite, or zero, not."""
        scores = scores.detach().to(torch.float32 if scores.dtype.itemsize < 4 else scores.dtype)
        total = scores.sum()
        momentum, before = self.settings.momentum, self.mean
        if before is None or before.shape != scores.shape:
            before, momentum = torch.zeros_like(scores), 0.0
        before = before.to(scores.device)
        mixed = momentum * before + (1 - momentum) * (scores / total)
        self.mean = torch.where(torch.isfinite(total) & (total > 0), mixed, before)
        self.team.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` needs to go on exactly here, but for the team."""
        return {"passes": self.passes, "scores": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken, in a team of its own."""
        self.passes = int(state["passes"])
        mean = state["scores"]
        self.mean = None if mean is None else mean.detach().clone()
        self.team = Team([self])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings!r})"


class Team:
    """Layers that keep the same channels: those whose mean scores, added, are the largest."""

    def __init__(self, members: Sequence[Scores]) -> None:
        self.members = list(members)
        self._kept: dict[tuple[int, torch.device], KeptSet] = {}

    def kept(self, k: int, device: torch.device) -> KeptSet | None:
        """Return the ``k`` kept channels; None if nothing is known of them yet."""
        found = self._kept.get((k, device))
        if found is None:
            known = [m.mean for m in self.members if m.mean is not None]
            if not known or any(scores.shape != known[0].shape for scores in known):
                return None
            total = torch.stack([scores.to(device) for scores in known]).sum(0)
            found = self._kept[k, device] = KeptSet(topk_indices(total, k), total.shape[0])
        return found

    def forget(self) -> None:
        """Choose anew: the scores are others now."""
        self._kept = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["members"])  # type: ignore[misc]


def make_team(members: Sequence[Scores]) -> None:
    """Let layers choose together from now on, with those that each already chooses with."""
    if len({id(m.team) for m in members}) < 2:
        return
    joined = dict.fromkeys(itertools.chain.from_iterable(m.team.members for m in members))
    team = Team(list(joined))
    for member in team.members:
        member.team = team
