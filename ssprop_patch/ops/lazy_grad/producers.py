"""Finds the sparse convolutions whose outputs a tensor was made of, in the autograd graph.

A convolution asks for those of its input. If nothing lies in between that a gradient of two
resolutions (:mod:`.two_resolutions`) does not pass, it need form no more of dX than they will read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

# Of torch.autograd.graph: what takes the gradient of its output and returns that of its input, of
# the same channels, and what passes on the gradient of a sum.
_ONE_INPUT = frozenset(
    f"{name}Backward0"
    for name in (
        "NativeBatchNorm",
        "CudnnBatchNorm",
        "Relu",
        "Hardtanh",
        "LeakyRelu",
        "Silu",
        "Hardswish",
        "Gelu",
        "MaxPool2DWithIndices",
    )
)
_SUM = "AddBackward0"
# Residual connections of a stage lie one behind the other; each is found from the next one.
_MOST_NODES = 64

Node = Any  # of torch.autograd.graph


def producers(start: Node, is_one: Callable[[Node], bool]) -> list[Node] | None:
    """Return the nodes of the sparse convolutions before ``start``; None if there is anything else.

    Args:
        start: The node of a tensor, None for a leaf.
        is_one: Whether a node is that of a sparse convolution.
    """
    if start is None:
        return None
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    queue = [start]
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_one(node):
            found[node] = None
            continue
        before = list(_before(node))
        if not before or len(seen) > _MOST_NODES:
            return None
        queue += before
    return list(found)


def _before(node: Node) -> Iterator[Node]:
    name = type(node).__name__
    if name == _SUM:
        yield from (before for before, _ in node.next_functions)
    elif name in _ONE_INPUT:
        yield node.next_functions[0][0]
