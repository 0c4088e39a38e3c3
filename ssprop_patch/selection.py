"""Which output channels a sparse backward keeps: their scores, their number, their indices.

Nothing here waits for the device: the number of kept channels comes from the drop rate on the
host, the indices stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .deferred import NormGradient
from .native.tensors import check_memory
from .passes import channel_sum, largest, largest_channels

#: Takes the gradient of a layer's output, shape (N, C_out, *spatial), (rows, features) for a
#: linear layer, and returns one score per output channel, shape (C_out,). The channels with the
#: largest scores are kept.
ScoreFn = Callable[[Tensor], Tensor]
Selection = Literal["l1", "l2", "random"] | ScoreFn


def selectable_channels(out_channels: int, groups: int) -> int:
    """Return how many channels one choice is made from.

    All ``out_channels`` of an ordinary or a depthwise convolution; the channels of one group of a
    grouped one, where the same number is chosen inside each group.
    """
    return out_channels if groups in (1, out_channels) else out_channels // groups


def kept_channels(channels: int, drop_rate: float, align: int = 1) -> int:
    """Return ``k = max(1, int((1 - drop_rate) * channels + 0.5))``, rounded up to ``align``.

    Args:
        channels: Channels to choose from, see :func:`selectable_channels`.
        drop_rate: Fraction of them whose gradient is dropped, in [0, 1).
        align: k is rounded up to a multiple of it, but to no more than ``channels``.
    """
    k = max(1, int((1.0 - drop_rate) * channels + 0.5))
    return k if align == 1 else min(channels, -(-k // align) * align)


def l1_scores(dy: Tensor) -> Tensor:
    """Sum of ``|dy|`` of each channel: the order of the mean in ssProp (arXiv 2408.12561)."""
    return _sum_of_powers(dy, 1)


def l2_scores(dy: Tensor) -> Tensor:
    """Euclidean norm of ``dy`` of each channel."""
    return _sum_of_powers(dy, 2).sqrt()


def _sum_of_powers(dy: Tensor, order: int) -> Tensor:
    if isinstance(dy, NormGradient) and dy.order == order:
        return dy.sum_of_powers()
    return channel_sum(dy, order)


def random_scores(dy: Tensor) -> Tensor:
    """Random scores from torch's default generator of the device, as dropout draws."""
    return torch.rand(dy.shape[1], device=dy.device)


class RandomScores:
    """Random scores from a generator of their own: the paper's ablation, repeatable.

    Each draw is a function of ``(seed, draws)`` alone, so that two integers in a checkpoint
    continue the sequence exactly, on any device of the same kind, and torch's default generators
    are left alone.

    Args:
        seed: Start of the sequence. Default: torch's initial seed, so that
            ``torch.manual_seed`` before conversion makes a run repeatable.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = torch.initial_seed() if seed is None else int(seed)
        self.draws = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, dy: Tensor) -> Tensor:
        generator = self._generators.get(dy.device)
        if generator is None:
            generator = self._generators[dy.device] = torch.Generator(dy.device)
        # An odd multiplier keeps neighbouring (seed, draws) pairs apart in the 64-bit seed space.
        mixed = (self.seed * 0x9E3779B97F4A7C15 + self.draws * 0xD1B54A32D192ED03) % 2**63
        generator.manual_seed(mixed)
        self.draws += 1
        return torch.rand(dy.shape[1], device=dy.device, generator=generator)

    def __getstate__(self) -> dict[str, int]:
        return {"seed": self.seed, "draws": self.draws}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__dict__.update(state, _generators={})


_BY_NAME: dict[str, ScoreFn] = {"l1": l1_scores, "l2": l2_scores, "random": random_scores}


def resolve_selection(selection: Selection) -> ScoreFn:
    """Return the function behind a ``selection`` argument.

    Raises:
        ValueError: If it is a name that does not exist.
        TypeError: If it is neither a name nor callable.
    """
    if isinstance(selection, str):
        if selection not in _BY_NAME:
            raise ValueError(
                f"selection must be one of {sorted(_BY_NAME)} or a callable, got {selection!r}"
            )
        return _BY_NAME[selection]
    if callable(selection):
        return selection
    raise TypeError(
        f"selection must be a name ({', '.join(sorted(_BY_NAME))}) or a callable that takes the "
        f"output gradient and returns one score per channel, got {type(selection).__name__}"
    )


def deferred_order(score_fn: ScoreFn) -> int | None:
    """Return 1 (l1) or 2 (l2) if ``score_fn`` scores a gradient that batch norm has yet to form."""
    local = getattr(score_fn, "local", score_fn)  # of the scores of all ranks: of one rank
    return order_of(local)


def order_of(score_fn: ScoreFn) -> int | None:
    """Return 1 (l1) or 2 (l2) if the scores are in the order of the sums of such powers."""
    return 1 if score_fn is l1_scores else 2 if score_fn is l2_scores else None


def select_channels(dy: Tensor, k: int, groups: int, score_fn: ScoreFn) -> Tensor:
    """Return the indices of the kept output channels, ascending.

    Args:
        dy: Gradient of the output, shape (N, C_out, *spatial).
        k: Channels to keep of each choice, see :func:`selectable_channels`.
        groups: Groups of the convolution.
        score_fn: Gives the scores.

    Returns:
        int64, on ``dy``'s device: shape (k,), or (groups * k,) where the choice is made inside
        each group: group after group, so that the kept channels still form ``groups`` equal ones.

    Raises:
        ValueError: If ``score_fn`` does not return one score per channel, on ``dy``'s device.
        TypeError: If the scores have no order, or are a tensor of another kind.
    """
    channels = dy.shape[1]
    parts = 1 if groups == channels else groups
    order = order_of(score_fn)
    if order is not None:
        index = largest_channels(dy, order, k, parts)
        if index is not None:
            return index
    if not torch.compiler.is_compiling():
        if dy.layout is not torch.strided:
            raise RuntimeError(
                f"the sparse backward takes gradients in ordinary tensors, got {dy.layout}"
            )
        check_memory(dy)
    if not torch.is_grad_enabled():
        scores = score_fn(dy)
    else:  # a derivative of this backward is asked for: the choice has none
        with torch.no_grad():
            scores = score_fn(dy.detach())
    if not isinstance(scores, Tensor) or scores.shape != (channels,):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"selection must return one score per output channel, a tensor of shape "
            f"({channels},) for a gradient of shape {tuple(dy.shape)}; got {got}"
        )
    if not torch.compiler.is_compiling():
        scores = _comparable(scores, dy)
    return largest(scores, k, parts)


def _comparable(scores: Tensor, dy: Tensor) -> Tensor:
    """Return scores that a function returned as an ordinary tensor, or say what is wrong."""
    if scores.device != dy.device:
        raise ValueError(
            f"selection must return scores on the device of the gradient, {dy.device}, got "
            f"{scores.device}"
        )
    if scores.is_complex() or scores.layout is not torch.strided or scores.is_quantized:
        raise TypeError(
            "selection must return real numbers in an ordinary tensor, got "
            f"{scores.dtype}, {scores.layout}"
        )
    if type(dy) is not Tensor or type(scores) in (Tensor, torch.nn.Parameter):
        return scores
    if type(scores).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # no memory of its own
        raise TypeError(f"selection must return an ordinary tensor, got a {type(scores).__name__}")
    return scores.as_subclass(Tensor)
