"""What a layer goes by, and how that reaches a compiled graph: in two small tensors on the CPU.

One holds the drop rate, the other, a token, stands for the settings of a layer. To a compiled graph
they are inputs whose values it does not guard on, so that one graph serves every rate, layer, model
and conversion; and they go from a forward to its backward with whatever else that needs, so that a
backward computes what its forward recorded, however late it runs.
"""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .._torch_compat import never_compile_alone
from ..core.rule import BackwardRule
from ..core.selection import kept_channels
from .call_observer import CallObserver


@dataclass(frozen=True, eq=False)
class LayerSettings:
    """What one layer goes by, but for the rate that changes.

    Attributes:
        rule: What of the gradient goes back.
        override: The layer's own rate whenever the model's is above 0.
        align: The number of kept channels is rounded up to a multiple of it.
        observer: Gets a report of each call.
    """

    rule: BackwardRule
    override: float | None = None
    align: int = 1
    observer: CallObserver | None = None

    def drop_rate(self, rate: float) -> float:
        """Return the rate of the layer where that of the model is ``rate``."""
        return rate if self.override is None or rate == 0.0 else self.override

    def kept(self, channels: int, rate: float) -> int:
        """Return how many of ``channels``, those of one choice, are kept."""
        return kept_channels(channels, self.drop_rate(rate), self.align)


# Where this module is reloaded, tokens and operators of before stay good: graphs hold them.
_before = dict(globals())
_settings: WeakValueDictionary[int, LayerSettings] = _before.get("_settings", WeakValueDictionary())
_count = _before.get("_count", itertools.count())


def token_of(settings: LayerSettings) -> Tensor:
    """Return a new tensor that stands for ``settings`` in this process, and keeps them alive.

    They live as long as the tensor does, in Python or in what autograd saved.
    """
    number = next(_count)
    _settings[number] = settings
    token = _tensor("q", number, torch.int64)
    token.ssprop_settings = settings  # type: ignore[attr-defined]  # to keep it alive
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


never_compile_alone(rate_tensor)
never_compile_alone(_tensor)


def settings_of(token: Tensor) -> LayerSettings:
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
