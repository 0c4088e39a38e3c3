"""Generated convolutions, and layers of the sizes of real ones, held against the oracle."""

import functools
from unittest import mock

import oracle
import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st

from ssprop_patch import functional, kernels
from ssprop_patch.ops.algorithms import DW, DX, Algorithms, candidates

SSP = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
CHANNELS_LAST = {1: None, 2: torch.channels_last, 3: torch.channels_last_3d}


class Case:
    """One convolution, the gradient of its output, and who wants a gradient."""

    def __init__(self, dims, x, w, b, dy, geometry, drop_rate, needs):
        self.dims, self.x, self.w, self.b, self.dy = dims, x, w, b, dy
        self.geometry, self.drop_rate, self.needs = geometry, drop_rate, needs

    @property
    def groups(self):
        return self.geometry["groups"]

    def choice(self):
        batched = self.dy if self.dy.dim() == self.dims + 2 else self.dy[None]
        return oracle.choose(batched, self.groups, self.drop_rate)

    def forward(self):
        """The output of torch's own convolution."""
        return oracle.CONV[self.dims](self.x, self.w, self.b, **self.geometry)

    def expected(self, keep):
        """(dX, dW, db), None where not needed."""
        grads = oracle.gradients(self.x, self.w, self.b, self.dy, keep, **self.geometry)
        return tuple(g if need else None for g, need in zip(grads, self.needs, strict=True))

    def leaves(self):
        return tuple(
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip((self.x, self.w, self.b), self.needs, strict=True)
        )

    def run(self, **kwargs):
        """Output and the gradients that land in ``.grad``."""
        x, w, b = self.leaves()
        kwargs = {"drop_rate": self.drop_rate, **kwargs}
        y = SSP[self.dims](x, w, b, **self.geometry, **kwargs)
        y.backward(self.dy)
        return y.detach(), tuple(None if t is None else t.grad for t in (x, w, b))

    def __repr__(self):
        shapes = {n: tuple(t.shape) for n, t in zip("xw", (self.x, self.w), strict=True)}
        strides = {n: t.stride() for n, t in (("x", self.x), ("w", self.w), ("dy", self.dy))}
        return (
            f"Case({self.dims}d, {shapes}, bias={self.b is not None}, {self.geometry}, strides="
            f"{strides}, dtype={self.x.dtype}, rate={self.drop_rate}, needs={self.needs})"
        )


KINDS = ("full", "grouped", "depthwise", "depthwise_wide", "multiplier")
PADDINGS = ("numbers", "numbers", "same", "valid")
LAYOUTS = ("contiguous", "channels_last", "transposed", "strided")
RATES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.8, 0.99]) | st.floats(0.0, 0.999)


@st.composite
def channels(draw):
    """(C_in, C_out, groups) of every kind that nn.ConvNd knows."""
    kind = draw(st.sampled_from(KINDS))
    if kind == "full":
        return draw(st.integers(1, 6)), draw(st.integers(1, 12)), 1
    g = draw(st.integers(2, 4))
    if kind == "grouped":
        return g * draw(st.integers(1, 3)), g * draw(st.integers(2, 5)), g
    if kind == "depthwise":
        return g + 2, g + 2, g + 2
    if kind == "depthwise_wide":
        return g * draw(st.integers(2, 3)), g, g
    return g, g * draw(st.integers(2, 4)), g


@st.composite
def sizes(draw, dims, least, most):
    """A number or a tuple, as convolutions take them; and the tuple."""
    if draw(st.booleans()):
        n = draw(st.integers(least, most))
        return n, (n,) * dims
    values = tuple(draw(st.integers(least, most)) for _ in range(dims))
    return values, values


def laid_out(t, layout, dims):
    """t in another memory layout; same values."""
    if layout == "channels_last" and t.dim() == dims + 2 and dims > 1:
        return t.contiguous(memory_format=CHANNELS_LAST[dims])
    if layout == "transposed":
        return t.transpose(-1, 0).contiguous().transpose(-1, 0)
    if layout == "strided":
        return torch.stack([t, t + 1], dim=-1)[..., 0]
    return t.contiguous()


