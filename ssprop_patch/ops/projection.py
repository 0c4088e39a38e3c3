"""Projected gradients: those of a convolution, or a linear layer, along a few directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.geometry import ConvParams
from ..core.operations import DxDw
from ..core.rule import BackwardRule, ranks
from . import autotune
from .channel_gradients import AllChannels
from .channel_ops import is_channels_last
from .pointwise import is_pointwise

#: Whether dX and dW are needed.
Needs = tuple[bool, bool]


def mix(t: Tensor, matrices: Tensor) -> Tensor:
    """Return ``matrices' t`` over the channels of each group.

    Args:
        t: (N, groups * a, *positions).
        matrices: (groups, a, b).

    Returns:
        (N, groups * b, *positions), in the memory format of ``t``.
    """
    groups, a, b = matrices.shape
    matrices = matrices.to(t.dtype)
    last = t.movedim(1, -1)
    if groups == 1 and t.dim() > 2 and last.is_contiguous():
        return (last.reshape(-1, a) @ matrices[0]).view(*last.shape[:-1], b).movedim(-1, 1)
    parts = t.reshape(t.shape[0], groups, a, -1)
    return (matrices.mT @ parts).view(t.shape[0], groups * b, *t.shape[2:])


def covariance(t: Tensor, groups: int) -> Tensor:
    """Return the sum of ``t t'`` over samples and positions, (groups, c, c), in float32 or wider.

    Args:
        t: (N, groups * c, *positions).
    """
    t = t.detach()
    rows = t.movedim(1, -1).reshape(-1, groups, t.shape[1] // groups).movedim(1, 0)
    rows = rows.to(torch.promote_types(t.dtype, torch.float32))
    return rows.mT @ rows


def gram(dw: Tensor, groups: int) -> Tensor:
    """Return ``dW' dW`` of each group, (groups, n, n), in float32 or wider.

    Args:
        dw: (C_out, C_in / groups, *kernel).
    """
    rows = dw.detach().reshape(groups, dw.shape[0] // groups, -1)
    rows = rows.to(torch.promote_types(dw.dtype, torch.float32))
    return rows.mT @ rows


def output_basis(dy: Tensor, groups: int, k: int, rule: BackwardRule) -> tuple[Tensor, bool]:
    """Return the directions of dy, (groups, C_out / groups, k or more), and if they were refreshed.

    Args:
        dy: (N, C_out, *out).
        groups: Groups.
        k: How many are asked for.
        rule: Has the subspace.
    """
    subspace = rule.subspace
    assert subspace is not None
    with subspace.lock, torch.no_grad():
        refresh = subspace.begin_call()
        basis = subspace.basis("dy", dy.device, groups, dy.shape[1] // groups)
        refresh = refresh or basis.covariance is None
        if refresh:
            basis.add(_of_all_ranks(covariance(dy, groups), rule), subspace.settings.momentum)
        if refresh or not basis.fits(k):
            basis.turn(k, subspace.settings.energy, subspace.is_warm)
        assert basis.vectors is not None
        subspace.last = "dy", basis.vectors, dy.dtype
        return basis.vectors, refresh


def _of_all_ranks(sample: Tensor, rule: BackwardRule) -> Tensor:
    """Return a covariance summed over the processes that select together."""
    add_up = getattr(rule.score_fn, "sum_over_ranks", None)
    return sample if add_up is None else add_up(sample)


def project_weight(w: Tensor, u: Tensor, p: ConvParams) -> Tensor:
    """Return U'W: the weight of the convolution whose output is U' times that of ``w``."""
    groups, channels, k = u.shape
    u = u.to(w.dtype)
    if p.transposed:  # (C_in, C_out / groups, *kernel)
        return _turn(w, u, groups)
    rows = w.reshape(groups, channels, -1)
    return (u.mT @ rows).reshape(groups * k, *w.shape[1:])


def lift_weight(dw: Tensor, u: Tensor, p: ConvParams) -> Tensor:
    """Return U dW, the adjoint of :func:`project_weight`."""
    groups, channels, k = u.shape
    u = u.to(dw.dtype)
    if p.transposed:
        return _turn(dw, u.mT, groups)
    rows = dw.reshape(groups, k, -1)
    return (u @ rows).reshape(groups * channels, *dw.shape[1:])


def _turn(w: Tensor, matrices: Tensor, groups: int) -> Tensor:
    """Return ``w``, (groups * a, b, *kernel), with its second dimension times (groups, b, c)."""
    last = w.movedim(1, -1)
    turned = last.reshape(groups, -1, w.shape[1]) @ matrices
    return turned.view(*last.shape[:-1], -1).movedim(-1, 1)


def along_output(z: Tensor, x: Tensor, w: Tensor, p: ConvParams, u: Tensor, needs: Needs) -> DxDw:
    """Return dX and dW of ``U z``, each None if not needed.

    Args:
        z: U'dy, (N, groups * k, *out).
        x: Input.
        w: Weight.
        p: Geometry.
        u: Directions of dy, (groups, C_out / groups, k).
    """
    if needs[0]:
        smaller = project_weight(w, u, p)
    else:  # of which dW needs the shape
        rows, k = (w.shape[0], u.shape[2]) if p.transposed else (z.shape[1], w.shape[1])
        smaller = w.new_empty(rows, k, *w.shape[2:])
    dx, dw = _gradients(z, x, smaller, p, needs)
    return dx, None if dw is None else lift_weight(dw, u, p)


class InputBases:
    """The directions of the input side.

    Attributes:
        v: Of dX, (groups, C_in / groups, r), or None where dX is not needed.
        t: Of the weight gradient, (groups, n, r'), or None where dW is not needed.
    """

    def __init__(self, v: Tensor | None, t: Tensor | None) -> None:
        self.v, self.t = v, t

    def share(self) -> float:
        """Return the larger share of all directions that they are."""
        return max(b.shape[2] / b.shape[1] for b in (self.v, self.t) if b is not None)


def input_bases(
    w: Tensor,
    groups: int,
    k: int,
    rule: BackwardRule,
    needs: Needs,
    device: torch.device,
) -> InputBases | None:
    """Return the directions of dX and of the weight gradient; None if they are to be refreshed.

    Args:
        w: Weight, (C_out, C_in / groups, *kernel).
        groups: Groups.
        k: As large a share of them is asked for as k is of the output channels of a group.
        rule: Has the subspace.
        needs: Whether dX and dW are needed.
        device: Of the gradients.
    """
    subspace = rule.subspace
    assert subspace is not None
    with subspace.lock, torch.no_grad():
        if subspace.begin_call():
            return None
        found: list[Tensor | None] = []
        sizes = ("dx", w.shape[1]), ("dw", w[0].numel())
        for size, rank, needed in zip(sizes, _input_ranks(w, groups, k), needs, strict=True):
            basis = subspace.basis(size[0], device, groups, size[1]) if needed else None
            if basis is not None and basis.covariance is None:
                return None
            if basis is not None and not basis.fits(rank):
                basis.turn(rank, subspace.settings.energy, subspace.is_warm)
            found.append(None if basis is None else basis.vectors)
        subspace.last = None if found[1] is None else ("dw", found[1], w.dtype)
        return InputBases(*found)


def refresh_input_bases(
    dx: Tensor | None, dw: Tensor | None, w: Tensor, groups: int, k: int, rule: BackwardRule
) -> None:
    """Refresh the directions from a dense gradient, as far as there is one."""
    subspace = rule.subspace
    assert subspace is not None
    r, s = _input_ranks(w, groups, k)
    momentum, energy = subspace.settings.momentum, subspace.settings.energy
    with subspace.lock, torch.no_grad():
        if dx is not None:
            basis = subspace.basis("dx", dx.device, groups, w.shape[1])
            basis.add(_of_all_ranks(covariance(dx, groups), rule), momentum)
            basis.turn(r, energy, subspace.is_warm)
        if dw is not None:
            basis = subspace.basis("dw", dw.device, groups, w[0].numel())
            basis.add(_of_all_ranks(gram(dw, groups), rule), momentum)
            basis.turn(s, energy, subspace.is_warm)


def _input_ranks(w: Tensor, groups: int, k: int) -> tuple[int, ...]:
    return ranks(k, w.shape[0] // groups, w.shape[1], w[0].numel())


def along_input(dy: Tensor, x: Tensor, w: Tensor, p: ConvParams, bases: InputBases) -> DxDw:
    """Return dX along V and dW along T, each None without its directions.

    Args:
        dy: (N, C_out, *out).
        x: Input.
        w: Weight, (C_out, C_in / groups, *kernel).
        p: Geometry, not transposed.
        bases: V and T.
    """
    dx = dw = None
    if bases.v is not None:
        v = bases.v.to(w.dtype)
        like = _empty(x, p.groups * v.shape[2], x.shape[2:])
        dx = _gradients(dy, like, _turn(w, v, p.groups), p, (True, False))[0]
        assert dx is not None
        dx = mix(dx, v.mT)
    if bases.t is not None:
        dw = _weight_gradient(dy, x, w, p, bases.t.to(x.dtype))
    return dx, dw


def _weight_gradient(dy: Tensor, x: Tensor, w: Tensor, p: ConvParams, t: Tensor) -> Tensor:
    rank, dims = t.shape[2], w.dim() - 2
    ones, zeros = (1,) * dims, (0,) * dims
    if is_pointwise(w.shape, p) and p.stride == ones:
        projected = mix(x, t)
    else:
        kernels = t.mT.reshape(p.groups * rank, *w.shape[1:])
        projected = torch.convolution(
            x, kernels, None, p.stride, p.padding, p.dilation, False, zeros, p.groups
        )
    like = w.new_empty(w.shape[0], rank, *ones)
    dw = _gradients(dy, projected, like, ConvParams(ones, zeros, ones, p.groups), (False, True))[1]
    assert dw is not None
    rows = dw.reshape(p.groups, w.shape[0] // p.groups, rank)
    return (rows @ t.mT).reshape(w.shape)


def _gradients(dy: Tensor, x: Tensor, w: Tensor, p: ConvParams, needs: Needs) -> DxDw:
    """Return dX and dW of a convolution as a sparse one that keeps all channels computes them."""
    channels = AllChannels(dy, x, w, p)
    dx, dw, _ = autotune.choose(channels, *needs).run(channels, (*needs, False))
    return dx, dw


def _empty(like: Tensor, channels: int, positions: Sequence[int]) -> Tensor:
    """Return memory that nobody reads, in the format of ``like``, as dX takes its shape from x."""
    if is_channels_last(like):
        return like.new_empty(like.shape[0], *positions, channels).movedim(-1, 1)
    return like.new_empty(like.shape[0], channels, *positions)
