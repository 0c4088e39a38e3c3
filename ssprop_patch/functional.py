"""Layers with a sparse backward as functions, for people who write their own modules.

The forward is exactly torch's. In the backward only the output channels with the largest gradient
are propagated (ssProp, arXiv 2408.12561, section 3).
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ._validate import check_drop_rate
from .core import operations
from .core.ahead import Ahead
from .core.geometry import Size
from .core.operations import Operation
from .core.principal import Principal
from .core.rule import BackwardRule, Remainder, Selection, resolve_rule
from .core.selection import kept_channels
from .ops.autograd import needs_backward, sparse

__all__ = [
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "linear",
]


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Literal["same", "valid"] | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    drop_rate: float = 0.0,
    selection: Selection = "l1",
    remainder: Remainder = None,
) -> Tensor:
    """:func:`torch.nn.functional.conv1d` with a sparse backward; see :func:`conv2d`.

    Args:
        input: Shape (N, C_in, L) or (C_in, L).
        weight: Shape (C_out, C_in / groups, kernel).
    """
    args = (bias, stride, padding, dilation, groups)
    return _run(operations.CONV1D, input, weight, args, drop_rate, selection, remainder)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Literal["same", "valid"] | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    drop_rate: float = 0.0,
    selection: Selection = "l1",
    remainder: Remainder = None,
) -> Tensor:
    """:func:`torch.nn.functional.conv2d` with a sparse backward.

    Args:
        input: Shape (N, C_in, H, W) or (C_in, H, W).
        weight: Shape (C_out, C_in / groups, kernel_h, kernel_w).
        bias: Shape (C_out,) or None.
        stride: As in :func:`torch.nn.functional.conv2d`.
        padding: As there: numbers, ``"same"`` or ``"valid"``.
        dilation: As there.
        groups: As there. With 1 < groups < C_out the same number of channels is kept in each
            group; with groups == C_out (depthwise) whole groups are kept.
        drop_rate: Fraction of the output channels whose gradient is dropped, in [0, 1). At 0 this
            *is* :func:`torch.nn.functional.conv2d`.
        selection: ``"l1"`` (the paper: mean of ``|dy|``), ``"l2"``, ``"random"`` (torch's default
            generator), or a callable that takes dy, shape (N, C_out, *spatial), and returns one
            score per channel, shape (C_out,). Or a :class:`ssprop_patch.Subspace`, one for each
            layer: dy goes back along its leading directions.
        remainder: None, or ``"coarse"``: what is not selected goes back averaged over blocks.

    Returns:
        The output, bit-identical to :func:`torch.nn.functional.conv2d`.

    Raises:
        TypeError: If ``drop_rate`` is not a number, or the tensors are complex.
        ValueError: If ``drop_rate`` is outside [0, 1), or ``selection`` is unknown.
    """
    args = (bias, stride, padding, dilation, groups)
    return _run(operations.CONV2D, input, weight, args, drop_rate, selection, remainder)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Literal["same", "valid"] | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    drop_rate: float = 0.0,
    selection: Selection = "l1",
    remainder: Remainder = None,
) -> Tensor:
    """:func:`torch.nn.functional.conv3d` with a sparse backward; see :func:`conv2d`.

    Args:
        input: Shape (N, C_in, D, H, W) or (C_in, D, H, W).
        weight: Shape (C_out, C_in / groups, kernel_d, kernel_h, kernel_w).
    """
    args = (bias, stride, padding, dilation, groups)
    return _run(operations.CONV3D, input, weight, args, drop_rate, selection, remainder)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    drop_rate: float = 0.0,
    selection: Selection = "l1",
    remainder: Remainder = None,
) -> Tensor:
    """:func:`torch.nn.functional.conv_transpose1d` with a sparse backward; see :func:`conv2d`.

    Args:
        input: Shape (N, C_in, L) or (C_in, L).
        weight: Shape (C_in, C_out / groups, kernel).
    """
    args = (bias, stride, padding, output_padding, groups, dilation)
    return _run(operations.CONV_TRANSPOSE1D, input, weight, args, drop_rate, selection, remainder)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    drop_rate: float = 0.0,
    selection: Selection = "l1",
    remainder: Remainder = None,
) -> Tensor:
    """:func:`torch.nn.functional.conv_transpose2d` with a sparse backward; see :func:`conv2d`.

    Args:
        input: Shape (N, C_in, H, W) or (C_in, H, W).
        weight: Shape (C_in, C_out / groups, kernel_h, kernel_w).
    """
    args = (bias, stride, padding, output_padding, groups, dilation)
    return _run(operations.CONV_TRANSPOSE2D, input, weight, args, drop_rate, selection, remainder)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    drop_rate: float = 0.0,
    selection: Selection = "l1",
    remainder: Remainder = None,
) -> Tensor:
    """:func:`torch.nn.functional.conv_transpose3d` with a sparse backward; see :func:`conv2d`.

    Args:
        input: Shape (N, C_in, D, H, W) or (C_in, D, H, W).
        weight: Shape (C_in, C_out / groups, kernel_d, kernel_h, kernel_w).
    """
    args = (bias, stride, padding, output_padding, groups, dilation)
    return _run(operations.CONV_TRANSPOSE3D, input, weight, args, drop_rate, selection, remainder)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    drop_rate: float = 0.0,
    selection: Selection = "l1",
    remainder: Remainder = None,
) -> Tensor:
    """:func:`torch.nn.functional.linear` with a sparse backward; see :func:`conv2d`.

    A channel is an output feature; its importance is taken over all other dimensions.

    Args:
        input: Shape (*, in_features).
        weight: Shape (out_features, in_features).
        bias: Shape (out_features,) or None.
        drop_rate: Fraction of the output features whose gradient is dropped, in [0, 1).
        selection: As for :func:`conv2d`; a callable is given dy as (rows, out_features).
    """
    return _run(operations.LINEAR, input, weight, (bias,), drop_rate, selection, remainder)


def _run(
    operation: Operation,
    input: Tensor,
    weight: Tensor,
    args: tuple[Any, ...],
    drop_rate: float,
    selection: Selection,
    remainder: Remainder,
) -> Tensor:
    rate = check_drop_rate(drop_rate)
    if selection == "principal" or isinstance(selection, Principal):
        raise ValueError(
            f"selection={selection!r} keeps directions from step to step: make one Subspace for "
            "each layer, ssprop_patch.Subspace(), and pass that as selection"
        )
    if selection == "ahead" or isinstance(selection, Ahead):
        raise ValueError(
            f"selection={selection!r} remembers what each layer's gradients were like and asks "
            "the layers before: it is for converted models"
        )
    rule = resolve_rule(selection, remainder)
    function = operation.function()
    if function is operation.original:
        return _run_original(operation, rate, rule, input, weight, *args)
    with _CatchOriginal(operation, rate, rule):  # a tool's, see operations.py
        return function(input, weight, *args)


def _run_original(
    operation: Operation,
    rate: float,
    rule: BackwardRule,
    input: Tensor,
    weight: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    bias, geometry = operation.arguments(*args, **kwargs)
    # A weight of another shape: torch's own function says what is wrong.
    fits = weight.dim() == operation.dims + 2 and geometry.groups >= 1
    if fits and needs_backward(input, weight, bias):
        channels = operation.selectable(weight, geometry.groups)
        k = kept_channels(channels, rate)
        if k < channels:
            return sparse(operation, input, weight, bias, geometry, k=k, rule=rule)
    return operation.original(input, weight, *args, **kwargs)


class _CatchOriginal(TorchFunctionMode):
    """Makes the function of torch's that a tool's replacement calls a sparse one."""

    def __init__(self, operation: Operation, rate: float, rule: BackwardRule) -> None:
        super().__init__()
        self.operation, self.rate, self.rule = operation, rate, rule

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not self.operation.original:
            return func(*args, **kwargs)
        return _run_original(self.operation, self.rate, self.rule, *args, **kwargs)
