"""The principal subspace: ``dy`` goes back along its ``k`` leading directions over channels.

The directions are kept from step to step, together with the covariance that they come from, and
refreshed now and then. There are two sides to project on:

* *output* (as a rule): the directions U, (C_out, k), of dy. With ``z = U'dy``, dX is that of z
  through U'W, and dW is U times that of z.
* *input*, for layers with many more output channels than inputs, where that would cost more than
  it saves: the directions V, (C_in, k), of dX and T, (n, k), of the weight gradient, where
  n = C_in / groups * taps. ``dX = V (WV)'dy`` and ``dW = (dy (T'x)') T'``.

Each group of a grouped convolution has directions of its own. A depthwise one has no channels to
combine.

GaLore and PowerSGD project finished gradients (to save memory, and traffic); this projects ahead of
the products, so that they shrink.
"""

from __future__ import annotations

import numbers
import threading
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .._torch_compat import current_graph_task_id
from .._validate import check_count

Side = Literal["output", "input"]

# The directions turn fastest at the beginning.
_EARLY = (0, 1, 2, 4, 8, 12)
# Of larger covariances the directions are followed by subspace iteration, of smaller ones eigh is
# as fast.
_EIGH_UP_TO = 128
_FIRST_ITERATIONS, _ITERATIONS = 6, 1


@dataclass(frozen=True)
class Principal:
    """``selection="principal"`` with other settings.

    Args:
        refresh_interval: Backward passes between two refreshes of the directions, after the first
            20 (which have more: at 0, 1, 2, 4, 8 and 12).
        momentum: Share of the covariance so far that a refresh keeps, in [0, 1).
        energy: With a number in (0, 1], each layer projects on the smallest number of directions
            that hold this share of the gradient's energy, if that is more than the drop rate
            leaves: the schedule's rate is then an upper bound. Waits for the device at refreshes.

    Raises:
        TypeError, ValueError: If an argument is not as described.
    """

    refresh_interval: int = 20
    momentum: float = 0.5
    energy: float | None = None

    def __post_init__(self) -> None:
        check_count(self.refresh_interval, "refresh_interval", 1)
        for name, value in (("momentum", self.momentum), ("energy", self.energy or 1.0)):
            if not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum!r}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy must be None or in (0, 1], got {self.energy!r}")

    def refreshes_at(self, number: int) -> bool:
        """Whether the backward pass of this number, from 0 on, refreshes the directions."""
        if number < _EARLY[-1] + 1 < self.refresh_interval:
            return number in _EARLY
        return number % self.refresh_interval == 0 or number in _EARLY


def projected_share(c_out: int, n: float, side: Side, kept: float, positions: float) -> float:
    """Return the cost of the projected products as a share of the dense ones.

    Args:
        c_out: Output channels of one group.
        n: Multiply-adds of one of them at one position.
        side: The side.
        kept: Directions as a share of all.
        positions: Of all samples of the output: of few, turning the weights is not little work.
    """
    if side == "output":
        return kept * (1 + c_out / (2 * n) + c_out / positions)
    return kept * (1 + n / c_out + n / positions)


def cheaper_side(c_out: int, n: float, transposed: bool = False) -> Side:
    """Return the side on which a projection costs less."""
    if transposed:  # whose rows of the weight belong to inputs
        return "output"
    return "output" if c_out / (2 * n) <= n / c_out else "input"


class Basis:
    """Directions of one kind of a layer's vectors, each group's for itself.

    Attributes:
        covariance: Each divided by its trace, the mean over refreshes, (groups, d, d).
        vectors: Orthonormal columns, (groups, d, k).
    """

    def __init__(self) -> None:
        self.covariance: Tensor | None = None
        self.vectors: Tensor | None = None
        self._asked = 0  # for how many vectors; energy may have made it more
        self._before: Tensor | None = None  # the covariance when the present pass began
        self._sum: Tensor | None = None  # of what this pass brought

    def begin_pass(self) -> None:
        """From now on another backward pass brings its samples."""
        self._before, self._sum = self.covariance, None

    def add(self, sample: Tensor, momentum: float) -> None:
        """Take in the covariance of one call, (groups, d, d); those of one pass are summed.

        One that is not finite, or zero, changes nothing.
        """
        self._sum = total = sample if self._sum is None else self._sum + sample
        trace = total.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1)
        before = self._before
        if before is None:
            before, momentum = torch.zeros_like(total), 0.0
        mixed = momentum * before + (1 - momentum) * (total / trace)
        self.covariance = torch.where(torch.isfinite(trace) & (trace > 0), mixed, before)

    def turn(self, k: int, energy: float | None, warm: bool = False) -> None:
        """Compute the directions from the covariance.

        Args:
            k: How many.
            energy: As of :class:`Principal`.
            warm: Whether the present ones are near enough to begin with. The first ones may be of a
                gradient that was zero, as behind norms that begin with a scale of zero.
        """
        assert self.covariance is not None
        self.vectors = _leading(self.covariance, k, energy, self.vectors if warm else None)
        self._asked = k

    def fits(self, k: int) -> bool:
        """Whether there are directions for a layer that asks for ``k``."""
        return self.vectors is not None and self._asked == k

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors, and what the directions were asked for."""
        return {"covariance": self.covariance, "vectors": self.vectors, "asked": self._asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with this state, of which nothing is shared."""
        self.covariance, self.vectors = (
            None if state[name] is None else state[name].detach().clone()
            for name in ("covariance", "vectors")
        )
        self._asked = int(state["asked"])
        self._before, self._sum = self.covariance, None

    def to(self, device: torch.device) -> None:
        """Move what there is to where the gradients are."""
        if self.covariance is not None and self.covariance.device != device:
            self.covariance = self.covariance.to(device)
            self.vectors = None if self.vectors is None else self.vectors.to(device)
            self._before, self._sum = self.covariance, None


