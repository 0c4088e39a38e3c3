"""Which output channels a sparse backward keeps: their scores, their number, their indices.

Nothing here waits for the device: the number of kept channels comes from the drop rate on the
host, the indices stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

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


def topk_indices(scores: Tensor, k: int, choices: int = 1) -> Tensor:
    """Return the indices of the ``k`` largest scores of each choice, ascending.

    Unlike ``torch.topk``, which takes any of several equal scores, this takes the first ones. A nan
    counts as larger than every number.

    Args:
        scores: (C,), those of each choice next to each other.
        k: At most ``C / choices``.
        choices: A divisor of C.

    Returns:
        int64, (choices * k,), on the device of ``scores``.

    Raises:
        ValueError: If ``k`` or ``choices`` is not as described.
    """
    check_topk(k, scores.shape[0], choices)
    # A stable sort puts nan before inf and takes -0.0 for 0.0.
    if choices == 1:
        return scores.sort(descending=True, stable=True).indices[:k].sort().values
    size = scores.shape[0] // choices
    ranked = scores.reshape(choices, size).sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(0, scores.shape[0], size, device=scores.device)
    return (ranked[:, :k].sort(dim=1).values + first.unsqueeze(1)).flatten()


def check_topk(k: int, channels: int, choices: int) -> None:
    """Raise an error if ``k`` channels cannot be chosen in each of ``choices`` equal parts.

    Raises:
        ValueError: If they cannot.
    """
    if choices < 1 or channels % choices or not 0 < k <= channels // choices:
        raise ValueError(f"cannot choose {k} channels in each of {choices} groups of {channels}")


# --- scores -----------------------------------------------------------------------------------


def l1_scores(dy: Tensor) -> Tensor:
    """Sum of ``|dy|`` of each channel: the order of the mean in ssProp (arXiv 2408.12561)."""
    return _norm(dy, 1)


def l2_scores(dy: Tensor) -> Tensor:
    """Euclidean norm of ``dy`` of each channel."""
    return _norm(dy, 2)


def _norm(dy: Tensor, order: int) -> Tensor:
    # Half precision would tie channels that differ (8 bits in bfloat16) and overflow (float16).
    dtype = torch.float32 if dy.dtype in (torch.float16, torch.bfloat16) else dy.dtype
    return torch.linalg.vector_norm(dy, order, [0, *range(2, dy.dim())], dtype=dtype)


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


def random_scores(dy: Tensor) -> Tensor:
    """Random scores from torch's default generator of the device, as dropout draws."""
    return torch.rand(dy.shape[1], device=dy.device)


_BY_NAME: dict[str, ScoreFn] = {"l1": l1_scores, "l2": l2_scores, "random": random_scores}
_NAMES = (*_BY_NAME, "ahead", "principal")  # the others do more than to score channels


def resolve_selection(selection: Selection) -> ScoreFn:
    """Return the function that a ``selection`` argument means.

    Raises:
        ValueError: If it is a name that does not exist.
        TypeError: If it is neither a name nor callable.
    """
    if isinstance(selection, str):
        if selection not in _BY_NAME:
            raise ValueError(
                f"selection must be one of {sorted(_NAMES)} or a callable, got {selection!r}"
            )
        return _BY_NAME[selection]
    if callable(selection):
        return selection
    raise TypeError(
        f"selection must be a name ({', '.join(sorted(_NAMES))}), a Principal, an Ahead or "
        "a callable that takes the output gradient and returns one score per channel, got "
        f"{type(selection).__name__}"
    )


def check_scores(scores: Tensor, dy: Tensor) -> Tensor:
    """Return what a selection returned for ``dy``, or raise an error that says what is wrong.

    Raises:
        ValueError: If it is not one score per channel, on the device of ``dy``.
        TypeError: If the scores have no order, or are a tensor of another kind.
    """
    channels = dy.shape[1]
    if not isinstance(scores, Tensor) or scores.shape != (channels,):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"selection must return one score per output channel, a tensor of shape "
            f"({channels},) for a gradient of shape {tuple(dy.shape)}; got {got}"
        )
    if torch.compiler.is_compiling():
        return scores
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
