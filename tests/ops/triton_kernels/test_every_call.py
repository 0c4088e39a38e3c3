"""Every kernel: the same bits in each call, wide offsets, CUDA graphs, empty tensors."""

import pytest
import torch

from ssprop_patch.ops import triton_kernels
from ssprop_patch.ops.triton_kernels import layout

from .places import Gpu, calls, everywhere, needs_gpu, over_layouts, tensor


def with_wide_offsets(function, *args):
    """Call ``function`` as if its tensors were too large for offsets of 32 bits."""
    span, layout._INT32_SPAN = layout._INT32_SPAN, 0
    try:
        return function(*args)
    finally:
        layout._INT32_SPAN = span


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
