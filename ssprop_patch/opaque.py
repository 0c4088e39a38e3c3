"""The sparse backward as one opaque operator, for torch.compile.

What the operator goes by reaches it in two small tensors on the CPU: the drop rate, and a token
that stands for the settings of a layer. To a compiled graph they are inputs, of which it guards no
value, so that one graph serves every rate, layer, model and conversion; and they go from a forward
to its backward with whatever else that needs, so that a backward computes what its forward
recorded, however late it runs.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from . import backward
from .backward import Record
from .kept import ConvParams, Grads
from .selection import ScoreFn, kept_channels, selectable_channels


@dataclass(frozen=True, eq=False)
class Settings:
    """What one layer goes by, but for the rate that changes.

    Attributes:
        score_fn: Scores the channels.
        override: The layer's own rate whenever the model's is above 0.
        align: The number of kept channels is rounded up to a multiple of it.
        record: Is told of each call.
    """

    score_fn: ScoreFn
    override: float | None = None
    align: int = 1
    record: Record | None = None

    def drop_rate(self, rate: float) -> float:
        """Return the rate of the layer where that of the model is ``rate``."""
        return rate if self.override is None or rate == 0.0 else self.override

    def kept(self, channels: int, rate: float) -> int:
        """Return how many of ``channels``, those of one choice, are kept."""
        return kept_channels(channels, self.drop_rate(rate), self.align)


# Where this module is reloaded, tokens and operators of before stay good: graphs hold them.
_before = dict(globals())
_settings: WeakValueDictionary[int, Settings] = _before.get("_settings", WeakValueDictionary())
_count = _before.get("_count", itertools.count())


def token_of(settings: Settings) -> Tensor:
    """Return a new tensor that stands for ``settings`` in this process, and keeps them alive.

    They live as long as the tensor does, in Python or in what autograd saved.
    """
    number = next(_count)
    _settings[number] = settings
    token = _tensor("q", number, torch.int64)
    token.ssprop_settings = settings
    return token


def rate_tensor(rate: float) -> Tensor:
    """Return a new tensor that holds ``rate``."""
    if torch.compiler.is_compiling():  # ``with sparsity(...)`` in compiled code
        return torch.tensor([rate], dtype=torch.float64, device="cpu")
    return _tensor("d", rate, torch.float64)


def _tensor(typecode: str, value: float, dtype: torch.dtype) -> Tensor:
    # A real tensor, on the CPU, that autograd can save, wherever the rate changes: under
    # inference_mode, a FakeTensorMode or a default device.
    with torch.inference_mode(False):
        return torch.frombuffer(array(typecode, [value]), dtype=dtype)


def _never_alone(function: Callable[..., Any]) -> None:
    """Keep Dynamo from compiling a call of ``function`` that is not part of a larger graph.

    So a compiled optimizer step would call it, by its hook, and make one graph for each rate.
    """
    frames = torch._C._dynamo.eval_frame
    if hasattr(frames, "skip_code"):  # torch 2.6
        frames.skip_code(function.__code__)
    elif hasattr(frames, "set_code_exec_strategy"):
        action = frames._FrameAction
        strategy = frames._FrameExecStrategy(action.SKIP, action.DEFAULT)
        frames.set_code_exec_strategy(function.__code__, strategy)


_never_alone(rate_tensor)
_never_alone(_tensor)


def settings_of(token: Tensor) -> Settings:
    """Return what ``token`` stands for.

    Raises:
        RuntimeError: If it is gone: all that is left of the token is a copy.
    """
    found = _settings.get(int(token))
    if found is None:
        raise RuntimeError(
            "a compiled backward ran after its layers were reverted or converted again, and the "
            "tensors that its forward saved were copied meanwhile (by saved_tensors_hooks, such as "
            "save_on_cpu(pin_memory=True)): run it before"
        )
    return found


def kept(channels: int, rate: Tensor, token: Tensor) -> int:
    """Return how many of ``channels``, those of one choice, are kept."""
    return settings_of(token).kept(channels, float(rate))


def _new_library() -> torch.library.Library:
    """Return a library with a name of its own: another import of the package may have the first."""
    for number in range(1, 10_000):
        name = "ssprop_patch" if number == 1 else f"ssprop_patch_{number}"
        try:
            return torch.library.Library(name, "DEF")
        except RuntimeError as error:
            if "single TORCH_LIBRARY" not in str(error):
                raise
    raise RuntimeError("ssprop_patch was imported too often in one process")


_libraries: list[torch.library.Library] = _before.get("_libraries", [])
_lib = _new_library()
_libraries.append(_lib)


# - cudagraph_unsafe: a CUDA graph would replay the rate that it was recorded with.
# - needs_fixed_stride_order: Inductor lays convolutions out in channels_last, and the backward
#   takes what it is given. By default it gets copies in the format of eager mode, which cost more
#   than is saved.
# (The first of these tags is not in torch 2.6.)
_TAGS = tuple(
    getattr(torch.Tag, name)
    for name in ("pt2_compliant_tag", "cudagraph_unsafe", "needs_fixed_stride_order")
    if hasattr(torch.Tag, name)
)


def _define(schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an operator and return it."""
    name = schema.partition("(")[0]
    _lib.define(schema, tags=_TAGS)
    _lib.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_lib.ns}::{name}", fake, lib=_lib)
    return getattr(getattr(torch.ops, _lib.ns), name)


