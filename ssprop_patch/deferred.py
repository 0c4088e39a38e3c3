"""The gradients that batch norm and ReLU pass on, formed only where they are read.

With dz the gradient of the norm's output, x the norm's input (a convolution's output), and x_hat
the normalised x, the gradient that the convolution gets is, per channel and over n positions,

    dy = weight / std * (dz - sum(dz) / n - x_hat * sum(dz * x_hat) / n)

so that its sum of squares follows from sums that the norm's backward computes anyway:

    sum(dy^2) = (weight / std)^2 * (sum(dz^2) - sum(dz)^2 / n - (1 + e) * sum(dz * x_hat)^2 / n)

where e = eps / std^2, as the squares of x_hat sum to n * (1 - e). The sum of ``|dy|`` has no such
form, but takes no more than another look at dz and x. A sparse backward therefore chooses its
channels before dy exists, and has only the chosen ones formed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import passes

aten = torch.ops.aten


class DeferredGradient(Tensor):
    """A gradient that is not formed yet: its shape, and how to form it.

    Whoever is not ready for it (a hook, a sum with another gradient, any operation of torch) gets
    the ordinary tensor: the first operation on it forms that.
    """

    _formed: Tensor | None = None

    @staticmethod
    def __new__(cls, like: Tensor, *args: Any, **kwargs: Any) -> DeferredGradient:
        return Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )

    def form(self) -> Tensor:
        """Return the whole gradient, (N, C, *spatial)."""
        if self._formed is None:
            self._formed = self._form()
        return self._formed

    def _form(self) -> Tensor:
        raise NotImplementedError

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(
            DeferredGradient, lambda gradient: gradient.form(), (tuple(args), kwargs or {})
        )
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return repr(self.form())

    def numpy(self, *, force: bool = False) -> Any:
        """Return the formed gradient as an array."""
        return self.form().numpy(force=force)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.form().__reduce_ex__(protocol)


class ReLUGradient(DeferredGradient):
    """The gradient of the input of a ReLU, for the batch norm in front of it.

    Args:
        out: The ReLU's output.
        dz: Its gradient, of the same shape.
    """

    def __init__(self, out: Tensor, dz: Tensor) -> None:
        self._out, self._dz = out, dz

    @torch.no_grad()
    def _form(self) -> Tensor:
        return passes.relu_backward(self._dz, self._out)

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of the ReLU's output, and that; or what is formed, and None."""
        return (self._dz, self._out) if self._formed is None else (self._formed, None)


class NormGradient(DeferredGradient):
    """The gradient of the input of a batch norm in training mode.

    Args:
        x: The norm's input, (N, C, *spatial).
        dz: Gradient of its output, of the same shape; of the output of the ReLU behind it if
            ``relu_out`` is given.
        weight: (C,), or None.
        mean, invstd: Of the batch, (C,).
        eps: What was added to the variance.
        sums: Over batch and space.
        order: Of the sum of ``|dy| ** order`` that :meth:`sum_of_powers` returns, 1 or 2.
        relu_out: The output of the ReLU.
    """

    def __init__(
        self,
        x: Tensor,
        dz: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        eps: float,
        sums: passes.NormSums,
        order: int,
        relu_out: Tensor | None = None,
    ) -> None:
        self._x, self._dz, self._relu_out = x, dz, relu_out
        # As it is now: an optimizer may step within the backward, before this is formed.
        self._weight = None if weight is None else weight.detach().clone()
        self._mean, self._invstd, self._eps = mean, invstd, eps
        self._sums, self.order = sums, order

    def _form(self) -> Tensor:
        return self._input_grad(self._weight)

    def form_masked(self, keep: Tensor) -> Tensor:
        """Return the whole gradient with zeros in the channels where ``keep``, (C,) bool, is False.

        The norm's own weight is masked, which takes no further pass over memory.
        """
        weight = torch.ones_like(self._invstd) if self._weight is None else self._weight
        return self._input_grad(torch.where(keep, weight, 0))

    def take(self, index: Tensor) -> Tensor:
        """Return the gradient of the channels ``index`` alone, (N, k, *spatial)."""
        if self._formed is not None:
            return passes.take_channels(self._formed, index)
        return passes.norm_input_grad(
            self._dz, self._x, self._weight, self._mean, self._invstd,
            self._sums.dz, self._sums.dz_xhat, index, self._relu_out,
        )  # fmt: skip

    def sum_of_powers(self) -> Tensor:
        """Return the sum of ``|dy| ** order`` of each channel, (C,), without forming dy."""
        sums = self._sums
        if sums.dy is not None:
            return sums.dy
        if self.order != 2:
            return passes.channel_sum(self.form(), self.order)
        n = self._x.numel() // self._x.shape[1]
        if sums.dz2 is None:
            dz2 = passes.channel_sum(passes.relu_backward(self._dz, self._relu_out), 2)
        else:
            dz2 = sums.dz2
        xhat_part = sums.dz_xhat.square() * (1 + self._eps * self._invstd.square())
        rest = dz2 - (sums.dz.square() + xhat_part) / n
        scale = self._invstd if self._weight is None else self._weight * self._invstd
        # Rounding may take what is zero to below it.
        return scale.square() * rest.clamp_min(0)

    @torch.no_grad()
    def _input_grad(self, weight: Tensor | None) -> Tensor:
        return aten.native_batch_norm_backward(
            passes.relu_backward(self._dz, self._relu_out), self._x, weight, None, None,
            self._mean, self._invstd, True, 0.0, [True, False, False],
        )[0]  # fmt: skip
