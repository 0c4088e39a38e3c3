"""Which algorithms compute each sparse backward: by rule, or by a measurement at its first use.

The gradient is the same either way, but for rounding. The rules are made from timings of a few
machines, and convolution kernels differ between machines and versions by factors. So they may be
timed where they run, as cuDNN does with ``torch.backends.cudnn.benchmark``::

    ssprop_patch.kernels.benchmark = True    # each shape is timed when it first occurs
    ...
    print(ssprop_patch.kernels.table())      # what was chosen
    ssprop_patch.kernels.save("kernels.json")

``load("kernels.json")`` uses a former choice without measuring, so that two runs add up the same
numbers in the same order. Nothing is measured under ``torch.use_deterministic_algorithms(True)``.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._device import device_name, waiter
from .._files import write_atomically
from .._text import columns, sizes
from ..core.geometry import ConvParams
from . import native
from .algorithms import CHOOSING, DW, DX, Algorithms, candidates, is_legal
from .channel_gradients import KeptChannels
from .channel_ops import is_channels_last
from .heuristics import by_rule, when_traced

__all__ = [
    "Choice",
    "backends",
    "benchmark",
    "choices",
    "clear",
    "load",
    "save",
    "table",
]

#: Whether algorithms are timed at the first use of a shape. Off, as in cuDNN: choices that differ
#: from run to run round differently, and inputs whose shapes never repeat would always be timed.
benchmark: bool = False

# This many input shapes are timed for one layer's weight; the rules choose for the rest.
_MOST_SHAPES = 16
_REPEATS = 3
# An algorithm must be this much faster than the rule's: less is noise, and caches are warmer here.
_CLEARLY = 0.9


@dataclass(frozen=True)
class Choice:
    """What was measured for one backward.

    Attributes:
        device, threads, torch: Where: the processor's name, threads, torch's version.
        dtype: Of the input.
        channels_last: Whether the input is.
        input_shape, weight_shape: Shapes.
        geometry: stride, padding, dilation, groups.
        kept: Output channels that are kept.
        needs: Of ``"x"`` and ``"w"``, whose gradient is needed.
        dx, dw: The algorithms chosen, see :mod:`ssprop_patch.ops.algorithms`.
        ms: Milliseconds of each algorithm that was timed, by ``"dx gather"``, ``"dw mask"``, ...
    """

    device: str
    threads: int
    torch: str
    dtype: str
    channels_last: bool
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
    kept: int
    needs: str
    dx: str
    dw: str
    ms: dict[str, float]


_Key = tuple[Any, ...]
_chosen: dict[_Key, Choice] = {}
_shapes_timed: dict[_Key, int] = {}


def choose(kept: KeptChannels, need_x: bool, need_w: bool) -> Algorithms:
    """Return how to compute dX and dW: as measured or loaded, else by rule."""
    if torch.compiler.is_compiling():  # first: what follows must not become a guard
        return when_traced(kept.whole_w, kept.p)
    if (benchmark or _chosen) and not kept.p.transposed:
        key = _key(kept, need_x, need_w)
        choice = _chosen.get(key)
        if choice is None and _may_measure(kept.whole_x, key):
            choice = _chosen[key] = _measure(kept, need_x, need_w, key)
        if choice is not None:
            return Algorithms(choice.dx, choice.dw)
    return by_rule(kept)


def backends() -> dict[str, str]:
    """Return which backends are on, and why others are off.

    Compiles the C functions if that has not been tried yet, which takes a few seconds.

    Returns:
        Of each backend beside torch's own operations, by its name, ``"on"`` or ``"off: "`` and the
        reason, such as ``{"C functions": "on", "Triton kernels": "off: no CUDA device"}``.
    """
    from . import triton_kernels  # not needed for anything else here

    reasons = {
        "C functions": native.why_unavailable(),
        "Triton kernels": triton_kernels.why_unavailable(),
    }
    return {name: "on" if why is None else f"off: {why}" for name, why in reasons.items()}


# --- measuring ----------------------------------------------------------------------------------


def _key(kept: KeptChannels, need_x: bool, need_w: bool) -> _Key:
    x, w, p = kept.whole_x, kept.whole_w, kept.p
    return (
        _device_name(x.device),
        torch.get_num_threads(),
        torch.__version__,
        str(x.dtype),
        is_channels_last(x),
        tuple(x.shape),
        tuple(w.shape),
        (p.stride, p.padding, p.dilation, p.groups),
        kept.number,
        "x" * need_x + "w" * need_w,
    )


_device_name = functools.cache(device_name)


def _may_measure(x: Tensor, key: _Key) -> bool:
    if not benchmark or torch.are_deterministic_algorithms_enabled():
        return False
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    if x.is_cpu and native.are_compiling():  # the choice is kept, and they may be the fastest
        return False
    layer = (*key[:5], *key[6:])
    _shapes_timed[layer] = _shapes_timed.get(layer, 0) + 1
    return _shapes_timed[layer] <= _MOST_SHAPES


@torch.no_grad()
def _measure(kept: KeptChannels, need_x: bool, need_w: bool, key: _Key) -> Choice:
    wait = waiter(kept.whole_x.device)

    def milliseconds(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(1 + _REPEATS):  # the first one takes memory and makes kernels
            wait()
            start = time.perf_counter()
            run()
            wait()
            times.append(time.perf_counter() - start)
        return 1e3 * min(times[1:])

    def unchosen() -> KeptChannels:
        return KeptChannels(
            kept.whole_dy, kept.whole_x, kept.whole_w, kept.p, kept.k, kept.score_fn
        )

    def fresh() -> KeptChannels:
        other = unchosen()
        other.index = kept.index
        return other

    def choose_and_run(way: Callable[..., Any]) -> None:
        way(unchosen(), (need_x, need_w, False))

    ms: dict[str, float] = {}
    names_x, names_w = candidates(kept.whole_x, kept.whole_w, kept.p)
    # What several of them read is made once in a backward, so it is timed apart; some make it all
    # by themselves, and are timed whole.
    made, whole = {"index": 0.0}, {}
    if kept.order is not None:
        made["index"] = milliseconds(lambda: unchosen().index)
        for name in CHOOSING.keys() & set(names_x):
            whole[name] = milliseconds(partial(choose_and_run, CHOOSING[name]))
    made["dy"] = milliseconds(lambda: fresh().dy)
    if kept.p.groups > 1:
        made["masked_dy"] = milliseconds(lambda: fresh().masked_dy)
    for name in names_x if need_x else ():
        ms[f"dx {name}"] = milliseconds(partial(DX[name], kept))
    for name in names_w if need_w else ():
        ms[f"dw {name}"] = milliseconds(partial(DW[name], kept))

    def total(chosen: Algorithms) -> float:
        if chosen.dx == chosen.dw and chosen.dx in whole:
            return whole[chosen.dx]
        parts = [f"dx {chosen.dx}"] * need_x + [f"dw {chosen.dw}"] * need_w
        reads = {"masked_dy" if "mask" in part else "dy" for part in parts}
        return sum(ms[part] for part in parts) + sum(made[read] for read in reads | {"index"})

    best = min((Algorithms(dx, dw) for dx in names_x for dw in names_w), key=total)
    rule = by_rule(kept)
    if total(best) > _CLEARLY * total(rule):
        best = rule
    rounded = {name: round(value, 4) for name, value in ms.items()}
    measured = (*key, best.dx, best.dw, rounded)
    return Choice(*measured)


# --- remembered, printed, saved -----------------------------------------------------------------


def choices() -> list[Choice]:
    """Return what was measured or loaded, in that order."""
    return list(_chosen.values())


def clear() -> None:
    """Forget all choices; with :data:`benchmark` each shape is measured again."""
    _chosen.clear()
    _shapes_timed.clear()


def table() -> str:
    """Return the choices as a table, with milliseconds of what was chosen and of ``gather``."""
    rows = [
        (
            sizes(c.input_shape),
            sizes(c.weight_shape),
            str(c.geometry[3]),
            "channels_last" if c.channels_last else "contiguous",
            c.dtype.removeprefix("torch."),
            str(c.kept),
            *(
                f"{way} {c.ms[f'{part} {way}']:.3f} ({c.ms[f'{part} gather']:.3f})"
                if f"{part} {way}" in c.ms
                else "-"
                for part, way in (("dx", c.dx), ("dw", c.dw))
            ),
        )
        for c in _chosen.values()
    ]
    head = (
        "input",
        "weight",
        "groups",
        "format",
        "dtype",
        "kept",
        "dX ms (gather)",
        "dW ms (gather)",
    )
    return "\n".join(columns([head, *rows], optional=(4, 2), wrapped=2))


def save(path: str | PathLike[str]) -> None:
    """Write all choices to a JSON file; one that is there is replaced at once."""
    write_atomically(path, json.dumps([asdict(c) for c in _chosen.values()], indent=1) + "\n")


def load(path: str | PathLike[str]) -> int:
    """Use the choices of a file that :func:`save` wrote.

    Those of other processors, other numbers of threads or another torch are kept but not used.

    Args:
        path: The file.

    Returns:
        How many of them are for this processor, these threads and this torch.

    Raises:
        ValueError: If the file is not such a one; nothing is loaded then.
    """
    try:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, list):
            raise ValueError(f"a {type(content).__name__}, not a list")
        loaded = [_from_json(entry) for entry in content]
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no choices of kernels as ssprop_patch.kernels.save writes them: {error}"
        ) from error
    _chosen.update((tuple(vars(choice).values())[:10], choice) for choice in loaded)
    names = {_device_name(torch.device("cpu"))}
    if torch.cuda.is_available():
        names |= {_device_name(torch.device("cuda", i)) for i in range(torch.cuda.device_count())}
    return sum(
        c.device in names and c.torch == torch.__version__ and c.threads == torch.get_num_threads()
        for c in loaded
    )


def _from_json(entry: dict[str, Any]) -> Choice:
    def as_tuple(value: Any) -> Any:
        return tuple(map(as_tuple, value)) if isinstance(value, list) else value

    choice = Choice(**{name: as_tuple(value) for name, value in entry.items()})
    if choice.dx not in DX or choice.dw not in DW:
        raise ValueError(f"there is no algorithm {choice.dx!r}, {choice.dw!r}")
    layer = choice.input_shape, choice.weight_shape, ConvParams(*choice.geometry)
    for way in (choice.dx, choice.dw):
        if not is_legal(way, *layer, choice.channels_last):
            raise ValueError(f"the algorithm {way!r} cannot compute the gradients of {choice}")
    return choice
