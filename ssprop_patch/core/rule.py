"""What of a gradient goes back: channels or directions, with or without the coarse remainder."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod
from typing import Literal, NamedTuple

from .ahead import Ahead, Scores
from .cells import count_blocks
from .coarse import Coarse
from .geometry import convolution_shape
from .principal import Principal, Side, Subspace, cheaper_side, projected_share
from .selection import ScoreFn, l1_scores, resolve_selection, selectable_channels

#: What would cost more than this share of the dense gradient is not done.
PAYS = 0.95


class BackwardRule(NamedTuple):
    """What of one layer's gradient goes back.

    Attributes:
        score_fn: Scores the channels. Under ``subspace`` it is that of layers in which a projection
            would cost more than it saves.
        block: Output positions in each dimension that the coarse remainder takes together; 0: what
            is not selected is dropped.
        subspace: The layer's directions; None: channels are kept.
        ahead: What the layer knows of earlier gradients, if channels are chosen by these.
    """

    score_fn: ScoreFn = l1_scores
    block: int = 0
    subspace: Subspace | None = None
    ahead: Scores | None = None

    @property
    def is_top_k(self) -> bool:
        """Whether the kept channels are all that goes back: the paper's rule."""
        return not self.block and self.subspace is None

    @property
    def is_shared(self) -> bool:
        """Whether several processes select together, each of which has to take part."""
        return _selects_together(self.score_fn)

    def for_another_layer(self) -> BackwardRule:
        """Return the same rule with a state of its own."""
        rule = self
        if self.subspace is not None:
            rule = rule._replace(subspace=Subspace(self.subspace.settings))
        if self.ahead is not None:
            rule = rule._replace(ahead=Scores(self.ahead.settings))
        return rule

    def without_memory(self) -> BackwardRule:
        """Return the rule of calls that do not belong to the layer, or cannot remember."""
        return self._replace(subspace=None, ahead=None)


def _selects_together(score_fn: ScoreFn) -> bool:
    return hasattr(score_fn, "sum_over_ranks")


