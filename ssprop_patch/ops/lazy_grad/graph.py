"""Finds the batch norms and ReLUs whose gradients can be formed for the kept channels only.

The layers themselves are left alone: what follows a sparse convolution is seen in the autograd
graph. When the backward of a sparse convolution begins, the nodes between it and the sparse
convolutions before it have yet to run. A batch norm that took its input straight from one of those,
and a ReLU that took its input straight from such a norm, then get a hook that runs before their
node. It wraps the incoming gradient, so that the node's own kernel hands over to
:mod:`ssprop_patch.ops.lazy_grad.gradients` and nothing is computed that nobody reads.

A norm with no sparse convolution after it, such as the last of a network, keeps torch's own
backward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._torch_compat import (
    CAN_BE_LAZY,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
    sequence_number,
    will_engine_execute_node,
)
from ...core.cells import Cells
from ...core.selection import ScoreFn
from ..channel_scores import lazy_order
from .gradients import NormInput, ReLUGradient, ReLUInput

# For fewer elements the Python of a lazy gradient takes longer than the passes that it saves:
# 50 us a layer against 0.4 ns an element, on two AVX-512 cores.
_MIN_ELEMENTS = 2**17
_MIN_RELU_ELEMENTS = 2**18
# Of so few positions per channel the closed form of the squares is mostly cancellation.
_MIN_POSITIONS = 16
# So many nodes are looked at before a convolution: the branches of an Inception block, but not the
# whole network through its residual connections. Each is looked at once.
_MOST_NODES = 64

_NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0")
_RELU = "ReluBackward0"
_DONE = "ssprop_patch"

Node = Any  # of torch.autograd.graph


class Needed(NamedTuple):
    """What a sparse convolution reads of its gradient.

    Attributes:
        score_fn: Scores the channels, of which some are read.
        block: Positions in each dimension of the cells whose sums are read of all; 0: none are.
    """

    score_fn: ScoreFn
    block: int = 0


#: Returns what the node of a sparse convolution reads; None if it needs all of dy.
NeededBy = Callable[[Node], Needed | None]


def prepare_before(node: Node, x: Tensor, needed_by: NeededBy) -> None:
    """Make the gradients before a sparse convolution lazy, where its backward is about to run.

    Args:
        node: The convolution's node.
        x: Its input, (N, C_in, *in).
        needed_by: Of nodes like this one.
    """
    # A pooling may lie in between, but maps that are much smaller have no large ones before them
    # that would not be seen from their own layers.
    if 4 * x.numel() >= _MIN_ELEMENTS and not torch.is_grad_enabled():
        prepare(node.next_functions[0][0], type(node), needed_by)


def prepare(start: Node, convolution: type, needed_by: NeededBy) -> None:
    """Make the gradients lazy that nodes from ``start`` on pass to nodes of class ``convolution``.

    Args:
        start: A node that has not run yet; None does nothing.
        convolution: The class of the nodes of sparse convolutions.
        needed_by: Of such nodes.
    """
    if not CAN_BE_LAZY:
        return
    queue = deque((start,))
    for _ in range(_MOST_NODES):
        if not queue:
            return
        node = queue.popleft()
        if node is None or type(node) is convolution or not _is_new(node):
            continue
        following = node.next_functions
        name = type(node).__name__
        if name == _RELU:
            norm = following[0][0]
            if _is_paired(norm, convolution) and _follows(node, norm):
                node.register_prehook(_BeforeReLU(norm))
        elif name in _NORMS and _is_paired(node, convolution):
            conv = following[0][0]
            needed = needed_by(conv)
            order = None if needed is None else lazy_order(needed.score_fn)
            if needed is not None and order is not None:
                node.register_prehook(_BeforeNorm(conv, order, needed.block))
            continue
        queue.extend(before for before, _ in following)


def _is_paired(norm: Node, convolution: type) -> bool:
    """Whether a node is a batch norm that took its input straight from a sparse convolution."""
    if type(norm).__name__ not in _NORMS:
        return False
    conv = norm.next_functions[0][0]
    return type(conv) is convolution and _follows(norm, conv)


def _follows(node: Node, before: Node) -> bool:
    """Whether nothing was recorded in between, so that nothing runs in between either.

    A hook of another branch could otherwise change, in place, what a lazy gradient has yet to read.
    """
    return sequence_number(node) == sequence_number(before) + 1


def _is_new(node: Node) -> bool:
    """Whether ``node`` was not looked at yet; a retained graph runs again, with its hooks."""
    metadata = node.metadata
    if _DONE in metadata:
        return False
    metadata[_DONE] = True
    return True


def _is_ordinary(t: Any) -> bool:
    """Whether a gradient is a plain tensor of which no derivative and no batch is asked for."""
    if type(t) is not Tensor or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not (is_functorch_wrapped_tensor(t) or is_legacy_batchedtensor(t))


class _BeforeReLU:
    """The hook before a ReLU's node.

    Args:
        norm: The node of the batch norm in front of it.
    """

    def __init__(self, norm: Node) -> None:
        self._norm = norm

    def __call__(self, grads: tuple[Any, ...]) -> tuple[Any, ...] | None:
        dz = grads[0]
        if not _is_ordinary(dz) or dz.numel() < _MIN_RELU_ELEMENTS or is_partial(self._norm):
            return None
        return (ReLUInput(dz), *grads[1:])


class _BeforeNorm:
    """The hook before a batch norm's node.

    Args:
        conv: The node of the sparse convolution in front of it.
        order: Its channels are chosen by their sums of ``|dy| ** order``.
        block: As of :class:`Needed`.
    """

    def __init__(self, conv: Node, order: int, block: int) -> None:
        self._conv, self._order, self._block = conv, order, block

    def __call__(self, grads: tuple[Any, ...]) -> tuple[Any, ...] | None:
        dz, relu_out = grads[0], None
        if isinstance(dz, ReLUGradient):
            dz, relu_out = dz.parts()
        if not (_is_ordinary(dz) and is_large_enough(dz)) or is_partial(self._conv):
            return None
        cells = Cells.blocks(tuple(dz.shape[2:]), self._block) if self._block else None
        return (NormInput(dz, relu_out, self._order, cells), *grads[1:])


def is_large_enough(dz: Tensor) -> bool:
    """Whether a lazy gradient pays for a batch norm with the output gradient ``dz``."""
    return dz.dim() >= 2 and dz.numel() >= max(_MIN_ELEMENTS, _MIN_POSITIONS * dz.shape[1])


def is_partial(node: Node) -> bool:
    """Whether this backward is after certain gradients only: ``torch.autograd.grad``, ``inputs=``.

    Then what comes in at ``node`` may itself be asked for, and must be an ordinary tensor.
    """
    try:
        return not all(
            before is None or will_engine_execute_node(before) for before, _ in node.next_functions
        )
    except RuntimeError:  # a leaf whose gradient torch.autograd.grad returns
        return True
