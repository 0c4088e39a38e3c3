"""DistributedDataParallel: ``compress(ddp_model)`` reduces gradients along shared directions.

Under ``selection="principal"`` the gradient of a weight is ``U z``, where U are the layer's
directions and z has as many rows as there are directions. Where all ranks have the same U
(``sync_selection=True``), the mean of their gradients is U times the mean of z, so that z is all
that has to be sent: at drop rate 0.8 about a quarter of a ResNet-50's gradients.
``docs/whole-gradient.md`` has what that is worth.
"""

# No "from __future__ import annotations": DDP looks at the annotations of a hook, not at text.
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.geometry import ConvParams
from ..core.principal import Subspace
from ..ops.projection import lift_weight, project_weight

# Of what is not along the directions, as a share of the gradient: more than rounding leaves.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
_ROUNDING_OF_FEW_BITS = 5e-2  # float16 and bfloat16, which gradients go through under autocast
_CHECK_EVERY = 50  # reductions of a weight: on a GPU the host waits for the answer


def compress(ddp_model: nn.Module) -> "Compression":
    """Reduce the gradients of principal layers along their directions; the result is the same.

    Registers a communication hook. What a step's gradient does not lie along any directions goes
    whole, as without it: at rate 0, in the refreshes of layers that are projected on the input
    side, of layers that were called several times, and what is accumulated over several backward
    passes. So does the gradient of a weight that something else has a part in as well, such as
    a penalty in the loss: the first reductions of each weight, which are whole, look for that.

    Args:
        ddp_model: A :class:`DistributedDataParallel`, or a compiled one, around a network that was
            converted with ``selection="principal"`` and ``sync_selection=True``, without a
            remainder. Ranks must run the same layers in the same order.

    Returns:
        The hook's state, which counts bytes.

    Raises:
        TypeError: If it is no DistributedDataParallel.
        ValueError: If no layer has directions that all its ranks share, or ranks may leave out
            layers (``find_unused_parameters=True``).
        RuntimeError: From torch, if it has a communication hook already. In a later backward, if
            the gradient of a weight that used to lie along its directions no longer does.
    """
    ddp: Any = getattr(ddp_model, "_orig_mod", ddp_model)
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(f"compress takes a DistributedDataParallel, got {type(ddp).__name__}")
    if ddp.find_unused_parameters:
        raise ValueError(
            "compress needs all ranks to run the same layers: find_unused_parameters is True"
        )
    weights = {
        id(layer.weight): _Weight(name, layer)
        for name, layer in ddp.module.named_modules()
        if _shared_subspace(layer, ddp.process_group) is not None
    }
    if not weights:
        raise ValueError(
            "no layer has directions that all ranks of this DistributedDataParallel share: convert "
            'with selection="principal", sync_selection=True and no remainder'
        )
    state = Compression(weights, ddp.process_group)
    ddp.register_comm_hook(state, Compression.reduce)
    return state


def _shared_subspace(layer: nn.Module, group: Any) -> Subspace | None:
    """Return the directions of a layer's weight if the ranks of ``group`` have the same."""
    policy = vars(layer).get("_ssprop_policy")
    if policy is None or not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return None
    rule = policy.rule
    shared = rule.is_shared and rule.score_fn.is_shared_by(group)
    return rule.subspace if shared and not rule.block else None


class Directions(NamedTuple):
    """How the gradient of one weight becomes smaller, and whole again."""

    kind: Literal["dy", "dw"]
    vectors: Tensor  # (groups, C, k) of "dy", (groups, n, r) of "dw"
    dtype: torch.dtype  # in which the gradient was computed
    transposed: bool

    def shrink(self, grad: Tensor) -> Tensor:
        """Return ``U'G``, or ``G T``."""
        u = self.vectors.to(grad.dtype)
        if self.kind == "dy":
            return project_weight(grad, u, self._params)
        return grad.reshape(u.shape[0], -1, u.shape[1]) @ u

    def spread(self, small: Tensor, shape: torch.Size) -> Tensor:
        """Return ``U z``, or ``z T'``, of the weight's shape."""
        u = self.vectors.to(small.dtype)
        if self.kind == "dy":
            return lift_weight(small, u, self._params)
        return (small @ u.mT).reshape(shape)

    @property
    def _params(self) -> ConvParams:
        return ConvParams((), (), (), self.vectors.shape[0], self.transposed)