def _conv_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
    output_padding: list[int],
    rate: Tensor,
    token: Tensor,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    settings = settings_of(token)
    params = ConvParams(
        tuple(stride), tuple(padding), tuple(dilation), groups, transposed, tuple(output_padding)
    )
    channels = selectable_channels(params.out_channels(w), groups)
    k = settings.kept(channels, float(rate))
    _record_forward(settings.record, x, w, dy)
    grads = backward.sparse_backward(
        dy, x, w, params, k, settings.score_fn, tuple(mask), settings.record
    )
    return _promised(grads, x, w)


def _conv_backward_fake(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
    output_padding: list[int],
    rate: Tensor,
    token: Tensor,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _shapes(x, w, dy.shape[1], mask)


def _linear_backward(
    dy: Tensor, x: Tensor, w: Tensor, rate: Tensor, token: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    settings = settings_of(token)
    k = settings.kept(w.shape[0], float(rate))
    _record_forward(settings.record, x, w, dy)
    grads = backward.linear_backward(
        dy, x, w, k, settings.score_fn, tuple(mask), settings.record
    )
    dx = x if grads[0] is None else grads[0]  # contiguous, whatever the strides of x
    return _promised(grads, dx, w)


def _linear_backward_fake(
    dy: Tensor, x: Tensor, w: Tensor, rate: Tensor, token: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return _shapes(x.new_empty(x.shape) if mask[0] else x, w, w.shape[0], mask)


def _record_forward(record: Record | None, x: Tensor, w: Tensor, dy: Tensor) -> None:
    # Of a compiled layer only the backward is seen to run: it had one forward.
    if record is not None:
        record.forward(x, w, dy)


def _shapes(
    x: Tensor, w: Tensor, channels: int, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    # An operator cannot return None: what is not needed is an empty tensor.
    dx = torch.empty_like(x) if mask[0] else x.new_empty(0)
    dw = torch.empty_like(w) if mask[1] else w.new_empty(0)
    db = w.new_empty(channels) if mask[2] else w.new_empty(0)
    return dx, dw, db


def _promised(grads: Grads, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``grads`` with the shapes and strides that :func:`_shapes` tells the compiler."""
    like = (x, w, w.new_empty(0) if grads[2] is None else grads[2])
    return tuple(
        t.new_empty(0) if g is None else _restride(g, t) for g, t in zip(grads, like, strict=True)
    )


def _restride(grad: Tensor, like: Tensor) -> Tensor:
    return grad if grad.stride() == like.stride() else torch.empty_like(like).copy_(grad)


conv_backward = _define(
    "conv_backward(Tensor dy, Tensor x, Tensor w, int[] stride, int[] padding, int[] dilation, "
    "int groups, bool transposed, int[] output_padding, Tensor rate, Tensor token, bool[] mask) "
    "-> (Tensor, Tensor, Tensor)",
    _conv_backward,
    _conv_backward_fake,
)
linear_backward = _define(
    "linear_backward(Tensor dy, Tensor x, Tensor w, Tensor rate, Tensor token, bool[] mask) "
    "-> (Tensor, Tensor, Tensor)",
    _linear_backward,
    _linear_backward_fake,
)
