"""One choice of channels for all ranks: the scores of a gradient, summed before the top-k.

Under DDP and FSDP each rank sees the gradient of its own part of the batch. Summed over the ranks,
the scores are those of the whole batch, so that every rank keeps the channels that one process
with all the data would keep. Nothing is remembered from one backward to the next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch_compat import timeout_of
from ..core.selection import RandomScores, ScoreFn, l1_scores, l2_scores
from ..ops.channel_scores import channel_scores


def synchronized(score_fn: ScoreFn, sync_selection: bool | Any) -> ScoreFn:
    """Return ``score_fn``, made to agree on all ranks as ``sync_selection`` of ``convert`` says.

    Raises:
        TypeError: If ``sync_selection`` is neither a bool nor a process group.
        ValueError: If it is a process group that this rank is not in, or that is destroyed.
    """
    if isinstance(sync_selection, bool):
        return SynchronizedScores(score_fn) if sync_selection else score_fn
    if not dist.is_available() or not isinstance(sync_selection, dist.ProcessGroup):
        if dist.is_available() and sync_selection is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "sync_selection is a process group that this rank is not in (new_group returned "
                "NON_GROUP_MEMBER): give each rank the group that it trains in"
            )
        raise TypeError(
            "sync_selection must be True, False or a torch.distributed.ProcessGroup (of a "
            f"DeviceMesh: mesh.get_group('dp')), got {type(sync_selection).__name__}"
        )
    if dist.get_rank(sync_selection) < 0:
        raise ValueError("sync_selection is a process group that this rank is not in")
    return SynchronizedScores(score_fn, sync_selection)


class SynchronizedScores:
    """Scores that are the same on all ranks: those of ``local``, summed over a process group.

    The sum orders channels as the mean does. It costs one all-reduce of C_out numbers; nothing
    where no process group is initialised, or one process is all there is. ``"random"`` scores
    are not sent: the ranks agree on a seed, once, and draw the same.

    Args:
        local: Scores the gradient of one rank.
        group: Default: all ranks, in a group of our own, which is made when first needed, so that
            these small reductions do not wait for a wrapper's large ones.
    """

    def __init__(self, local: ScoreFn, group: Any = None) -> None:
        self.local = local
        # Weak, here and below: gloo aborts a process that ends holding a destroyed group.
        self._group: Callable[[], Any] | None = None if group is None else ref(group)
        self._agreed: Callable[[], Any] = _nothing  # the group in which a seed was agreed on

    def __call__(self, dy: Tensor) -> Tensor:
        group = self._group_in_use(dy.device)
        if group is None:
            return channel_scores(self.local, dy)
        if isinstance(self.local, RandomScores):
            if self._agreed() is not group:
                _agree_on_seed(self.local, dy.device, group)
                self._agreed = ref(group)
            return channel_scores(self.local, dy)
        scores = channel_scores(self.local, dy)
        if self.local is l2_scores:
            scores = scores.square_()  # sums of squares add up; their order is that of the norms
        elif self.local is not l1_scores:
            if not isinstance(scores, Tensor) or scores.shape != dy.shape[1:2]:
                return scores  # select_channels says what is wrong with it
            # A copy, for it may be a tensor that the function keeps; in a type that can be summed.
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32), copy=True)
        # The host does not wait for it, where the backend has a queue (NCCL).
        dist.all_reduce(scores, group=group)
        return scores

    def sum_over_ranks(self, sample: Tensor) -> Tensor:
        """Return a covariance of gradients, summed over the process group.

        So all ranks project on the same directions: those of the whole batch.

        Args:
            sample: Of one rank; it may be changed.
        """
        group = self._group_in_use(sample.device)
        if group is not None:
            sample = sample.contiguous()
            dist.all_reduce(sample, group=group)
        return sample

    def is_shared_by(self, group: Any) -> bool:
        """Whether the ranks of ``group``, and no others, select together."""
        mine = None if self._group is None else self._group()
        of_mine = dist.get_process_group_ranks(dist.group.WORLD if mine is None else mine)
        return of_mine == dist.get_process_group_ranks(group)

    def _group_in_use(self, device: torch.device) -> Any:
        """Return the group to reduce over, or None where there is nobody to agree with."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        if self._group is None:
            return _own_group(device)
        group = self._group()
        if group is None:
            raise RuntimeError(
                "the process group given as sync_selection is gone (destroyed, or left behind by "
                "a pickle): convert the model again with one of this run"
            )
        return group if group.size() > 1 else None

    def __deepcopy__(self, memo: dict[int, Any]) -> SynchronizedScores:
        twin = type(self)(copy.deepcopy(self.local, memo))
        twin._group = self._group
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        # Process groups do not pickle. Our own is made again; in place of a given one stands a
        # group that is gone: all ranks would be another choice of channels, and not said.
        return _unpickle, (self.local, self._group is not None)


def _unpickle(local: ScoreFn, had_group: bool) -> SynchronizedScores:
    scores = SynchronizedScores(local)
    if had_group:
        scores._group = _nothing
    return scores


def _nothing() -> None:
    """Stand for a weak reference to what is gone."""


#: For each default group (a process may have one after the other) a weak reference to our own.
_own_groups: WeakKeyDictionary[Any, ref[Any]] = WeakKeyDictionary()


def _own_group(device: torch.device) -> Any:
    world = dist.group.WORLD
    made = _own_groups.get(world)
    group = None if made is None else made()
    if group is None:
        # A rank waits for another here first: as patiently as its default group would.
        group = dist.new_group(timeout=timeout_of(world, device), group_desc="ssprop_patch")
        _own_groups[world] = ref(group)
    return group


def _agree_on_seed(scores: RandomScores, device: torch.device, group: Any) -> None:
    """Give all ranks of ``group`` the sequence of its first."""
    # A draw depends on the seed modulo 2**63 alone, and more would not fit.
    state = torch.tensor([scores.seed % 2**63, scores.draws], device=device)
    dist.broadcast(state, dist.get_global_rank(group, 0), group=group)
    seed, draws = state.tolist()
    if (seed, draws) != (scores.seed % 2**63, scores.draws):
        scores.seed, scores.draws = seed, draws
