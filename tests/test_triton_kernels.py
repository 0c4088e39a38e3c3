"""The Triton kernels against plain torch in float64, and what the compiler makes of them.

Without a GPU they run in Triton's interpreter; with one, on it too, and on larger tensors.
"""

import copy
import pickle
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context

import oracle
import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch import lazy_grad, passes, triton_kernels
from ssprop_patch.triton_kernels import layout

triton = pytest.importorskip("triton")
kernels = import_module("ssprop_patch.triton_kernels.kernels")

SHAPES = [
    (3, 5, 7, 7),
    (1, 1, 1),
    (2, 1, 5, 3),
    (5, 70),  # more channels than a block
    (2, 70, 70),
    (700, 33),  # more rows than the programs take in one go
    (2, 3, 1500),
    (9, 24, 2, 4),
    (2, 6, 3, 4, 5),
    (4, 8, 1, 1),
]
LARGE_SHAPES = [(64, 256, 56, 56), (33, 515, 7, 7), (100_000, 96), (8, 64, 9, 30, 30)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last"]


# --- where they run ---------------------------------------------------------------------------


def in_this_process(pickled: bytes) -> bytes:
    function, args = pickle.loads(pickled)
    return pickle.dumps(function(*args))


def with_wide_offsets(function, *args):
    """Call ``function`` as if its tensors were too large for offsets of 32 bits."""
    span, layout._INT32_SPAN = layout._INT32_SPAN, 0
    try:
        return function(*args)
    finally:
        layout._INT32_SPAN = span


class Interpreter:
    """Calls functions in a process where Triton's own functions are interpreted as well.

    Whether they are is decided when triton is imported; in this process torch.compile needs it
    as it is.
    """

    device = "cpu"

    def __init__(self, pool):
        self.pool = pool

    def __call__(self, function, *args):
        return pickle.loads(
            self.pool.submit(in_this_process, pickle.dumps((function, args))).result()
        )


class Gpu:
    device = "cuda"

    def __call__(self, function, *args):
        return function(*args)


@pytest.fixture(scope="module")
def interpreter():
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("TRITON_INTERPRET", "1")
        pool.submit(int).result()  # the process starts here
        environment.undo()
        run = Interpreter(pool)
        try:
            run(triton_kernels.channel_sums, torch.ones(1, 1), 1)
        except Exception as error:
            if "only 0-dimensional arrays" not in str(error):
                raise
            pytest.skip("this triton (3.6 for one) cannot interpret loops with numpy 2.4 or later")
        yield run


@pytest.fixture
def run(request):
    return Gpu() if request.param == "cuda" else request.getfixturevalue("interpreter")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PLACES = ["interpreter", "cuda"] if torch.cuda.is_available() else ["interpreter"]
everywhere = pytest.mark.parametrize("run", PLACES, indirect=True)
# In the interpreter, which takes its time, all dtypes for the first shape only.
over_shapes_and_dtypes = pytest.mark.parametrize(
    ("run", "shape", "dtype"),
    [
        (place, shape, dtype)
        for place in PLACES
        for shape in (SHAPES if place == "interpreter" else SHAPES + LARGE_SHAPES)
        for dtype in DTYPES
        if place == "cuda" or shape == SHAPES[0] or dtype == torch.bfloat16
    ],
    indirect=["run"],
    ids=str,
)
over_layouts = pytest.mark.parametrize("memory_format", LAYOUTS)


# --- tensors and what is expected -------------------------------------------------------------


def tensor(run, shape, dtype, memory_format="contiguous"):
    t = torch.randn(shape, dtype=torch.float64).to(dtype)
    if memory_format == "channels_last":
        t = t.movedim(1, -1).contiguous().movedim(-1, 1)
    return t.to(run.device)


def per_channel(t):
    return t.sum([0, *range(2, t.dim())])


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_sums(got, expected, terms):
    """Compare sums, exactly to the rounding of sums of the sizes of ``terms``."""
    assert got.dtype == accumulator(terms.dtype)
    unit = 1e-14 if got.dtype == torch.float64 else 4e-6
    error = (got.double() - expected.to(got.device)).abs()
    assert (error <= unit * per_channel(terms.double().abs())).all(), error


def assert_lies_like(got, t):
    assert got.is_contiguous() if t.is_contiguous() else got.movedim(1, -1).is_contiguous()


def norm_case(run, shape, dtype, memory_format, relu):
    """Return (dz, y, mean, invstd, relu_out), and dz behind the ReLU."""
    y = tensor(run, shape, dtype, memory_format) + 1  # shows a mean that is forgotten
    dz = tensor(run, shape, dtype, memory_format)
    relu_out = tensor(run, shape, dtype, memory_format).relu() if relu else None
    dims = [0, *range(2, y.dim())]
    mean = y.double().mean(dims).to(accumulator(dtype))
    variance = y.double().square().mean(dims) - y.double().mean(dims).square()
    invstd = variance.clamp_min(0).add(1e-3).rsqrt().to(accumulator(dtype))
    passed = torch.where(relu_out > 0, dz, 0) if relu else dz
    return (dz, y, mean, invstd, relu_out), passed


def by_torch(passed, y, weight, mean, invstd):
    """Return (dy, sum of dz * xhat, sum of dz) of torch's batch norm, in float64 on the CPU."""
    doubles = [None if t is None else t.double().cpu() for t in (passed, y, weight, mean, invstd)]
    dz, y, weight, mean, invstd = doubles
    return torch.ops.aten.native_batch_norm_backward(
        dz, y, weight, None, None, mean, invstd, True, 0.0, [True] * 3
    )


# --- sums -------------------------------------------------------------------------------------


@over_shapes_and_dtypes
@over_layouts
@pytest.mark.parametrize("order", [1, 2])
def test_channel_sums(run, shape, memory_format, dtype, order):
    dy = tensor(run, shape, dtype, memory_format)
    terms = dy.double().abs() ** order
    sums = run(triton_kernels.channel_sums, dy, order)
    assert sums.shape == shape[1:2]
    assert_sums(sums, per_channel(terms), terms.to(dy.dtype))


@everywhere
def test_channel_sums_do_not_overflow_or_stick_in_half_precision(run):
    dy = torch.full((3, 2, 5000), 100.0, dtype=torch.float16, device=run.device)
    assert run(triton_kernels.channel_sums, dy, 2).tolist() == [1.5e8] * 2


@everywhere
def test_channel_sums_keep_a_nan_and_an_infinity_in_their_channels(run):
    dy = tensor(run, (2, 4, 9), torch.float32)
    dy[1, 1, 3], dy[0, 2, 8] = float("nan"), float("-inf")
    sums = run(triton_kernels.channel_sums, dy, 1)
    assert sums.isnan().tolist() == [False, True, False, False]
    assert sums.isinf().tolist() == [False, False, True, False]


@over_shapes_and_dtypes
@over_layouts
@pytest.mark.parametrize("relu", [False, True])
def test_norm_sums(run, shape, memory_format, relu, dtype):
    arguments, passed = norm_case(run, shape, dtype, memory_format, relu)
    _, y, mean, invstd, _ = arguments
    sum_dz, sum_dz_xhat, sum_dz2 = run(triton_kernels.norm_sums, *arguments)
    _, weight_grad, bias_grad = by_torch(passed, y, None, mean, invstd)
    assert_sums(sum_dz, bias_grad, passed)
    assert_sums(sum_dz2, per_channel(passed.double() ** 2), passed**2)
    one = [1, -1, *[1] * (y.dim() - 2)]
    xhat = (y.double() - mean.double().view(one)) * invstd.double().view(one)
    assert_sums(sum_dz_xhat, weight_grad, (passed.double() * xhat).to(dtype))


@over_shapes_and_dtypes
@over_layouts
@pytest.mark.parametrize("relu", [False, True])
def test_norm_grad_sums(run, shape, memory_format, relu, dtype):
    (dz, y, mean, invstd, relu_out), passed = norm_case(run, shape, dtype, memory_format, relu)
    dy, sum_dz_xhat, sum_dz = (
        g.to(run.device) for g in by_torch(passed, y, None, mean, invstd)
    )
    sums = sum_dz.to(mean.dtype), sum_dz_xhat.to(mean.dtype)
    got = run(triton_kernels.norm_grad_sums, dz, y, mean, invstd, *sums, relu_out)
    assert got.dtype == accumulator(dtype) and got.shape == shape[1:2]
    # Of what each element is computed of, however much of it cancels.
    unit = 1e-13 if dtype == torch.float64 else 4e-6
    size = invstd.double() * per_channel(dz.double().abs() + 1)
    assert ((got.double() - per_channel(dy.abs())).abs() <= unit * size).all()


@everywhere
def test_a_gradient_that_lies_otherwise_than_the_input(run):
    (dz, y, mean, invstd, _), passed = norm_case(
        run, (2, 9, 5, 4), torch.float32, "channels_last", False
    )
    _, weight_grad, _ = by_torch(passed, y, None, mean, invstd)
    dz = dz.contiguous()
    sums = run(triton_kernels.norm_sums, dz, y, mean, invstd)
    torch.testing.assert_close(sums[1].cpu().double(), weight_grad, rtol=1e-5, atol=1e-5)
    relu_out = torch.ones(1, device=run.device).expand_as(y)  # no memory format at all
    again = run(triton_kernels.norm_sums, dz, y, mean, invstd, relu_out)
    assert torch.equal(again[1], sums[1])


@everywhere
def test_a_gradient_passes_where_the_output_of_the_relu_is_nan(run):
    (dz, y, mean, invstd, _), _ = norm_case(run, (2, 3, 5), torch.float32, "contiguous", False)
    relu_out = torch.tensor([0.0, 1.0, float("nan")], device=run.device).view(1, 3, 1).expand_as(y)
    expected = torch.ops.aten.threshold_backward(dz, relu_out, 0)
    sum_dz, _, _ = run(triton_kernels.norm_sums, dz, y, mean, invstd, relu_out)
    torch.testing.assert_close(sum_dz, per_channel(expected))


# --- one channel of many ----------------------------------------------------------------------


def some_channels(run, channels):
    """Return about a third of the channels, in no order."""
    return torch.randperm(channels)[: -(-channels // 3)].to(run.device)


@over_shapes_and_dtypes
@over_layouts
def test_take_channels(run, shape, memory_format, dtype):
    t = tensor(run, shape, dtype, memory_format)
    index = some_channels(run, shape[1])
    taken = run(triton_kernels.take_channels, t, index)
    assert torch.equal(taken, t[:, index])
    assert taken.dtype == dtype
    assert_lies_like(taken, t)


@everywhere
@over_layouts
def test_more_channels_than_there_are(run, memory_format):
    t = tensor(run, (3, 2, 9, 9), torch.float32, memory_format)
    index = torch.tensor([1, 1, 0] * 30, device=run.device)
    assert torch.equal(run(triton_kernels.take_channels, t, index), t[:, index])


@everywhere
def test_part_of_a_larger_tensor(run):
    whole = tensor(run, (5, 12, 7), torch.bfloat16)
    index = some_channels(run, 12)
    assert torch.equal(run(triton_kernels.take_channels, whole[1:], index), whole[1:, index])


@over_shapes_and_dtypes
@over_layouts
@pytest.mark.parametrize("relu", [False, True])
def test_norm_input_grad(run, shape, memory_format, relu, dtype):
    (dz, y, mean, invstd, relu_out), passed = norm_case(run, shape, dtype, memory_format, relu)
    weight = torch.rand(shape[1], dtype=mean.dtype, device=run.device) - 0.5 if relu else None
    expected, sum_dz_xhat, sum_dz = (
        g.to(run.device) for g in by_torch(passed, y, weight, mean, invstd)
    )
    index = some_channels(run, shape[1])
    sums = sum_dz.to(mean.dtype), sum_dz_xhat.to(mean.dtype)
    dy = run(triton_kernels.norm_input_grad, dz, y, weight, mean, invstd, *sums, index, relu_out)
    assert dy.dtype == dtype
    assert_lies_like(dy, y)
    # The result is rounded once; what it is computed of, relative to the largest of its parts.
    unit = 1e-13 if dtype == torch.float64 else 2e-6
    size = (invstd.double() * (dz.double().abs().max() + 1)).max()
    rounding = torch.finfo(dtype).eps * expected[:, index].abs()
    assert ((dy.double() - expected[:, index]).abs() <= rounding + unit * size).all()


# --- all of them ------------------------------------------------------------------------------


def calls(run, shape, dtype, memory_format):
    """Return (function, arguments) of each function, with all that they take."""
    arguments, _ = norm_case(run, shape, dtype, memory_format, relu=True)
    dz, y, mean, invstd, relu_out = arguments
    index = some_channels(run, shape[1])
    weight = torch.rand_like(mean)
    return [
        (triton_kernels.channel_sums, (dz, 1)),
        (triton_kernels.norm_sums, arguments),
        (triton_kernels.norm_grad_sums, (dz, y, mean, invstd, mean, invstd, relu_out)),
        (triton_kernels.take_channels, (dz, index)),
        (
            triton_kernels.norm_input_grad,
            (dz, y, weight, mean, invstd, mean, invstd, index, relu_out),
        ),
    ]


def assert_same(got, expected):
    for a, b in zip(*((t,) if torch.is_tensor(t) else t for t in (got, expected)), strict=True):
        assert torch.equal(a, b)


@over_layouts
@pytest.mark.parametrize(
    ("run", "shape"),
    [
        ("interpreter", (7, 40, 11, 13)),
        pytest.param("cuda", (64, 500, 28, 28), marks=needs_gpu),
    ],
    indirect=["run"],
)
def test_every_call_gives_the_same_bits(run, shape, memory_format):
    for function, arguments in calls(run, shape, torch.bfloat16, memory_format):
        assert_same(run(function, *arguments), run(function, *arguments))


@everywhere
@over_layouts
def test_offsets_of_64_bits_give_the_same(run, memory_format):
    for function, arguments in calls(run, (3, 20, 11, 13), torch.bfloat16, memory_format):
        assert_same(run(with_wide_offsets, function, *arguments), run(function, *arguments))


@pytest.mark.parametrize("channels_last", [False, True])
def test_offsets_have_64_bits_where_one_image_or_tile_needs_them(channels_last):
    def wide(channels, kept, positions):
        of = layout.Layout(1, channels, positions, channels_last)
        return layout.tiling_of(of, kept, 2048).wide

    assert not wide(64, 64, 2**24)
    assert wide(64, 64, 2**25) is not channels_last  # 2**31 elements in the image, not in a tile
    assert wide(2**25, 2, 64)  # a tile of two channels has 1024 positions
    assert wide(2, 2**26, 64)


@needs_gpu
@over_layouts
def test_more_than_2_to_the_31_elements(memory_format):
    run = Gpu()
    free, _ = torch.cuda.mem_get_info()
    if free < 2**34:
        pytest.skip("needs 16 GiB of GPU memory")
    t = torch.empty((513, 64, 256, 257), dtype=torch.bfloat16, device="cuda")
    if memory_format == "channels_last":
        t = t.to(memory_format=torch.channels_last)
    t.zero_()
    t[-1, 5, -1, -1], t[0, 63, 0, 0] = 3, 2
    sums = run(triton_kernels.channel_sums, t, 2)
    assert sums.nonzero().flatten().tolist() == [5, 63]
    assert sums[[5, 63]].tolist() == [9, 4]
    taken = run(triton_kernels.take_channels, t, torch.tensor([63, 5], device="cuda"))
    assert taken[0, 0, 0, 0] == 2
    assert taken[-1, 1, -1, -1] == 3


@needs_gpu
@over_layouts
def test_a_cuda_graph_replays_them(memory_format):
    for function, arguments in calls(Gpu(), (8, 32, 14, 14), torch.bfloat16, memory_format):
        expected = function(*arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = function(*arguments)
        graph.replay()
        assert_same(got, expected)


@everywhere
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (2, 0, 4), (0, 3)])
def test_empty_tensors(run, shape):
    for function, arguments in calls(run, shape, torch.bfloat16, "contiguous"):
        got = run(function, *arguments)
        if function.__name__.endswith("sums"):
            for sums in (got,) if torch.is_tensor(got) else got:
                assert torch.equal(sums.cpu(), torch.zeros(shape[1]))
        else:
            assert got.shape == (shape[0], -(-shape[1] // 3), *shape[2:])


@everywhere
def test_no_channel_chosen(run):
    t = tensor(run, (2, 3, 4), torch.float32)
    none = torch.empty(0, dtype=torch.int64, device=run.device)
    assert run(triton_kernels.take_channels, t, none).shape == (2, 0, 4)


# --- in a network -------------------------------------------------------------------------------


def noted(function, calls):
    def call(*args):
        calls.append(function.__name__)
        return function(*args)

    return call


def train_with_them(device, selection, memory_format):
    """Return the gradients of a network whose passes they do, and of the oracle; their calls."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16, affine=False), nn.ReLU(),
        nn.Conv2d(16, 5, 1),
    ).double().to(device, memory_format=memory_format)  # fmt: skip
    nn.init.uniform_(model[1].weight, -2, 2)
    x = torch.randn(4, 3, 9, 9, dtype=torch.double, device=device)
    x = x.contiguous(memory_format=memory_format)
    dense = copy.deepcopy(model)
    with oracle.network(dense, 0.6, order={"l1": 1, "l2": 2}[selection]) as record:
        dense(x).square().sum().backward()
    assert record.dropped
    ssp.convert(model, 0.6, selection=selection)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy_grad, "_MIN_ELEMENTS", 0)
        patch.setattr(lazy_grad, "_MIN_RELU_ELEMENTS", 0)
        patch.setattr(passes, "_kernels", lambda t: triton_kernels)
        patch.setattr(triton_kernels, "is_available", lambda t: True)
        for name in ("channel_sums", "take_channels", "norm_grad_sums", "norm_input_grad"):
            patch.setattr(triton_kernels, name, noted(getattr(triton_kernels, name), calls))
        model(x).square().sum().backward()
    grads = [[p.grad.cpu() for p in m.parameters()] for m in (model, dense)]
    return *grads, calls


@everywhere
@pytest.mark.parametrize("selection", ["l1", "l2"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_network_trains_with_them(run, selection, memory_format):
    got, expected, calls = run(train_with_them, run.device, selection, memory_format)
    largest = max(g.abs().max() for g in expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * largest.item())
    assert calls.count("norm_input_grad") == 2  # both norms have theirs formed in part
    assert calls.count("norm_grad_sums") == (2 if selection == "l1" else 0)
    assert calls.count("channel_sums") == 1  # of the last layer, which has no norm


# --- what they refuse, and who is asked first -------------------------------------------------


def test_an_order_that_is_neither_1_nor_2():
    with pytest.raises(ValueError, match=r"order must be 1 .* got 3"):
        triton_kernels.channel_sums(torch.ones(2, 3), 3)


@pytest.mark.parametrize(
    "t",
    [
        torch.ones(2, 3, 4, dtype=torch.int32),
        torch.ones(3),
        torch.ones(1, 1, 1, 1, 1, 1),
        torch.ones(2, 6, 4)[:, ::2],
        torch.ones(1).expand(2, 3, 4),
        torch.ones(3, 2).t(),
    ],
)
def test_tensors_that_they_do_not_take(t):
    with pytest.raises(ValueError, match=r"^t must be"):
        triton_kernels.take_channels(t, torch.tensor([0]))


def test_arguments_that_do_not_fit():
    y, c = torch.ones(2, 3, 4), torch.ones(3)
    with pytest.raises(ValueError, match=r"dz must .* y's shape \(2, 3, 4\), got .* \(2, 3, 5\)"):
        triton_kernels.norm_sums(torch.ones(2, 3, 5), y, c, c)
    with pytest.raises(ValueError, match=r"invstd must .* shape \(3,\), got \(4,\)"):
        triton_kernels.norm_sums(y, y, c, torch.ones(4))
    with pytest.raises(ValueError, match=r"weight must .* shape \(3,\), got \(1,\)"):
        triton_kernels.norm_input_grad(y, y, torch.ones(1), c, c, c, c, torch.tensor([0]))


def test_not_available_on_the_cpu():
    assert not triton_kernels.is_available(torch.ones(2, 3, 4))


@needs_gpu
def test_available_on_a_gpu_for_what_they_take():
    t = torch.ones(2, 6, 4, device="cuda")
    assert triton_kernels.is_available(t)
    assert triton_kernels.is_available(t.movedim(-1, 1))
    assert not triton_kernels.is_available(t[:, ::2])
    assert not triton_kernels.is_available(t.int())
    t.requires_grad_()
    assert not triton_kernels.is_available(t)
    with torch.no_grad():
        assert triton_kernels.is_available(t)


def test_the_kernels_are_imported_by_the_first_call():
    code = """
import sys, torch, ssprop_patch.triton_kernels as k
k.is_available(torch.ones(2, 3))
k.channel_sums(torch.ones(0, 3), 1)
assert "ssprop_patch.triton_kernels.kernels" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what the compiler makes of them ----------------------------------------------------------


class Compiler:
    """Stands in for the module of kernels: compiles for a GPU what is launched, keeps the code."""

    def __init__(self, target):
        self.target = target
        self.code = {}

    def __getattr__(self, name):
        kernel = getattr(kernels, name)
        return Launch(lambda *args, **constants: self.compile(kernel, args, constants))

    def compile(self, kernel, args, constants):
        from triton.compiler import ASTSource, compile

        options = {"num_warps": constants.pop("num_warps")}
        given = dict(zip(kernel.arg_names, args, strict=False)) | constants
        names = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
        signature, aligned = {}, {}
        for position, name in enumerate(kernel.arg_names):
            value = given[name]
            if torch.is_tensor(value):
                signature[name] = names[value.dtype]
                aligned[position,] = [["tt.divisibility", 16]]
            elif value is None or name in constants:
                signature[name] = "constexpr"
                constants[name] = value
            else:
                signature[name] = "i32"
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
        self.code[kernel.__name__] = compile(source, target=self.target, options=options).asm


class Launch:
    def __init__(self, launch):
        self.launch = launch

    def __getitem__(self, grid):
        return self.launch


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("memory_format", "shape", "width"),
    [
        ("contiguous", (2, 64, 8, 8), 4),
        ("contiguous", (2, 64, 14, 14), 2),
        ("channels_last", (2, 40, 7, 7), 4),
    ],
)
def test_they_compile_and_read_as_much_at_once_as_the_sizes_allow(
    monkeypatch, tmp_path, memory_format, shape, width
):
    from triton.backends.compiler import GPUTarget

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("triton names the alignment of arguments otherwise")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiler = Compiler(GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton_kernels, "kernels", compiler, raising=False)
    arguments = calls(Interpreter(None), shape, torch.bfloat16, memory_format)
    for function, given in arguments:
        function(*given)
    assert len(compiler.code) == 5
    for name, code in compiler.code.items():
        gathers = memory_format == "channels_last" and name in ("take_channels", "norm_input_grad")
        wide = re.findall(rf"ld\.global\S*\.v{width}\.b32", code["ptx"])
        assert bool(wide) is not gathers, name
        # Threads that read along another dimension than they write hand over in shared memory.
        assert name.endswith("sums") or "convert_layout" not in code["ttgir"], name
