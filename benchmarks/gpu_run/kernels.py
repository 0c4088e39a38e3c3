"""Whether the Triton kernels, and sparse layers with them, compute what plain torch does.

Each kernel is compared with the same formula in float64; whole layers with
``ssprop_patch.core.reference``; a network with the kernels with itself without them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import traceback
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ssprop_patch as ssp
from ssprop_patch.core import reference
from ssprop_patch.core.geometry import ConvParams
from ssprop_patch.core.selection import kept_channels
from ssprop_patch.ops import channel_ops, triton_kernels

DTYPES = torch.float32, torch.bfloat16
FORMATS = torch.contiguous_format, torch.channels_last
# Sizes that vectors divide, and sizes that they do not.
_SHAPES = (8, 96, 28, 28), (3, 70, 15, 17)
_LARGE = (64, 256, 56, 56)  # several tiles for each program of a GPU
# Sums are made in float32.
_SUMS = 4e-6
_RATE = 0.75
# Kernel, stride, padding and groups of a layer with 64 inputs and outputs.
_LAYERS = {
    "3x3": (3, 1, 1, 1),
    "1x1": (1, 1, 0, 1),
    "strided 1x1": (1, 2, 0, 1),
    "strided 3x3": (3, 2, 1, 1),
    "grouped": (3, 1, 1, 4),
    "depthwise": (3, 1, 1, 64),
}


class Check(NamedTuple):
    """One comparison.

    Attributes:
        name: What was compared.
        dtype, memory_format: Of its tensors.
        error: The largest error as a share of what rounding allows, or nan.
    """

    name: str
    dtype: torch.dtype
    memory_format: torch.memory_format
    error: float

    @property
    def is_right(self) -> bool:
        """Whether rounding explains the error."""
        return self.error <= 1  # not of nan


@contextlib.contextmanager
def triton(on: bool) -> Iterator[None]:
    """Use Triton kernels within, or none, as ``SSPROP_PATCH_TRITON`` does for a whole process."""
    with unittest.mock.patch.object(channel_ops, "_TRITON", on):
        yield


def why_not(device: torch.device) -> str:
    """Return why no kernel can run; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "" if device.type == "cuda" or interpreted else "no CUDA device"


def checks(device: torch.device) -> Iterator[Check]:
    """Compare everything, one after the other."""
    torch.manual_seed(0)
    shapes = (*_SHAPES, _LARGE) if device.type == "cuda" else _SHAPES
    for dtype, layout in itertools.product(DTYPES, FORMATS):
        if not why_not(device):
            for name, compare in KERNELS.items():
                error = _attempt(_kernel, compare, shapes, dtype, layout, device)
                yield Check(name, dtype, layout, error)
        for name, layer in _LAYERS.items():
            yield Check(name, dtype, layout, _attempt(_layer, layer, dtype, layout, device))
        yield Check("network", dtype, layout, _attempt(_network, dtype, layout, device))


def _attempt(compare: Callable[..., float], *args: Any) -> float:
    """Return the error; nan where one is raised, so that the other comparisons are made."""
    try:
        return compare(*args)
    except Exception as error:
        traceback.print_exception(error, limit=-5)
        return float("nan")


def _kernel(
    compare: Callable[[_Case], float],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    layout: torch.memory_format,
    device: torch.device,
) -> float:
    return _largest([compare(_Case.of(shape, dtype, layout, device)) for shape in shapes])


def _largest(errors: list[float]) -> float:
    return float(torch.tensor(errors).max())  # nan if one of them is


def _error(got: Tensor, expected: Tensor, allowed: Tensor) -> float:
    """Return the largest error as a share of what is allowed."""
    if got.shape != expected.shape:
        return float("nan")
    off = (got.double() - expected.double()).abs()
    return float(torch.where(off == 0, 0, off / allowed).max())  # nan if one of them is


