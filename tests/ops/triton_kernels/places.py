"""Where the Triton kernels run (the interpreter, a GPU), their tensors and what is expected."""

import pickle

import pytest
import torch

from ssprop_patch.ops import triton_kernels

pytest.importorskip("triton")

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


def in_this_process(pickled: bytes) -> bytes:
    function, args = pickle.loads(pickled)
    return pickle.dumps(function(*args))


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


def tensor(run, shape, dtype, memory_format="contiguous"):
    t = torch.randn(shape, dtype=torch.float64).to(dtype)
    if memory_format == "channels_last":
        t = t.movedim(1, -1).contiguous().movedim(-1, 1)
    return t.to(run.device)


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def some_channels(run, channels):
    """Return about a third of the channels, in no order."""
    return torch.randperm(channels)[: -(-channels // 3)].to(run.device)


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