def _leading(covariance: Tensor, k: int, energy: float | None, start: Tensor | None) -> Tensor:
    """Return the ``k`` leading eigenvectors, or as many more as hold ``energy``."""
    d = covariance.shape[1]
    if energy is not None or d <= _EIGH_UP_TO:
        values, vectors = torch.linalg.eigh(covariance)
        if energy is not None:
            shares = values.clamp_min(0).flip(1).cumsum(1) / values.clamp_min(0).sum(1, True)
            enough = int((shares < energy * (1 - 1e-6)).sum(1).amax()) + 1
            k = min(d, max(k, enough))
        return vectors[:, :, d - k :].flip(2).contiguous()
    iterations = _ITERATIONS
    if start is None or start.shape[2] < k:
        iterations = _FIRST_ITERATIONS
        largest = covariance.diagonal(dim1=1, dim2=2).topk(k, dim=1).indices
        columns = covariance.gather(2, largest.unsqueeze(1).expand(-1, d, -1))
        start = columns if start is None else torch.cat([start, columns], 2)
    vectors = start[:, :, :k]
    for _ in range(iterations):
        vectors = torch.linalg.qr(covariance @ vectors).Q
    return vectors


class Subspace:
    """The directions of one layer and when they are refreshed: state that lasts from step to step.

    Each layer has its own. Passes are counted as autograd runs them: a layer that is called several
    times in one backward sums its covariances.

    Args:
        settings: Default: those of ``selection="principal"``.

    Attributes:
        passes: Backward passes so far.
        calls: Backward calls of this object so far.
        last: Which directions the weight gradient of the last call lies along, ``"dy"`` or
            ``"dw"``, these, and the dtype that it was computed in; None if it may be any.
    """

    def __init__(self, settings: Principal | None = None) -> None:
        self.settings = settings or Principal()
        self.passes = self.calls = 0
        self.last: tuple[Literal["dy", "dw"], Tensor, torch.dtype] | None = None
        self.bases: dict[str, Basis] = {}
        self._task = -1
        self.lock = threading.Lock()  # held while directions are asked for, or refreshed

    def begin_call(self) -> bool:
        """Take note that a backward call begins; return whether it refreshes the directions."""
        self.calls += 1
        self.last = None
        task = current_graph_task_id()
        if self.passes == 0 or task < 0 or task != self._task:
            self.passes += 1
            self._task = task
            for basis in self.bases.values():
                basis.begin_pass()
        return self.settings.refreshes_at(self.passes - 1)

    @property
    def is_warm(self) -> bool:
        """Whether the passes are over in which the directions turn fast."""
        return self.passes > _EARLY[-1] + 1

    def basis(self, name: str, device: torch.device, groups: int, size: int) -> Basis:
        """Return the directions of ``"dy"``, ``"dx"`` or ``"dw"``.

        Args:
            name: Which.
            device: Of the gradients.
            groups: How many groups have directions of their own.
            size: Length of the vectors. Of another one (a layer was pruned) they begin anew.
        """
        basis = self.bases.setdefault(name, Basis())
        if basis.covariance is not None and basis.covariance.shape[:2] != (groups, size):
            basis = self.bases[name] = Basis()
        basis.to(device)
        return basis

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` needs to go on exactly here."""
        bases = {name: basis.state_dict() for name, basis in self.bases.items()}
        return {"passes": self.passes, "bases": bases}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self.passes = int(state["passes"])
        self.bases = {}
        for name, values in state["bases"].items():
            self.bases[name] = Basis()
            self.bases[name].load_state_dict(values)
        self._task = -1

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["settings"])  # type: ignore[misc]
        self.load_state_dict(state["state"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings!r})"
