"""A gradient of two resolutions on its way through autograd.

It is a tensor that is not formed. The backward of a batch norm, of a ReLU and other pointwise
functions, and the sum of two such gradients know it and pass one on; whatever else meets it (a
hook, a user's function, an operation that is not listed here) gets the ordinary tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._torch_compat import version
from ...core import two_resolutions as plain
from ...core.geometry import ntuple
from ...core.two_resolutions import TwoResolutions
from .. import channel_ops
from ..coarse_cells import FastCells
from ..native.two_resolutions import can_take, two_norm, two_relu
from .gradients import LazyGradient

aten = torch.ops.aten

#: Backwards of pointwise functions, whose first argument is the gradient.
POINTWISE = frozenset(
    getattr(aten, name).default
    for name in (
        "threshold_backward",
        "hardtanh_backward",
        "leaky_relu_backward",
        "silu_backward",
        "hardswish_backward",
        "gelu_backward",
    )
)


class Positive(NamedTuple):
    """How often a tensor is above zero in each cell: known by who read it for something else.

    Attributes:
        of: The tensor, (N, C, *positions).
        version: Of it, then.
        counts: (N, C, *number).
    """

    of: Tensor
    version: int
    counts: Tensor

    def counts_of(self, t: Tensor) -> Tensor | None:
        """Return the counts if they are those of ``t``, the same memory."""
        alike = t.data_ptr() == self.of.data_ptr() and t.stride() == self.of.stride()
        same = alike and t.shape == self.of.shape and version(t) == self.version
        return self.counts if same else None


class TwoResolutionGradient(LazyGradient):
    """The gradient of a tensor.

    Args:
        like: That tensor.
        parts: What it is.
        block: About how many positions its blocks have in each dimension.
        positive: Where the tensor is above zero, if that is known.
        is_exact: Whether the sums of kept channels in ``parts`` are those; they are taken when they
            are asked for.
    """

    def __init__(
        self,
        like: Tensor,
        parts: TwoResolutions,
        block: int,
        positive: Positive | None = None,
        is_exact: bool = True,
    ) -> None:
        self._parts: TwoResolutions | None = parts
        self.block, self.positive, self.is_exact = block, positive, is_exact

    def parts(self) -> TwoResolutions | None:
        """Return what it is; None where it was formed, and so may have been changed.

        The sums of its kept channels may be anything, unless it ``is_exact``.
        """
        return self._parts if self._formed is None else None

    def exact_parts(self) -> TwoResolutions | None:
        """Return what it is, with the sums of its kept channels; None as :meth:`parts`."""
        parts = self.parts()
        if parts is not None and not self.is_exact:
            fast = parts._replace(cells=FastCells(*parts.cells))
            self._parts = parts = plain.with_sums_of_kept(fast)
            self.is_exact = True
        return parts

    def _form(self) -> Tensor:
        parts = self.parts()
        assert parts is not None
        with torch.no_grad():
            return parts.whole()

    @torch.no_grad()
    def _pass_on(self, func: Any, args: tuple[Any, ...]) -> Any:
        if func is aten.add.Tensor:
            return _sum(*args[:2]) if len(args) == 2 else NotImplemented
        if args[0] is not self or self.parts() is None:
            return NotImplemented
        if func is aten.threshold_backward.default and args[2] == 0:
            return ReLUResult(args[1], self)
        if func in POINTWISE:
            return self._through(func, args)
        if func is aten.max_pool2d_with_indices_backward.default:
            return self._through_max_pool(func, args)
        return self._before_norm(func, args)

    def _through(self, func: Any, args: tuple[Any, ...]) -> Any:
        parts, saved = self.parts(), args[1]
        if parts is None or not _is_like(saved, self):
            return NotImplemented
        derivative = func(saved.new_ones(()).expand_as(saved), *args[1:])
        return TwoResolutionGradient(saved, plain.pointwise(parts, derivative), self.block)

    def _through_max_pool(self, func: Any, args: tuple[Any, ...]) -> Any:
        parts, (_, x, kernel, stride, padding, dilation, ceil, indices) = self.parts(), args
        if parts is None:
            return NotImplemented
        index, block = parts.which.index, self.block
        kept = func(
            parts.kept,
            channel_ops.take_channels(x, index),
            kernel,
            stride,
            padding,
            dilation,
            ceil,
            channel_ops.take_channels(indices, index),
        )
        steps = tuple(stride) or tuple(kernel)
        of_x = plain.max_pool(parts, kept, tuple(x.shape[2:]), ntuple(steps, 2), block)
        return TwoResolutionGradient(x, of_x, block)

    def _before_norm(self, func: Any, args: tuple[Any, ...]) -> Any:
        if func is aten.native_batch_norm_backward.default:
            _, x, weight, _, _, mean, invstd, training, _, needed = args
        elif func is aten.cudnn_batch_norm_backward.default:
            (x, _, weight, _, _, mean, invstd, _, _), training, needed = args, True, (True,) * 3
        else:
            return NotImplemented
        if not (training and _is_like(x, self)):
            return NotImplemented
        dx, dw, db = self._through_norm(x, weight, mean, invstd)
        dtype = mean.dtype if weight is None else weight.dtype
        return (
            dx,
            dw.to(dtype) if needed[1] and weight is not None else None,
            db.to(dtype) if needed[2] else None,
        )

    def _through_norm(
        self, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.parts()
        assert parts is not None
        return _norm(parts, x, weight, mean, invstd, self.block)


class ReLUResult(TwoResolutionGradient):
    """The gradient of the input of a ReLU, computed when it is known what reads it.

    A batch norm in front of it takes both at once.

    Args:
        out: The ReLU's output.
        of_out: Its gradient.
    """

    def __init__(self, out: Tensor, of_out: TwoResolutionGradient) -> None:
        self._out, self._of_out, self.block = out, of_out.parts(), of_out.block
        self._counts = None if of_out.positive is None else of_out.positive.counts_of(out)
        self._parts, self.positive, self.is_exact = None, None, True
        self._made_from(out)

    def parts(self) -> TwoResolutions | None:
        """Return what it is, computed at the first time."""
        if self._formed is not None:
            return None
        if self._parts is None:
            self._check_sources()
            assert self._of_out is not None
            self._parts = _relu(self._of_out, self._out, self._counts)
        return self._parts

    def _through_norm(
        self, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self._parts is not None or self._of_out is None:
            return super()._through_norm(x, weight, mean, invstd)
        self._check_sources()
        return _norm(self._of_out, x, weight, mean, invstd, self.block, self._out, self._counts)


class MixedSum(TwoResolutionGradient):
    """The sum with an ordinary gradient, of two resolutions for the layers before.

    Whoever reads it gets the sum with all of the ordinary one: a hook may add what it likes.

    Args:
        two: The one.
        parts: The sum, with what is left of the other.
        other: The other.
    """

    def __init__(self, two: TwoResolutionGradient, parts: TwoResolutions, other: Tensor) -> None:
        super().__init__(two, parts, two.block, two.positive, two.is_exact)
        self._terms = two, other
        self._made_from(other)

    @torch.no_grad()
    def _form(self) -> Tensor:
        two, other = self._terms
        return two.form() + other


def _relu(g: TwoResolutions, out: Tensor, counts: Tensor | None) -> TwoResolutions:
    if channel_ops.are_for_c(out) and can_take(g, out):
        done = two_relu(g, out, counts)
        if done is not None:
            return g._replace(kept=done[0], sums=done[1])
    return plain.pointwise(g, (out > 0).to(g.kept.dtype))


def _norm(
    g: TwoResolutions,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    block: int,
    relu_out: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if channel_ops.are_for_c(x) and can_take(g, x):
        done = two_norm(g, x, weight, mean, invstd, relu_out, counts)
        if done is not None:
            kept, sums, dw, db = done
            return TwoResolutionGradient(x, g._replace(kept=kept, sums=sums), block), dw, db
    if relu_out is not None:
        g = _relu(g, relu_out, counts)
    out, dw, db = plain.batch_norm(plain.with_sums_of_kept(g), x, weight, mean, invstd)
    out = out._replace(kept=out.kept.to(x.dtype), sums=out.sums.to(x.dtype))
    return TwoResolutionGradient(x, out, block), dw, db


def _sum(a: Any, b: Any) -> Any:
    """Return the sum of two gradients, one of two resolutions; NotImplemented if it has none."""
    two, other = (a, b) if isinstance(a, TwoResolutionGradient) else (b, a)
    mine = two.parts() if isinstance(two, TwoResolutionGradient) else None
    if mine is None or not _is_like(other, two) or other.dtype is not two.dtype:
        return NotImplemented
    positive, is_exact = two.positive, two.is_exact
    if isinstance(other, TwoResolutionGradient):
        theirs, positive = other.parts(), positive or other.positive
        is_exact = is_exact and other.is_exact
        if theirs is None or theirs.which is not mine.which or theirs.cells != mine.cells:
            return NotImplemented
    elif type(other) is Tensor:
        kept, cells = channel_ops.take_channels(other, mine.which.index), FastCells(*mine.cells)
        theirs = mine._replace(kept=kept, sums=cells.sums(other))
        return MixedSum(two, plain.add(mine, theirs), other)
    else:
        return NotImplemented
    return TwoResolutionGradient(two, plain.add(mine, theirs), two.block, positive, is_exact)


def _is_like(t: Any, gradient: Tensor) -> bool:
    return isinstance(t, Tensor) and t.shape == gradient.shape
