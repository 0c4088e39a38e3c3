"""What one converted layer goes by."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..core.rule import BackwardRule
from ..core.selection import ScoreFn, l1_scores, l2_scores
from .call_observer import CallObserver
from .controller import SparsityController
from .settings import LayerSettings, token_of
from .traced_rates import may_trace


class LayerPolicy:
    """What one patched layer goes by; its own, as torch.compile guards on what layers share.

    Args:
        controller: Holds the rate.
        rule: What of the gradient goes back; its state is this layer's own, and of its own weight.
        override: This layer's own rate whenever the controller's is above 0.
        align: The number of kept channels is rounded up to a multiple of it.
        observer: Gets a report of each call in training mode, dense ones too: for a meter.
    """

    def __init__(
        self,
        controller: SparsityController,
        rule: BackwardRule,
        override: float | None = None,
        align: int = 1,
        observer: CallObserver | None = None,
    ) -> None:
        self.controller = controller
        self.rule = rule
        self.override = override
        self.align = align
        self.observer = observer
        self._derive()

    def _derive(self) -> None:
        # What compiled code reads: bools, and tensors whose values are not guarded on.
        self.can_drop = self.override != 0.0
        self.is_metered = self.observer is not None
        # There the channels are chosen in each backward.
        rule = self.rule._replace(ahead=None)
        self.settings = LayerSettings(rule, self.override, self.align, self.observer)
        self.traced_as = self._traced_as()
        self.token = self.token_of_others = token_of(self.settings)
        self.remembers = self.rule.subspace is not None or self.rule.ahead is not None
        if rule.subspace is not None:  # but nothing of a weight that is not the layer's own
            others = dataclasses.replace(self.settings, rule=self.rule.without_memory())
            self.token_of_others = token_of(others)

    def metered(self, observer: CallObserver) -> LayerPolicy:
        """Return the same policy with a report of each call to ``observer``."""
        return LayerPolicy(self.controller, self.rule, self.override, self.align, observer)

    def _traced_as(self) -> str | None:
        """Return, in words, what torch.compile may see of the backward: selection, block, align.

        None where there is more to it than a graph can hold, or where graphs would be many.
        """
        rule = self.rule
        if self.override is not None or self.is_metered:
            return None
        known: dict[ScoreFn, str] = {l1_scores: "l1", l2_scores: "l2"}
        name = known.get(rule.score_fn)
        if rule.subspace is not None and name is not None:
            name = "principal" if rule.subspace.settings.energy is None else None
        words = f"{name} {rule.block} {self.align}"
        may = name is not None and may_trace(self.controller._traced_rates, words)
        return words if may else None

    @property
    def active(self) -> bool:
        """Whether the layer's training passes are this package's own: sparse, or metered."""
        return self.controller.sparse or self.is_metered

    @property
    def drop_rate(self) -> float:
        """The drop rate of this layer now."""
        return self.settings.drop_rate(self.controller._drop_rate)

    def kept(self, channels: int) -> int:
        """Return how many of ``channels``, those of one choice, are kept now."""
        return self.settings.kept(channels, self.controller._drop_rate)

    def __getstate__(self) -> dict[str, Any]:
        names = ("controller", "rule", "override", "align", "observer")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._derive()
