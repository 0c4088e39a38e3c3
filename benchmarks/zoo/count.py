"""How much of a network's training step its sparse convolutions are, in FLOPs.

(In rows of results/zoo.csv from before torch's fused attention on CPUs was counted, the shares of
networks with such attention are a little too high.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ssprop_patch as ssp
from ssprop_patch._text import sizes


class Shares(NamedTuple):
    """What the sparse convolutions are of the backward FLOPs, and of forward + backward."""

    backward: float
    step: float
    shape: str


def shares(model: nn.Module, inputs: tuple[Any, ...]) -> Shares:
    """Return the shares in an unconverted model, all of which is trained.

    Args:
        model: The model.
        inputs: Its positional arguments, which need no gradient: a first convolution has none to
            compute. Their data is not read unless the model's path depends on it.
    """
    found = ssp.summary(model, inputs=inputs)
    sparse, whole = found.converted, found.totals
    x = next(t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor))
    return Shares(
        sparse.dense_backward / (whole.dense_backward or 1),
        (sparse.forward + sparse.dense_backward) / (whole.forward + whole.dense_backward or 1),
        sizes(x.shape),
    )