class _Case(NamedTuple):
    """A batch norm with a ReLU behind it, and channels to take."""

    dz: Tensor
    y: Tensor
    relu_out: Tensor
    weight: Tensor
    mean: Tensor
    invstd: Tensor
    index: Tensor

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        layout: torch.memory_format,
        device: torch.device,
    ) -> _Case:
        dz, y, out = (
            torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
            for _ in range(3)
        )
        y, channels = y + 1, shape[1]  # shows a mean that is forgotten
        mean = y.double().mean((0, 2, 3)).float()
        invstd = y.double().var((0, 2, 3), correction=0).add(1e-5).rsqrt().float()
        index = torch.randperm(channels, device=device)[: channels // 3]
        weight = torch.rand(channels, device=device) - 0.5
        return cls(dz, y, out.relu(), weight, mean, invstd, index)

    @property
    def passed(self) -> Tensor:
        """Of dz, what passes the ReLU, in float64."""
        return torch.where(self.relu_out > 0, self.dz.double(), 0)

    @property
    def xhat(self) -> Tensor:
        return (self.y.double() - _row(self.mean)) * _row(self.invstd)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return the sums of dz and dz * xhat of each channel, in float32."""
        return _sum(self.passed).float(), _sum(self.passed * self.xhat).float()

    def dy(self) -> Tensor:
        """Return the gradient of y for a weight of ones, in float64."""
        n = self.y.numel() // self.y.shape[1]
        dz, dz_xhat = (_row(s) / n for s in self.sums())
        return _row(self.invstd) * (self.passed - dz - self.xhat * dz_xhat)


def _row(v: Tensor) -> Tensor:
    return v.double().view(-1, 1, 1)


def _sum(t: Tensor) -> Tensor:
    return t.sum((0, 2, 3))


def _channel_sums(case: _Case) -> float:
    errors = []
    for order in (1, 2):
        terms = case.dz.double().abs() ** order
        got = triton_kernels.channel_sums(case.dz, order)
        errors.append(_error(got, _sum(terms), _SUMS * _sum(terms)))
    return _largest(errors)


def _take_channels(case: _Case) -> float:
    got = triton_kernels.take_channels(case.dz, case.index)
    return 0.0 if torch.equal(got, case.dz[:, case.index]) else float("inf")


def _norm_sums(case: _Case) -> float:
    got = triton_kernels.norm_sums(case.dz, case.y, case.mean, case.invstd, case.relu_out)
    terms = case.passed, case.passed * case.xhat, case.passed.square()
    pairs = zip(got, terms, strict=True)
    return _largest([_error(g, _sum(t), _SUMS * _sum(t.abs())) for g, t in pairs])


def _norm_grad_sums(case: _Case) -> float:
    args = case.dz, case.y, case.mean, case.invstd, *case.sums(), case.relu_out
    got = triton_kernels.norm_grad_sums(*args)
    size = case.invstd.double() * _sum(case.dz.double().abs() + 1)
    return _error(got, _sum(case.dy().abs()), _SUMS * size)


def _norm_input_grad(case: _Case) -> float:
    vectors = case.weight, case.mean, case.invstd, *case.sums()
    got = triton_kernels.norm_input_grad(case.dz, case.y, *vectors, case.index, case.relu_out)
    expected = (case.dy() * _row(case.weight))[:, case.index]
    size = (case.invstd.double() * (case.dz.double().abs().max() + 1)).max()
    return _error(got, expected, torch.finfo(got.dtype).eps * expected.abs() + _SUMS * size)


#: All of the kernels.
KERNELS: dict[str, Callable[[_Case], float]] = {
    "channel_sums": _channel_sums,
    "take_channels": _take_channels,
    "norm_sums": _norm_sums,
    "norm_grad_sums": _norm_grad_sums,
    "norm_input_grad": _norm_input_grad,
}


def _layer(
    layer: tuple[int, int, int, int],
    dtype: torch.dtype,
    layout: torch.memory_format,
    device: torch.device,
) -> float:
    """Compare dX, dW and db of one layer with the reference in float64."""
    kernel, stride, padding, groups = layer
    x = torch.randn(4, 64, 14, 14, device=device)
    w = torch.randn(64, 64 // groups, kernel, kernel, device=device) / kernel
    x, w = (t.to(dtype).contiguous(memory_format=layout).requires_grad_() for t in (x, w))
    b = torch.zeros(64, device=device, dtype=dtype, requires_grad=True)
    with _exactly(), triton(device.type == "cuda"):
        y = ssp.functional.conv2d(x, w, b, stride, padding, 1, groups, drop_rate=_RATE)
        # Scores far apart, so that rounding does not change which channels are kept.
        scale = torch.linspace(0.5, 2, 64, device=device)[torch.randperm(64, device=device)]
        dy = (torch.randn_like(y).float() * scale.view(-1, 1, 1)).to(dtype)
        got = torch.autograd.grad(y, (x, w, b), dy.contiguous(memory_format=layout))
        ones = (1, 1)
        params = ConvParams((stride,) * 2, (padding,) * 2, ones, groups)
        k = kept_channels(64 if groups == 64 else 64 // groups, _RATE)
        doubles = (t.detach().double() for t in (dy, x, w))
        expected = reference.sparse_backward(*doubles, params, k)
    return _largest([_close(g, e) for g, e in zip(got, expected, strict=True)])


def _network(dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> float:
    """Compare gradients through batch norms and ReLUs, with Triton kernels and without."""
    found = []
    for on in (True, False):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 1),
            nn.BatchNorm2d(64),
            nn.Conv2d(64, 32, 3, stride=2),
        ).to(device, memory_format=layout)
        ssp.convert(model, _RATE)
        x = torch.randn(8, 3, 64, 64, device=device).contiguous(memory_format=layout)
        with _exactly(), triton(on and device.type == "cuda"):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(x).float().square().mean()
            loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    return _largest([_close(g, e) for g, e in zip(*found, strict=True)])


def _close(got: Tensor, expected: Tensor) -> float:
    """Return the error of a gradient relative to its largest element."""
    allowed = 2e-4 if got.dtype == torch.float32 else 2e-2
    size = expected.double().abs().max().clamp_min(1e-30)
    return _error(got, expected, allowed * size)


@contextlib.contextmanager
def _exactly() -> Iterator[None]:
    """Without TF32."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        # Not by setting it, which torch's own test utilities forbid.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