class _Weight:
    """What is known of one weight from reduction to reduction, alike on all ranks.

    Attributes:
        lies_along: Whether its gradients have been seen to lie along the directions; None: not yet.
        strayed: Whether one did not, though they had: a number on the device.
    """

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name, self.layer = name, layer
        self.lies_along: bool | None = None
        self.strayed: Tensor | None = None
        self._subspace: Subspace | None = None
        self._calls = self._reductions = 0
        self._is_fresh = False
        layer.weight.register_hook(partial(_note_whether_fresh, self))  # type: ignore[operator]

    def directions(self, group: Any) -> Directions | None:
        """Return along what the gradient lies that is to be reduced now; None if it may be any."""
        subspace, fresh = _shared_subspace(self.layer, group), self._is_fresh
        before = self._calls if subspace is self._subspace else 0
        self._subspace, self._is_fresh = subspace, False
        self._calls = 0 if subspace is None else subspace.calls
        if subspace is None or subspace.last is None or not fresh or self._calls != before + 1:
            return None
        return Directions(*subspace.last, getattr(self.layer, "transposed", False))

    def check(self, stray: Tensor) -> None:
        """Raise an error if a gradient was not along its directions, now and then."""
        self.strayed = stray if self.strayed is None else self.strayed.maximum(stray)
        self._reductions += 1
        if stray.device.type != "cpu" and self._reductions % _CHECK_EVERY:
            return
        if bool(self.strayed):
            raise RuntimeError(
                f"ssprop_patch.integrations.ddp.compress: the gradient of {self.name}.weight no "
                "longer lies along its directions, so that what was reduced is not all of it. Is "
                "there something in the loss that was not there in the first steps?"
            )


def _note_whether_fresh(weight: _Weight, _: Tensor) -> None:
    # Called before the gradient is added to what there is.
    weight._is_fresh = weight.layer.weight.grad is None


def _as_laid_out(grad: Tensor, parameter: Tensor) -> Tensor:
    """Return a bucket's view of a gradient as DDP fills it, in the parameter's memory format.

    Its own views are contiguous, whose elements are in other places then.
    """
    if not torch.ops.aten.is_non_overlapping_and_dense(parameter):
        return grad
    return grad.as_strided(parameter.shape, parameter.stride())


def _stray(grad: Tensor, rest: Tensor, computed_in: torch.dtype) -> Tensor:
    """Return 1 if ``rest`` is more of ``grad`` than rounding leaves, else 0; 0 if not finite."""
    share = max(_ROUNDING.get(t, _ROUNDING_OF_FEW_BITS) for t in (grad.dtype, computed_in))
    if grad.dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest":
        share = _ROUNDING_OF_FEW_BITS
    return (rest.norm() > share * grad.norm()).to(grad.dtype)


class Compression:
    """The hook's state.

    Attributes:
        bytes_sent: What this rank has handed to all-reduces.
        bytes_whole: What it would have been without compression.
    """

    def __init__(self, weights: dict[int, _Weight], group: Any) -> None:
        self.bytes_sent = self.bytes_whole = 0
        self._weights, self._group = weights, group

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Reduce one bucket: a communication hook."""
        whole = bucket.buffer()
        grads = list(map(_as_laid_out, bucket.gradients(), bucket.parameters()))
        pieces: list[Tensor] = []
        ways: list[Directions | None] = []
        trials: list[_Weight] = []
        flags: list[Tensor] = []
        for parameter, grad in zip(bucket.parameters(), grads, strict=True):
            weight = self._weights.get(id(parameter))
            way = None if weight is None else weight.directions(self._group)
            if weight is not None and way is not None and weight.lies_along is not False:
                small = way.shrink(grad)
                rest = grad - way.spread(small, grad.shape)
                stray = _stray(grad, rest, way.dtype)
                if weight.lies_along:
                    weight.check(stray)
                    pieces.append(small)
                    ways.append(way)
                    continue
                trials.append(weight)
                flags += [stray, grad.any().to(grad.dtype)]
            pieces.append(grad)
            ways.append(None)
        self.bytes_whole += whole.nbytes
        if not (trials or any(ways)):
            self.bytes_sent += whole.nbytes
            sent = whole.div_(self._group.size())
        else:
            sent = torch.cat([piece.reshape(-1) for piece in pieces])
            sent = sent.div_(self._group.size())
            sent = torch.cat([sent, torch.stack(flags)]) if flags else sent
            self.bytes_sent += sent.nbytes
        work = dist.all_reduce(sent, group=self._group, async_op=True)

        def unpack(done: torch.futures.Future[Any]) -> Tensor:
            reduced = done.value()[0]
            if sent is whole:
                return reduced
            parts = reduced[: reduced.numel() - len(flags)].split([p.numel() for p in pieces])
            for grad, piece, part, way in zip(grads, pieces, parts, ways, strict=True):
                part = part.view(piece.shape)
                grad.copy_(part if way is None else way.spread(part, grad.shape))
            if trials:
                _judge(trials, reduced[reduced.numel() - len(flags) :].view(-1, 2))
            return whole

        return work.get_future().then(unpack)


def _judge(trials: list[_Weight], flags: Tensor) -> None:
    """Note what the ranks found together: how many strayed, and how many had any gradient."""
    for weight, (strayed, not_zero) in zip(trials, flags.tolist(), strict=True):
        if strayed or not_zero:
            weight.lies_along = not strayed
