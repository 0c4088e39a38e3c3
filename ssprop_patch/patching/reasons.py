"""Why a layer is converted, stays dense, or makes a conversion an error."""

from __future__ import annotations

from enum import Enum
from typing import Literal, NamedTuple

Action = Literal["convert", "skip", "refuse"]


class Reason(Enum):
    """A reason in a plan; the value says what happens to the layer."""

    STOCK_FORWARD = ("convert", 0)
    OWN_FORWARD = ("convert", 1)

    EXCLUDED = ("skip", 0)
    FILTERED = ("skip", 1)
    NOT_AMONG_TYPES = ("skip", 2)
    CONVOLVES_BY_ITSELF = ("skip", 3)
    ONE_CHANNEL = ("skip", 4)
    COMPLEX = ("skip", 5)
    UNFIT_WEIGHT = ("skip", 6)
    NEVER_CALLED = ("skip", 7)
    ATTENTION = ("skip", 8)
    WRAPPED_FORWARD = ("skip", 9)
    TORCHSCRIPT = ("skip", 10)
    NO_SPARSE_BACKWARD = ("skip", 11)

    LAZY = ("refuse", 0)
    WRAPPED_CLASS = ("refuse", 1)
    HOOKED = ("refuse", 2)
    FINAL_CLASS = ("refuse", 3)

    @property
    def action(self) -> Action:
        """What happens to a layer for this reason."""
        return self.value[0]


class Verdict(NamedTuple):
    """What happens to a layer, and a sentence that says why."""

    reason: Reason
    text: str

    @property
    def action(self) -> Action:
        """What happens to the layer."""
        return self.reason.action

    def but(self, remark: str) -> Verdict:
        """Return the same with a remark at the end of the sentence."""
        return self._replace(text=self.text + remark)
