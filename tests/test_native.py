"""The C functions against torch's own operations in float64, and when they stand aside."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ssprop_patch import native, passes
from ssprop_patch.native import build

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

needs_compiler = pytest.mark.skipif(
    build.find_compiler() is None, reason="there is no C compiler"
)
DTYPES = {torch.float32: 2e-5, torch.float64: 1e-12}  # and what rounding may cost

SHAPES = [
    (3, 5, 7, 3),  # no size a multiple of anything
    (2, 16, 4, 4),
    (1, 1, 1, 1),
    (5, 33),  # of a linear layer
    (2, 6, 2500),  # more than one block
    (2, 3, 2, 3, 5),
    (3, 8, 1, 1),  # as in memory, rows of channels
    (1, 40, 1, 2),
    (0, 4, 3, 3),
]


@pytest.fixture(params=[1, 2, 5])
def threads(request, monkeypatch):
    for module in (native.channels, native.norm, native.rows):
        monkeypatch.setattr(module, "threads_for", lambda *args: request.param)


def random(shape, dtype, last, seed=0):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lying(t.to(dtype), last)


def lying(t, last):
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if last else t.contiguous()


def assert_close(got, expected, dtype):
    assert got.dtype == dtype
    tolerance = DTYPES[dtype]
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        got.double(), expected, rtol=tolerance, atol=tolerance * max(1.0, largest)
    )


def each_case(shapes):
    def decorate(test):
        for name, values in (
            ("shape", shapes), ("last", [False, True]), ("dtype", list(DTYPES)),
        ):  # fmt: skip
            test = pytest.mark.parametrize(name, values, ids=str)(test)
        return needs_compiler(test)

    return decorate


# --- what they compute --------------------------------------------------------------------------


@each_case(SHAPES)
@pytest.mark.parametrize("order", [1, 2])
def test_channel_sums(shape, last, dtype, order, threads):
    t = random(shape, dtype, last)
    dims = [0, *range(2, t.dim())]
    assert_close(native.channel_sums(t, order), t.double().abs().pow(order).sum(dims), dtype)


@each_case([*SHAPES, (3, 60, 5, 5)])
@pytest.mark.parametrize("order", [1, 2])
def test_the_largest_channels(shape, last, dtype, order, threads):
    t = random(shape, dtype, last)
    groups = 3 if shape[1] % 3 == 0 else 1
    k = (shape[1] // groups + 1) // 2
    expected = native.largest(native.channel_sums(t, order), k, groups)
    assert torch.equal(native.largest_channels(t, order, k, groups), expected)


@each_case(SHAPES)
def test_take_channels(shape, last, dtype, threads):
    t = random(shape, dtype, last)
    index = torch.randperm(shape[1])[: max(1, shape[1] // 2)].sort().values
    taken = native.take_channels(t, index)
    assert torch.equal(taken, t[:, index]) and taken.dtype == dtype
    assert taken.stride() == lying(taken, last and t.dim() > 2).stride()


@each_case([(5, 3, 3, 3), (16, 40), (7, 1, 1, 1), (9, 2, 2, 3, 4)])
@pytest.mark.parametrize("places", [[0], [1, 2], "last", "all"], ids=str)
def test_put_rows(shape, last, dtype, places, threads):
    like = random(shape, dtype, last)
    n = shape[0]
    places = {"last": [n - 1], "all": list(range(n))}.get(str(places), places)
    index = torch.tensor(places, dtype=torch.int64)
    rows = lying(random((len(places), *shape[1:]), dtype, False, 2), last)
    out = native.put_rows(rows, index, like)
    if 1 in shape and out is None:  # of sizes of 1 the strides may differ
        assert rows.stride() != like.stride()
        return
    assert torch.equal(out, torch.zeros_like(like).index_copy_(0, index, rows))
    assert out.stride() == like.stride()


@each_case([(5, 3, 3, 3), (16, 40), (9, 600), (7, 1, 1, 1)])
@pytest.mark.parametrize("n", [1, 6])
def test_put_sums(shape, last, dtype, n, threads):
    like = random(shape, dtype, False)
    index = torch.tensor([0, 2, shape[0] - 1])
    parts = random((n, 3, *shape[1:]), dtype, False, 2)
    out = native.put_sums(parts, index, like)
    expected = torch.zeros(shape, dtype=torch.float64).index_copy_(0, index, parts.double().sum(0))
    assert_close(out, expected, dtype)
    out = passes.put_sums(parts, index, lying(like, last))  # in C or not
    assert out.stride() == lying(like, last).stride()
    assert_close(out, expected, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("size", [1, 2, 5, 64, 999])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("values", ["different", "few", "one", "ascending", "descending"])
def test_the_largest_of_each_group(dtype, size, groups, values):
    scores = random((groups * size,), dtype, False)
    scores = {
        "few": scores.round(), "one": torch.ones_like(scores), "different": scores,
        "ascending": scores.sort().values, "descending": scores.sort(descending=True).values,
    }[values]  # fmt: skip
    for k in {1, size // 5 + 1, size - 1, size} - {0}:
        index = native.largest(scores, k, groups)
        assert index.dtype == torch.int64 and index.shape == (groups * k,)
        for g in range(groups):
            of_group = range(g * size, (g + 1) * size)
            ranked = sorted(of_group, key=lambda i: (-scores[i].item(), i))  # the first of equals
            assert index[g * k : (g + 1) * k].tolist() == sorted(ranked[:k])


@needs_compiler
def test_the_largest_where_some_are_not_finite():
    inf, nan = math.inf, math.nan
    scores = torch.tensor([1.0, nan, -inf, 3.0, inf, nan, 0.0, 2.0])
    assert native.largest(scores, 3, 1).tolist() == [1, 4, 5]
    assert native.largest(scores, 5, 1).tolist() == [1, 3, 4, 5, 7]
    assert native.largest(scores, 2, 2).tolist() == [1, 3, 4, 5]
    assert native.largest(torch.full((4,), nan), 2, 1).tolist() == [0, 1]
    assert native.largest(scores[::2], 2, 1).tolist() == [0, 2]


@needs_compiler
def test_rows_that_lie_otherwise_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(passes, "_LARGE_WEIGHT", 0)
    like, index = torch.randn(5, 4, 3, 3), torch.tensor([0, 3])
    rows = lying(torch.randn(2, 4, 3, 3), True)
    assert native.put_rows(rows, index, like) is None
    assert native.put_rows(rows.double(), index, lying(like, True)) is None
    out = passes.put_rows(rows, index, like)
    assert torch.equal(out[index], rows) and out.stride() == like.stride()


class Norm:
    """One batch norm in training mode, a ReLU behind it or not: its backward by autograd."""

    def __init__(self, shape, dtype, last, affine=True, relu=False):
        self.x, self.dz = (random(shape, dtype, last, seed) for seed in (1, 2))
        self.relu_out = random(shape, dtype, last, 4).relu() if relu else None
        dz = self.dz.double()
        if relu:
            dz = torch.where(self.relu_out > 0, dz, 0)
        self.weight = random((1, shape[1]), dtype, False, 3)[0] if affine else None
        x = self.x.double().requires_grad_()
        dims = [0, *range(2, x.dim())]
        self.mean = x.mean(dims).detach()
        self.invstd = (x.var(dims, unbiased=False) + 1e-3).rsqrt().detach()
        weight = None if self.weight is None else self.weight.double()
        z = torch.nn.functional.batch_norm(x, None, None, weight, training=True, eps=1e-3)
        (self.dy,) = torch.autograd.grad(z, x, dz)
        line = (1, -1, *[1] * (x.dim() - 2))
        xhat = (x.detach() - self.mean.view(line)) * self.invstd.view(line)
        self.sum_dz, self.sum_dz_xhat = dz.sum(dims), (dz * xhat).sum(dims)
        self.sum_dy = {n: self.dy.abs().pow(n).sum(dims) for n in (1, 2)}
        self.mean, self.invstd = self.mean.to(dtype), self.invstd.to(dtype)


NORM_SHAPES = [s for s in SHAPES if math.prod(s) > s[1]]  # torch's norm wants two positions


@each_case(NORM_SHAPES)
@pytest.mark.parametrize("affine, relu", [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("order", [1, 2])
def test_norm_sums(shape, last, dtype, affine, relu, order, threads):
    norm = Norm(shape, dtype, last, affine, relu)
    got = native.norm_sums(
        norm.dz, norm.x, norm.weight, norm.mean, norm.invstd, order, norm.relu_out
    )
    for sums, expected in zip(
        got, (norm.sum_dz, norm.sum_dz_xhat, norm.sum_dy[order]), strict=True
    ):
        assert_close(sums, expected, dtype)


@each_case(NORM_SHAPES)
@pytest.mark.parametrize("affine, relu", [(True, True), (False, False), (True, False)])
def test_norm_input_grad(shape, last, dtype, affine, relu, threads):
    norm = Norm(shape, dtype, last, affine, relu)
    index = torch.randperm(shape[1])[: max(1, shape[1] // 2)].sort().values
    got = native.norm_input_grad(
        norm.dz, norm.x, norm.weight, norm.mean, norm.invstd,
        norm.sum_dz.to(dtype), norm.sum_dz_xhat.to(dtype), index, norm.relu_out,
    )  # fmt: skip
    assert_close(got, norm.dy[:, index], dtype)
    assert got.stride() == lying(got, last and got.dim() > 2).stride()


@needs_compiler
@pytest.mark.parametrize("last", [False, True])
def test_a_gradient_that_lies_otherwise_than_the_input(last):
    norm = Norm((2, 6, 4, 3), torch.float64, last)
    vectors = norm.weight, norm.mean, norm.invstd
    index = torch.tensor([1, 4])
    for dz in (lying(norm.dz, not last), norm.dz.float(), norm.dz[:, :, :, :1].expand_as(norm.dz)):
        like = lying(dz.double(), last)
        got = native.norm_sums(dz, norm.x, *vectors, 1)
        for one, two in zip(got, native.norm_sums(like, norm.x, *vectors, 1), strict=True):
            assert torch.equal(one, two)
        sums = got[:2]
        assert torch.equal(
            native.norm_input_grad(dz, norm.x, *vectors, *sums, index),
            native.norm_input_grad(like, norm.x, *vectors, *sums, index),
        )


@needs_compiler
@pytest.mark.parametrize("last", [False, True])
def test_a_relu_output_that_lies_otherwise_than_the_input(last):
    norm = Norm((2, 6, 4, 3), torch.float64, last, relu=True)
    vectors = norm.weight, norm.mean, norm.invstd
    sums = [
        native.norm_sums(norm.dz, norm.x, *vectors, 1, out)
        for out in (norm.relu_out, lying(norm.relu_out, not last))
    ]
    assert all(map(torch.equal, *sums))
    got = [
        native.norm_input_grad(
            norm.dz, norm.x, *vectors, *sums[0][:2], torch.tensor([1, 4]), out
        )
        for out in (norm.relu_out, lying(norm.relu_out, not last))
    ]
    assert torch.equal(*got)


@needs_compiler
@pytest.mark.parametrize("last", [False, True])
def test_a_nan_passes_the_gradient_of_a_relu(last):
    norm = Norm((2, 6, 4, 5), torch.float64, last)
    out = lying(torch.full_like(norm.x, math.nan), last)
    expected = torch.ops.aten.threshold_backward(norm.dz, out, 0)
    assert torch.equal(expected, norm.dz)
    vectors = norm.weight, norm.mean, norm.invstd
    assert all(map(
        torch.equal,
        native.norm_sums(norm.dz, norm.x, *vectors, 1, out),
        native.norm_sums(norm.dz, norm.x, *vectors, 1),
    ))  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_not_lost(value, last):
    t = random((2, 3, 5, 7), torch.float32, last)
    t[1, 2, 4, 6] = value
    sums = native.channel_sums(t, 1)
    assert sums[:2].isfinite().all() and str(sums[2].item()) == str(abs(value))


@needs_compiler
def test_the_same_bits_every_time():
    norm = Norm((4, 32, 40, 40), torch.float32, True)
    arguments = norm.dz, norm.x, norm.weight, norm.mean, norm.invstd, 1
    first = native.norm_sums(*arguments)
    for _ in range(5):
        assert all(map(torch.equal, first, native.norm_sums(*arguments)))


# --- when they are used -------------------------------------------------------------------------


@needs_compiler
def test_ordinary_tensors_are_taken():
    t = torch.randn(2, 3, 4, 4)
    for taken in (t, t.double(), t.contiguous(memory_format=torch.channels_last), t[:1],
                  torch.nn.Parameter(t).detach(), t.flatten(1)):  # fmt: skip
        assert native.is_available(taken)
        assert passes._kernels(taken) is native


def untaken():
    t = torch.randn(2, 3, 4, 4)
    yield "half precision", t.bfloat16()
    yield "half precision", t.half()
    yield "integers", t.long()
    yield "strides", t[:, :, ::2]
    yield "strides", t[..., :1].expand_as(t)
    yield "strides", t[:, ::2]
    yield "strides", t[:, :, 0, 0]
    yield "meta", t.to("meta")
    yield "fake", FakeTensorMode().from_tensor(t)
    yield "negative view", torch.complex(t, t).conj().imag
    yield "sparse", t.to_sparse()
    yield "asked for its gradient", t.requires_grad_()


@pytest.mark.parametrize("why, t", list(untaken()), ids=lambda v: v if isinstance(v, str) else "")
def test_others_are_not(why, t):
    assert not native.is_available(t)


def test_not_inside_of_a_transform():
    def f(t):
        assert not native.is_available(t)
        return t.sum()

    t = torch.randn(2, 3, 4, 4)
    torch.func.vmap(f)(t)
    torch.func.grad(f)(t)


@pytest.fixture
def fresh_build(monkeypatch):
    monkeypatch.delenv("SSPROP_PATCH_NATIVE", raising=False)
    build.library.cache_clear()
    yield
    build.library.cache_clear()


def test_switched_off(fresh_build, monkeypatch):
    monkeypatch.setenv("SSPROP_PATCH_NATIVE", "0")
    assert build.library("float") is None
    assert not native.is_available(torch.ones(2, 2))


def test_without_a_compiler_nothing_is_said(fresh_build, monkeypatch, recwarn):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.library("float") is None and not recwarn


@pytest.mark.parametrize("compiler", ["false", "a-compiler-that-is-not-there"])
def test_a_compiler_that_fails_is_warned_of(compiler, fresh_build, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    with pytest.warns(UserWarning, match="could not compile.*torch's own operations are used"):
        assert build.library("float") is None
    t = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(passes.channel_sum(t, 1), t.abs().sum((0, 2, 3)))


@needs_compiler
def test_it_compiles_without_a_word():
    # In a process of its own, with every warning an error.
    code = "from ssprop_patch.native import build; print(build.library('float'))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert "CDLL" in done.stdout and not done.stderr


@needs_compiler
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("n", [1, 3, 4, 9])
@pytest.mark.parametrize("c_in, c_out, kept", [(1, 1, 1), (3, 7, 2), (33, 20, 4), (16, 9, 9)])
def test_rows_backward(dtype, n, c_in, c_out, kept, threads):
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(shape, generator=generator, dtype=torch.float64)
                for shape in ((n, c_in, 1, 1), (c_out, c_in, 1, 1), (n, c_out, 1, 1)))  # fmt: skip
    index = torch.randperm(c_out, generator=generator)[:kept].sort().values
    masked = torch.zeros_like(dy).index_copy_(1, index, dy[:, index])
    expected = torch.ops.aten.convolution_backward(
        masked, x, w, [c_out], (1, 1), (0, 0), (1, 1), False, (0, 0), 1, [True] * 3
    )
    args = [t.to(dtype) for t in (dy[:, index], x, w)]
    for needed in ((True, True, True), (True, False, False), (False, True, False),
                   (False, False, True)):  # fmt: skip
        grads = native.rows_backward(*args, index, needed)
        for got, like, need in zip(grads, expected, needed, strict=True):
            if need:
                assert got.shape == like.shape
                assert_close(got, like, dtype)
            else:
                assert got is None


def test_the_sources_are_packaged():
    # setuptools leaves out of a wheel what is neither Python nor named in pyproject.toml.
    root = Path(native.__file__).parents[1]
    pyproject = root.with_name("pyproject.toml")
    if not pyproject.exists():
        pytest.skip("the package is installed without its repository")
    patterns = tomllib.loads(pyproject.read_text())["tool"]["setuptools"]["package-data"]
    packaged = {file for pattern in patterns["ssprop_patch"] for file in root.glob(pattern)}
    needed = {f for f in root.rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")}
    assert {"conv.c", "layout.h", "py.typed"} <= {f.name for f in needed}
    assert packaged == needed