class Extent(NamedTuple):
    """The sizes of one call of a layer that costs depend on.

    Attributes:
        channels: Output channels.
        inputs: Input channels of one group.
        taps: Of the kernel.
        groups: Groups.
        x_positions: Samples times positions of the input.
        y_positions: Samples times positions of the output.
        blocks: Samples times blocks of the coarse twin; 0 without one.
        transposed: Whether it is a transposed convolution.
    """

    channels: int
    inputs: int
    taps: int
    groups: int
    x_positions: int
    y_positions: int
    blocks: int = 0
    transposed: bool = False

    @classmethod
    def of(
        cls,
        x: Sequence[int],
        w: Sequence[int],
        y: Sequence[int],
        groups: int,
        transposed: bool = False,
        block: int = 0,
    ) -> Extent:
        """Return the sizes of a call from its shapes.

        Args:
            x: Input, (N, C_in, *in) or (C_in, *in); of a linear layer (*, in_features).
            w: Weight.
            y: Output, as ``x``.
            groups: Groups.
            transposed: Whether it is a transposed convolution.
            block: As of :class:`BackwardRule`.
        """
        if len(w) == 2:
            x, y = convolution_shape(x), convolution_shape(y)
        elif len(x) < len(w):  # without a batch
            x, y = (1, *x), (1, *y)
        blocks = y[0] * prod(count_blocks((x if transposed else y)[2:], block)) if block else 0
        return cls(
            channels=y[1],
            inputs=x[1] // groups,
            taps=prod(w[2:]),
            groups=groups,
            x_positions=x[0] * prod(x[2:]),
            y_positions=y[0] * prod(y[2:]),
            blocks=blocks,
            transposed=transposed,
        )

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel is a group of its own."""
        return self.groups == self.channels > 1

    @property
    def choices(self) -> int:
        """How many sets of channels there are, in each of which as many are kept."""
        return self.channels // selectable_channels(self.channels, self.groups)

    @property
    def macs(self) -> int:
        """Multiply-adds of the forward, which are those of dX, and of dW."""
        at = self.x_positions if self.transposed else self.y_positions
        return at * self.channels * self.inputs * self.taps

    @property
    def reads(self) -> float:
        """Multiply-adds of one output channel at one position."""
        return self.macs / (self.y_positions * self.channels or 1)

    @property
    def coarse_share(self) -> float:
        """Cost of the coarse twin's gradient as a share of the layer's own."""
        at = self.x_positions if self.transposed else self.y_positions
        return self.blocks / (at * self.taps or 1)


# The function last: what reads configuration files takes the first that fits.
Selection = (
    Literal["l1", "l2", "random", "principal", "ahead"] | Principal | Subspace | Ahead | ScoreFn
)
Remainder = Literal["coarse"] | Coarse | None

#: Channels kept; directions of dy; directions of dX and the weight gradient; all of the gradient.
Selected = Literal["all", "channels", "output", "input"]


class BackwardKind(NamedTuple):
    """How much of a gradient one call computes.

    Attributes:
        selected: What goes back as it is.
        block: Positions of a block in which the rest goes back coarsely; 0: it is dropped.
        refreshed: Whether the directions were refreshed.
        inputs: Of channels that were chosen ahead: how many of the input's channels are kept, as
            the layers before chose; 0: dX is formed for all of them.
        scored: Whether the channels were chosen by this gradient, and not ahead of it.
    """

    selected: Selected = "channels"
    block: int = 0
    refreshed: bool = False
    inputs: int = 0
    scored: bool = True


#: The paper's: kept channels, and nothing else.
TOP_K = BackwardKind()


def kind_of(rule: BackwardRule, extent: Extent, k: int) -> BackwardKind:
    """Return what a call computes that keeps ``k`` channels, or directions, of each choice."""
    rest = extent.coarse_share if rule.block else 0.0
    # Nothing to compute; or the rest would be the exact gradient at its price.
    if not extent.macs or rest >= 1:
        return BackwardKind("all")
    group = extent.channels // extent.groups
    if rule.subspace is not None and not extent.is_depthwise:
        side: Side = cheaper_side(group, extent.reads, extent.transposed)
        # What several processes do together must not depend on the batch of one.
        # (Dynamo of torch 2.6 traces this call, and not the property that makes it.)
        positions = inf if _selects_together(rule.score_fn) else extent.y_positions
        share = projected_share(group, extent.reads, side, k / group, positions)
        if share + rest < PAYS:
            return BackwardKind(side, rule.block)
    kept = k * extent.choices / extent.channels
    if rule.block and kept + (1 - kept) * rest >= PAYS:
        return BackwardKind("all")
    return BackwardKind("channels", rule.block)


def ranks(k: int, channels: int, *sizes: int) -> tuple[int, ...]:
    """Return how many directions of spaces of other sizes are as large a share as k of channels."""
    return tuple(max(1, int(size * k / channels + 0.5)) for size in sizes)


def resolve_rule(selection: Selection = "l1", remainder: Remainder = None) -> BackwardRule:
    """Return the rule that the arguments ``selection`` and ``remainder`` mean.

    Raises:
        ValueError: If one of them is a name that does not exist.
        TypeError: If it is of another type.
    """
    block = 0
    if isinstance(remainder, Coarse):
        block = remainder.block_size
    elif remainder == "coarse":
        block = Coarse().block_size
    elif isinstance(remainder, str):
        raise ValueError(f"remainder must be None, 'coarse' or a Coarse, got {remainder!r}")
    elif remainder is not None:
        kind = type(remainder).__name__
        raise TypeError(f"remainder must be None, 'coarse' or a Coarse, got {kind}")
    if isinstance(selection, Subspace):
        return BackwardRule(l1_scores, block, selection)
    if isinstance(selection, Principal):
        return BackwardRule(l1_scores, block, Subspace(selection))
    if selection == "principal":
        return BackwardRule(l1_scores, block, Subspace())
    if isinstance(selection, Ahead) or selection == "ahead":
        if not block:
            raise ValueError(
                'selection="ahead" sends back coarsely what it does not keep: pass '
                'remainder="coarse"'
            )
        settings = selection if isinstance(selection, Ahead) else None
        return BackwardRule(l1_scores, block, ahead=Scores(settings))
    return BackwardRule(resolve_selection(selection), block)