@st.composite
def cases(draw, dtype=torch.float64, drop_rates=RATES, pointwise=False):
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    c_in, c_out, groups = draw(channels())
    kernel = tuple(draw(st.integers(1, 4 if dims < 3 else 3)) for _ in range(dims))
    if pointwise:
        groups, kernel = 1, (1,) * dims
    dilation, dilations = draw(sizes(dims, 1, 2))
    padding = draw(st.sampled_from(["same", "valid"] if pointwise else PADDINGS))
    stride = 1 if padding == "same" else draw(sizes(dims, 1, 3))[0]
    if padding == "numbers":
        padding, pads = draw(sizes(dims, 0, 2))
    else:
        pads = (0,) * dims
    extents = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    size = [
        max(1, e - 2 * p + draw(st.integers(0, 5 if dims < 3 else 2)))
        for e, p in zip(extents, pads, strict=True)
    ]
    batch = draw(st.sampled_from([1, 2, 3, None]))
    bias = draw(st.booleans())
    needs = draw(
        st.tuples(st.booleans(), st.booleans(), st.booleans() if bias else st.just(False)).filter(
            any
        )
    )
    layouts = st.sampled_from(["contiguous", *LAYOUTS])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    randn = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
    x = randn(*(() if batch is None else (batch,)), c_in, *size)
    w = randn(c_out, c_in // groups, *kernel)
    b = randn(c_out) if bias else None
    x, w = laid_out(x, draw(layouts), dims), laid_out(w, draw(layouts), dims)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    dy = randn(oracle.CONV[dims](x, w, **geometry).shape)
    assume(_torch_is_right(dims, x, w, dy, geometry))
    x, w, b = (None if t is None else t.to(dtype) for t in (x, w, b))
    if draw(st.booleans()):  # heavy tails: what is large by its mean is not by its maximum
        dy = dy**3
    dy = laid_out(dy.to(dtype), draw(layouts), dims)
    case = Case(dims, x, w, b, dy, geometry, draw(drop_rates), needs)
    assume(case.choice().gap > 1e-6)  # a tie may be broken either way
    return case


def _torch_is_right(dims, x, w, dy, geometry):
    """Whether the dense gradient is what it is for contiguous tensors.

    It is not for groups over input such as (1, 4, 1, 2) of strides (1, 1, 1, 4) (torch 2.15, CPU).
    """
    leaves = [t.detach().requires_grad_() for t in (x, w)]
    oracle.CONV[dims](*leaves, **geometry).backward(dy)
    plain = [t.contiguous() for t in (x, w)]
    everything = torch.ones(len(w), dtype=torch.bool)
    right = oracle.gradients(*plain, None, dy.contiguous(), everything, **geometry)
    return all(torch.allclose(t.grad, grad) for t, grad in zip(leaves, right[:2], strict=True))


def assert_close(actual, expected, rtol=1e-10, what=""):
    """Within ``rtol`` of the largest entry."""
    if expected is None or actual is None:
        assert actual is expected is None, what
        return
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    if expected.numel() == 0:
        return
    error = (actual - expected).abs().max().item()
    assert error <= rtol * expected.abs().max().item(), f"{what}: off by {error:g}"


def _strides(t):
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def by(kernel):
    """Have every sparse backward computed in one way."""
    return mock.patch.object(kernels, "choose", lambda *args: Algorithms(kernel, kernel))


def by_each():
    """Yield contexts in which the ways that a convolution has are used in turn, and those used."""

    def choose(kept, need_x, need_w, turn):
        dx, dw = candidates(kept.whole_x, kept.whole_w, kept.p)
        used.append(Algorithms(dx[turn % len(dx)], dw[turn % len(dw)]))
        return used[-1]

    for turn in range(max(len(DX), len(DW))):
        used = []
        with mock.patch.object(kernels, "choose", functools.partial(choose, turn=turn)):
            yield used


REAL = {
    "full": (24, 40, 1),
    "wide": (20, 176, 1),
    "grouped": (32, 48, 4),
    "depthwise": (40, 40, 40),
    "depthwise_wide": (40, 20, 20),
    "multiplier": (20, 40, 20),
}


def real_case(kind, layout, kernel_size, stride, spatial, dtype=torch.float64):
    c_in, c_out, groups = REAL[kind]
    geometry = {"padding": kernel_size // 2, "stride": stride, "dilation": 1, "groups": groups}
    x = torch.randn(4, c_in, spatial, spatial, dtype=dtype)
    w = torch.randn(c_out, c_in // groups, kernel_size, kernel_size, dtype=dtype)
    b = torch.randn(c_out, dtype=dtype)
    dy = torch.randn(F.conv2d(x, w, **geometry).shape, dtype=dtype)
    x, dy = laid_out(x, layout, 2), laid_out(dy, layout, 2)
    case = Case(2, x, w, b, dy, geometry, 0.8, (True, True, True))
    assert case.choice().gap > 1e-9
    return case


LAYERS = [
    (1, "contiguous"),
    (1, "channels_last"),
    (2, "contiguous"),
    (2, "channels_last"),
    (8, "contiguous"),
    (8, "channels_last"),
]


def _layer(groups, layout, dtype=torch.float32):
    x = laid_out(torch.randn(2, 8, 5, 5, dtype=dtype), layout, 2).requires_grad_()
    w = torch.randn(8, 8 // groups, 3, 3, dtype=dtype, requires_grad=True)
    b = torch.randn(8, dtype=dtype, requires_grad=True)
    dy = laid_out(torch.randn(2, 8, 3, 3, dtype=dtype), layout, 2)
    return x, w, b, dy
