"""Single and half precision, and autocast."""

import contextlib

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ssprop_patch import functional

from .convolutions import LAYERS, REAL, Case, _layer, assert_close, cases, real_case

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # by torch.func itself
]


# --- other dtypes -----------------------------------------------------------------------------

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def assert_within_rounding(grads, case, dense, keep, dtype):
    """Each entry as near to float64 as the size of its terms, or torch's own kernels, explain.

    ``dense`` is what these compute of the masked gradient: where the processor has no instructions
    for the dtype, they round more often.
    """
    tensors = (case.x, case.w, case.b, case.dy)
    exact, bounds = (
        Case(
            case.dims,
            *(None if t is None else change(t.double()) for t in tensors),
            case.geometry,
            case.drop_rate,
            case.needs,
        ).expected(keep)
        for change in (torch.clone, torch.abs)
    )
    for name, grad, true, bound, torchs in zip("xwb", grads, exact, bounds, dense, strict=True):
        if true is None:
            assert grad is None
            continue
        assert grad.dtype == dtype
        tiny = torch.finfo(dtype).smallest_normal
        usual = ((torchs.double() - true).abs() / (bound + tiny)).max()
        # Half precision is summed in float32 and rounded at the end, float32 as it comes.
        roundings = 16 if dtype == torch.float32 else 2
        allowed = (roundings * EPS[dtype] + 2 * usual) * bound + tiny
        error = (grad.double() - true).abs()
        assert (error <= allowed).all(), f"d{name} of {case}: {(error / allowed).max():g}"


class TorchsOwn(TorchDispatchMode):
    """Looks whether torch's convolutions return about what they return in float32.

    Those in bfloat16 do not on processors with AVX-512 BF16 or AMX (torch 2.14): of some with a
    stride or a dilation they leave memory that nobody wrote in the output or in a gradient. Nor
    does the weight gradient of some inputs in channels_last_3d (2.15).
    """

    CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)

    def __init__(self):
        super().__init__()
        self.are_right = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function in self.CONVOLUTIONS:
            wide = [a.float() if torch.is_tensor(a) else a for a in args]
            pairs = zip(*(pytree.tree_leaves(r) for r in (found, function(*wide))), strict=True)
            self.are_right &= all(got is None or is_about(got, like) for got, like in pairs)
        return found


def is_about(got, like):
    return not got.numel() or torch.allclose(
        got.float(), like, rtol=0.1, atol=0.1 * like.abs().max().item()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=100)
@given(st.data())
def test_other_dtypes(dtype, data):
    case = data.draw(cases(dtype=dtype))
    keep = case.choice().keep
    torchs = TorchsOwn() if dtype == torch.bfloat16 else contextlib.nullcontext()
    with torchs:
        y, grads = case.run()
        dense_y, dense = case.forward(), case.expected(keep)
    if dtype == torch.bfloat16:
        assume(torchs.are_right)
    assert torch.equal(y, dense_y)
    assert_within_rounding(grads, case, dense, keep, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("kernel_size, stride", [(1, 1), (1, 2), (3, 1)])
def test_sizes_of_real_layers_in_other_dtypes(kind, layout, kernel_size, stride, dtype):
    case = real_case(kind, layout, kernel_size, stride, 12, dtype)
    _, grads = case.run()
    keep = case.choice().keep
    assert_within_rounding(grads, case, case.expected(keep), keep, dtype)


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_wider_before_channels_are_compared(dtype, largest):
    # The two sums are 30 001 and 30 004, the same number in 8 or 11 bits.
    dy = torch.ones(1, 2, 30_001, dtype=dtype)
    dy[0, largest, :3] = 2
    x, w = torch.ones(1, 1, 30_001, dtype=dtype), torch.ones(2, 1, 1, dtype=dtype).requires_grad_()
    functional.conv1d(x, w, drop_rate=0.5).backward(dy)
    assert w.grad[largest] != 0 and w.grad[1 - largest] == 0


# --- autocast ---------------------------------------------------------------------------------


def _masked_reference(x, w, b, dy, keep, **geometry):
    """Output and gradients of the dense convolution, its dy masked; under the caller's autocast."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, w, b)]
    y = F.conv2d(*leaves, **geometry)
    y.backward(oracle.mask(dy, keep).to(y.dtype))
    return y.detach(), [None if t is None else t.grad for t in leaves]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups, layout", LAYERS)
@pytest.mark.parametrize("weight_dtype", [torch.float32, "half"], ids=str)
def test_autocast(half, groups, layout, weight_dtype):
    x, w, b, dy = _layer(groups, layout)
    if weight_dtype == "half":
        w, b = (t.detach().to(half).requires_grad_() for t in (w, b))
    dy = dy.to(half)
    choice = oracle.choose(dy, groups, 0.5)
    assert choice.gap > 1e-3
    with torch.autocast("cpu", dtype=half):
        y = functional.conv2d(x, w, b, groups=groups, drop_rate=0.5)
    y.backward(dy)
    with torch.autocast("cpu", dtype=half):
        dense, expected = _masked_reference(x, w, b, dy, choice.keep, groups=groups)
    assert y.dtype == half
    assert torch.equal(y, dense)
    for t, grad in zip((x, w, b), expected, strict=True):
        assert t.grad.dtype == t.dtype == grad.dtype
        torch.testing.assert_close(t.grad, grad, rtol=4 * EPS[half], atol=8 * EPS[half])
    assert not w.grad[~choice.keep].any() and not b.grad[~choice.keep].any()


def test_autocast_leaves_float64_alone():
    x, w, b, dy = _layer(1, "contiguous", torch.float64)
    choice = oracle.choose(dy, 1, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = functional.conv2d(x, w, b, drop_rate=0.5)
        assert y.dtype == torch.float64 == F.conv2d(x, w, b).dtype
        y.backward(dy)
    expected = oracle.gradients(x.detach(), w.detach(), b, dy, choice.keep)
    for t, grad in zip((x, w, b), expected, strict=True):
        assert_close(t.grad, grad)


def test_backward_inside_of_autocast_computes_as_outside():
    grads = []
    for inside in (False, True):
        torch.manual_seed(3)
        x, w, b, dy = _layer(1, "contiguous")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = functional.conv2d(x, w, b, drop_rate=0.5)
            if inside:
                y.backward(dy.bfloat16())
        if not inside:
            y.backward(dy.bfloat16())
        grads.append((x.grad, w.grad, b.grad))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_the_backward_is_out_of_reach_of_autocast_as_the_dense_one_is():
    seen = []

    def scores(dy):
        seen.append((torch.is_autocast_enabled("cpu"), torch.mm(dy[0, 0], dy[0, 0]).dtype))
        return dy.abs().sum((0, 2, 3))

    x, w, b, dy = _layer(1, "contiguous")
    y = functional.conv2d(x, w, b, drop_rate=0.5, selection=scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.backward(dy)
    assert seen == [(False, torch.float32)]


def test_a_float32_convolution_whose_backward_runs_inside_of_autocast_stays_float32():
    x, w, b, dy = _layer(1, "contiguous")
    y = functional.conv2d(x, w, b, drop_rate=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.backward(dy)
    keep = oracle.choose(dy, 1, 0.5).keep
    case = Case(2, x.detach(), w.detach(), b.detach(), dy, {"groups": 1}, 0.5, (True,) * 3)
    grads = x.grad, w.grad, b.grad
    assert_within_rounding(grads, case, case.expected(keep), keep, torch.float32)
