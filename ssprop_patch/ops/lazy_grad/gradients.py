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

import copy
from typing import Any

import torch
from torch import Tensor

from ..._torch_compat import (
    disabled_torch_function_impl,
    make_wrapper_subclass,
    tensor_hooks,
    tree_map_only,
    version,
)
from ...core.cells import Cells
from .. import channel_ops

aten = torch.ops.aten


class LazyGradient(Tensor):
    """A gradient that is not formed yet: its shape, and how to form it.

    Whoever is not ready for it (a hook, a sum with another gradient, any operation of torch) gets
    the ordinary tensor: the first operation on it forms that. What is then changed in place stays
    changed.
    """

    _formed: Tensor | None = None
    _sources: tuple[tuple[Tensor, int], ...] = ()

    @staticmethod
    def __new__(cls, like: Tensor, *args: Any, **kwargs: Any) -> LazyGradient:
        return make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )

    def _made_from(self, *tensors: Tensor | None) -> None:
        """Take note of what this is yet to be formed from, as it is now."""
        self._sources = tuple((t, version(t)) for t in tensors if t is not None)

    def _check_sources(self) -> None:
        if any(version(t) != before for t, before in self._sources):
            raise RuntimeError(
                "a gradient was to be formed from a tensor that has been changed in place since "
                "its backward ran: where a hook keeps a gradient, keep grad.clone()"
            )

    def form(self) -> Tensor:
        """Return the whole gradient, (N, C, *spatial)."""
        if self._formed is None:
            self._check_sources()
            self._formed = self._form()
        return self._formed

    def _form(self) -> Tensor:
        raise NotImplementedError

    def _pass_on(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Return what ``func`` makes of it without forming it; NotImplemented where it cannot."""
        return NotImplemented

    __torch_function__ = disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # Tensor's is a function of C's
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for arg in () if kwargs else args[:2]:  # nodes of autograd pass none, such as alpha
            if isinstance(arg, LazyGradient):
                out = arg._pass_on(func, args)
                if out is not NotImplemented:
                    return out
        args, kwargs = tree_map_only(
            LazyGradient, lambda gradient: gradient.form(), (tuple(args), kwargs or {})
        )
        return func(*args, **kwargs)

    # What reads memory past the dispatcher has to be given some.

    @property
    def data(self) -> Tensor:
        """The formed gradient's ``data``."""
        return self.form().data

    @data.setter
    def data(self, value: Tensor) -> None:
        self.form().data = value

    def data_ptr(self) -> int:
        """Return where the formed gradient lies."""
        return self.form().data_ptr()

    def untyped_storage(self) -> Any:
        """Return the formed gradient's memory."""
        return self.form().untyped_storage()

    def numpy(self, *, force: bool = False) -> Any:
        """Return the formed gradient as an array."""
        return self.form().numpy(force=force)

    def tolist(self) -> Any:
        """Return the formed gradient as lists."""
        return self.form().tolist()

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.form().__dlpack__(**kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.form(), memo)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # as above
        return repr(self.form())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.form().__reduce_ex__(protocol)


class ReLUInput(LazyGradient):
    """What comes in at the node of a ReLU in front of which there is a batch norm.

    Args:
        dz: The gradient of the ReLU's output.
    """

    def __init__(self, dz: Tensor) -> None:
        self._formed = dz

    def _pass_on(self, func: Any, args: tuple[Any, ...]) -> Any:
        if func is not aten.threshold_backward.default or args[0] is not self or args[2] != 0:
            return NotImplemented
        out = args[1]
        return (
            ReLUGradient(out, self._formed) if channel_ops.can_split_relu(out) else NotImplemented
        )


class ReLUGradient(LazyGradient):
    """The gradient of the input of a ReLU, for the batch norm in front of it.

    Args:
        out: The ReLU's output.
        dz: Its gradient, of the same shape.
    """

    def __init__(self, out: Tensor, dz: Tensor) -> None:
        self._out, self._dz = out, dz
        self._made_from(out, dz)

    @torch.no_grad()
    def _form(self) -> Tensor:
        return channel_ops.relu_backward(self._dz, self._out)

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of the ReLU's output, and that; or what is formed, and None."""
        if self._formed is not None:
            return self._formed, None
        self._check_sources()
        return self._dz, self._out


class NormInput(LazyGradient):
    """What comes in at the node of a batch norm that took its input from a sparse convolution.

    Args:
        dz: The gradient of the norm's output; of the output of the ReLU after it if there is
            ``relu_out``.
        relu_out: The output of that ReLU.
        order: Channels are chosen by their sums of ``|dy| ** order``.
        cells: Of the maps of dy, if the sums over them are needed as well.
    """

    def __init__(
        self, dz: Tensor, relu_out: Tensor | None, order: int, cells: Cells | None = None
    ) -> None:
        self._dz, self._relu_out, self._order, self._cells = dz, relu_out, order, cells

    def _form(self) -> Tensor:
        return channel_ops.relu_backward(self._dz, self._relu_out)

    def _pass_on(self, func: Any, args: tuple[Any, ...]) -> Any:
        if func is aten.native_batch_norm_backward.default:
            _, x, weight, _, _, mean, invstd, training, eps, needed = args
        elif func is aten.cudnn_batch_norm_backward.default:
            (x, _, weight, _, _, mean, invstd, eps, _), training, needed = args, True, (True,) * 3
        else:
            return NotImplemented
        # Whoever hooked the norm's input, or asked for its gradient, gets an ordinary tensor.
        watched = tensor_hooks(x) or x.retains_grad
        if (
            not (training and needed[0])
            or watched
            or not channel_ops.can_split_norm(x, self._order)
            or not (self._cells is None or channel_ops.can_sum_cells(x, self._cells))
        ):
            return NotImplemented
        order, relu_out, cells = self._order, self._relu_out, self._cells
        sums = channel_ops.norm_sums(self._dz, x, weight, mean, invstd, order, relu_out, cells)
        args = x, self._dz, weight, mean, invstd, eps, sums, order, relu_out, cells
        dx = NormGradient(*args)
        dw = sums.dz_xhat.to(weight.dtype) if needed[1] and weight is not None else None
        db = sums.dz.to(mean.dtype if weight is None else weight.dtype) if needed[2] else None
        return dx, dw, db


class NormGradient(LazyGradient):
    """The gradient of the input of a batch norm in training mode.

    Args:
        x: The norm's input, (N, C, *spatial).
        dz: Gradient of its output, of the same shape; of the output of the ReLU after it if
            ``relu_out`` is given.
        weight: (C,), or None.
        mean, invstd: Of the batch, (C,).
        eps: What was added to the variance.
        sums: Over batch and space.
        order: Of the sum of ``|dy| ** order`` that :meth:`sum_of_powers` returns, 1 or 2.
        relu_out: The output of the ReLU.
        cells: What ``sums`` has the sums over, if it has any.
    """

    def __init__(
        self,
        x: Tensor,
        dz: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        eps: float,
        sums: channel_ops.NormSums,
        order: int,
        relu_out: Tensor | None = None,
        cells: Cells | None = None,
    ) -> None:
        self._x, self._dz, self._relu_out = x, dz, relu_out
        self._cells = cells
        # As it is now: an optimizer may step within the backward, before this is formed.
        self._weight = None if weight is None else weight.detach().clone()
        self._mean, self._invstd, self._eps = mean, invstd, eps
        self._sums, self.order = sums, order
        self._made_from(x, dz, relu_out)

    def form_masked(self, keep: Tensor) -> Tensor:
        """Return the whole gradient with zeros in the channels where ``keep``, (C,) bool, is False.

        By choice, not by a weight of zero: a dropped channel may hold inf or nan.
        """
        formed = self._formed
        if formed is None:
            self._check_sources()
            formed = self._form()
        return torch.where(keep.view(-1, *[1] * (self.dim() - 2)), formed, 0)

    def take(self, index: Tensor) -> Tensor:
        """Return the gradient of the channels ``index`` alone, (N, k, *spatial)."""
        if self._formed is not None:
            return channel_ops.take_channels(self._formed, index)
        self._check_sources()
        return channel_ops.norm_input_grad(
            self._dz,
            self._x,
            self._weight,
            self._mean,
            self._invstd,
            self._sums.dz,
            self._sums.dz_xhat,
            index,
            self._relu_out,
        )

    def cell_sums(self, cells: Cells) -> Tensor | None:
        """Return the sums over cells, (N, C, *number), without forming dy; None if unknown."""
        if self._formed is not None or cells != self._cells:
            return None
        return self._sums.cells

    def sum_of_powers(self) -> Tensor:
        """Return the sum of ``|dy| ** order`` of each channel, (C,), without forming dy."""
        sums = self._sums
        if self._formed is not None:  # and may have been changed since, by a hook
            return channel_ops.channel_sum(self._formed, self.order)
        if sums.dy is not None:
            return sums.dy
        if self.order != 2:
            return channel_ops.channel_sum(self.form(), self.order)
        self._check_sources()
        n = self._x.numel() // self._x.shape[1]
        if sums.dz2 is None:
            dz2 = channel_ops.channel_sum(channel_ops.relu_backward(self._dz, self._relu_out), 2)
        else:
            dz2 = sums.dz2
        xhat_part = sums.dz_xhat.square() * (1 + self._eps * self._invstd.square())
        rest = dz2 - (sums.dz.square() + xhat_part) / n
        scale = self._invstd if self._weight is None else self._weight * self._invstd
        # Rounding may take what is zero to below it.
        return scale.square() * rest.clamp_min(0)

    @torch.no_grad()
    def _form(self) -> Tensor:
        return aten.native_batch_norm_backward(
            channel_ops.relu_backward(self._dz, self._relu_out),
            self._x,
            self._weight,
            None,
            None,
            self._mean,
            self._invstd,
            True,
            0.0,
            [True, False, False],
        )[0]
