"""What C trusts is checked before: what does not fit goes to torch, or is an error, never read."""

import math
import multiprocessing

import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch.core.geometry import ConvParams
from ssprop_patch.core.reference import dense_backward
from ssprop_patch.core.rule import BackwardRule
from ssprop_patch.core.selection import l1_scores
from ssprop_patch.ops import algorithms, channel_ops, native
from ssprop_patch.ops.backward import linear_backward, sparse_backward
from ssprop_patch.ops.channel_gradients import KeptChannels
from ssprop_patch.ops.channel_scores import select_channels
from ssprop_patch.ops.native import build, conv, tensors

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C compiler")
ALL = (True, True, True)


def params(dims, stride=1, padding=0, dilation=1, groups=1):
    return ConvParams((stride,) * dims, (padding,) * dims, (dilation,) * dims, groups)


def compare(dy, x, w, p, k, score_fn=l1_scores):
    """Compare a sparse backward with the dense one of a masked dy; return the kept channels."""
    got = sparse_backward(dy, x, w, p, k, BackwardRule(score_fn), ALL)
    index = select_channels(dy, k, p.groups, score_fn)
    masked = torch.zeros_like(dy).index_copy_(1, index, dy[:, index])
    for grad, expected in zip(got, dense_backward(masked, x, w, p, ALL), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)
    return index.tolist()


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


# --- shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("per_group", [1, 3])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_depthwise_on_one_position_is_no_matrix_product(dims, per_group, k):
    ones = (1,) * dims
    dy, x = normal(8, 4, *ones), normal(8, 4 * per_group, *ones)
    compare(dy, x, normal(4, per_group, *ones), params(dims, groups=4), k)


def changes():
    def resize(t, size):
        t.untyped_storage().resize_(size)

    def weight(*shape):
        return lambda layer, x: setattr(layer.weight, "data", torch.randn(shape))

    yield "fewer outputs", weight(4, 4, 3, 3)
    yield "more outputs", weight(16, 4, 3, 3)
    yield "more inputs", weight(8, 8, 3, 3)
    yield "fewer inputs", weight(8, 2, 3, 3)
    yield "a larger kernel", weight(8, 4, 5, 5)
    yield "a smaller kernel", weight(8, 4, 1, 1)
    yield "one dimension", weight(8)
    yield "no element", weight(0)
    yield "a dimension more", weight(8, 4, 3, 3, 1)
    yield "no memory of the weight", lambda layer, x: resize(layer.weight, 0)
    yield "some memory of the weight", lambda layer, x: resize(layer.weight, 8)
    yield "no memory of the input", lambda layer, x: resize(x, 0)
    yield "some memory of the input", lambda layer, x: resize(x, 8)
    yield "fewer images", lambda layer, x: setattr(x, "data", torch.randn(1, 4, 6, 6))
    yield "fewer channels", lambda layer, x: setattr(x, "data", torch.randn(2, 2, 6, 6))
    yield "a smaller input", lambda layer, x: setattr(x, "data", torch.randn(2, 4, 3, 3))
    yield "an input of one dimension", lambda layer, x: setattr(x, "data", torch.randn(4))


def magnitudes(dy):
    return dy.abs().sum([0, *range(2, dy.dim())])


CHANGES = dict(changes())


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("selection", ["l1", magnitudes], ids=["l1", "function"])
@pytest.mark.parametrize(
    "kind, what",
    [
        *((nn.Conv2d, what) for what in CHANGES),
        *((nn.ConvTranspose2d, what) for what in CHANGES if "memory" in what or "input" in what),
    ],
)
def test_what_was_changed_after_the_forward_is_an_error(kind, what, selection, last):
    change, layer = CHANGES[what], kind(4, 8, 3, padding=1)
    ssp.convert(layer, 0.5, selection=selection, types=kind)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    inner = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format) * 1
    y = layer(inner)
    change(layer, inner)
    with pytest.raises(RuntimeError):
        y.sum().backward()


@pytest.mark.parametrize("size", [0, 8])
def test_a_gradient_without_memory_is_an_error(size):
    for layer, shape in ((nn.Conv2d(4, 8, 3), (2, 4, 6, 6)), (nn.Linear(4, 8), (3, 4))):
        ssp.convert(layer, 0.5, types=type(layer))
        y = layer(torch.randn(shape, requires_grad=True))
        dy = torch.randn_like(y)
        dy.untyped_storage().resize_(size)
        with pytest.raises(RuntimeError, match="no memory"):
            y.backward(dy)
        with pytest.raises(RuntimeError, match="no memory"):
            native.is_available(dy)


def test_a_part_of_a_larger_storage_has_its_memory():
    t = torch.zeros(100)[90:].view(2, 5)
    assert tensors.check_memory(t) is None
    assert tensors.check_memory(torch.zeros(3, 1).expand(3, 9)) is None
    assert tensors.check_memory(torch.zeros(100)[99:99]) is None
    turned = t.t()
    t.untyped_storage().resize_(4 * 99)
    for shorter in (t, turned):
        with pytest.raises(RuntimeError, match="no memory"):
            tensors.check_memory(shorter)


@needs_compiler
def test_shapes_that_do_not_fit_are_left_to_torch():
    x, w, p = torch.zeros(2, 4, 6, 6), torch.zeros(8, 4, 3, 3), params(2)
    good, index = torch.zeros(2, 8, 4, 4), torch.tensor([1, 5])
    assert conv.conv_backward(good, x, w, p, 2, 1, ALL) is not None
    for dy in (good[:1], good[:, :4].contiguous(), good[..., :3].contiguous(), good[..., 0]):
        assert conv.conv_backward(dy.contiguous(), x, w, p, 2, 1, ALL) is None
    for k in (0, 9, -1):
        assert conv.conv_backward(good, x, w, p, k, 1, ALL) is None
    for other in (
        params(2, groups=2),
        params(2, groups=3),
        params(2, stride=2),
        params(3),
        p._replace(transposed=True),
        p._replace(padding=(-1, -1)),
    ):
        assert conv.conv_backward(good, x, w, other, 2, 1, ALL) is None
    taken = good[:, :2].contiguous()
    assert conv.conv_dx(taken, x, w, index, p) is not None
    for dy in (taken[:1], taken.double(), torch.zeros(2, 2, 5, 4), taken.to("meta")):
        for function in (conv.conv_dx, conv.conv_dw, conv.conv_db):
            assert function(dy, x, w, index[: dy.shape[1]], p) is None


@needs_compiler
@pytest.mark.parametrize("shape", [(3, 4, 1), (2, 5, 1), (2, 4, 2), (2, 4)], ids=str)
def test_rows_that_do_not_fit_are_left_to_torch(shape):
    dy, w, index = torch.zeros(2, 1, 1), torch.zeros(8, 4, 1), torch.tensor([3])
    assert native.rows_backward(dy, torch.zeros(2, 4, 1), w, index, ALL) is not None
    assert native.rows_backward(dy, torch.zeros(shape), w, index, ALL) is None


@needs_compiler
def test_a_norm_whose_tensors_do_not_fit_is_an_error():
    x, line, index = torch.randn(3, 4, 5, 5), torch.ones(4), torch.tensor([1])
    for dz in (x[:2], x[:, :3], x[..., :1], x.flatten(2)):
        with pytest.raises(RuntimeError, match="shape"):
            native.norm_sums(dz, x, line, line, line, 1)
        with pytest.raises(RuntimeError, match="shape"):
            native.norm_input_grad(x, x, line, line, line, line, line, index, dz)
    for vector in (torch.ones(3), torch.ones(1), torch.ones(5), torch.ones(4, 1)):
        with pytest.raises(RuntimeError, match="channels"):
            native.norm_sums(x, x, vector, line, line, 1)
        with pytest.raises(RuntimeError, match="channels"):
            native.norm_input_grad(x, x, line, line, line, line, vector, index)


# --- indices and counts -----------------------------------------------------------------------


def with_indices():
    t, p = torch.randn(2, 4, 3, 3), params(2)
    last = t.contiguous(memory_format=torch.channels_last)
    w, rows, line = torch.randn(6, 4, 1, 1), torch.randn(2, 9), torch.ones(6)
    dy, x = torch.randn(2, 2, 3, 3), torch.randn(2, 6, 3, 3)
    yield lambda index: native.take_channels(x.contiguous(memory_format=torch.channels_last), index)
    yield lambda index: native.put_rows(rows, index, torch.zeros(6, 9))
    yield lambda index: native.put_sums(rows[None], index, torch.zeros(6, 9))
    yield lambda index: conv.conv_dx(dy, t, w, index, p)
    yield lambda index: conv.conv_dw(dy, last, w, index, p)
    yield lambda index: conv.conv_db(dy, t, w, index, p)
    yield lambda index: native.norm_input_grad(x, x, line, line, line, line, line, index)
    one = torch.randn(2, 4, 1, 1)
    yield lambda index: native.rows_backward(one[:, :2].contiguous(), one, w, index, ALL)


@needs_compiler
@pytest.mark.parametrize("function", list(with_indices()), ids=range(8))
def test_indices_are_checked(function):
    function(torch.tensor([1, 5]))
    for bad in ([1, 6], [-1, 5], [0, 2**62]):
        with pytest.raises(IndexError, match="out of range"):
            function(torch.tensor(bad))
    for bad in (
        torch.tensor([1, 5], dtype=torch.int32),
        torch.tensor([1, 5], device="meta"),
        torch.tensor([[1, 5]]),
        torch.tensor([1.0, 5.0]),
    ):
        with pytest.raises((ValueError, IndexError)):
            function(bad)


@needs_compiler
def test_indices_that_have_to_ascend_are_checked():
    dy, x, w = torch.randn(2, 2, 3, 3), torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1)
    grouped = params(2, groups=2)
    assert conv.conv_dx(dy, x, w, torch.tensor([0, 5]), grouped) is not None
    for bad in ([5, 0], [0, 0], [0, 2], [3, 5]):  # or are in a group that is not their own
        with pytest.raises(IndexError, match="ascending"):
            conv.conv_dx(dy, x, w, torch.tensor(bad), grouped)
    with pytest.raises(IndexError, match="ascending"):
        native.put_rows(torch.ones(2, 9), torch.tensor([3, 1]), torch.zeros(6, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_number_to_keep_that_there_is_not(dtype):
    scores = torch.ones(6, dtype=dtype)
    for k, groups in ((7, 1), (4, 2), (0, 1), (-1, 1), (1, 4), (1, 0), (1, -6)):
        with pytest.raises(ValueError, match="cannot choose"):
            channel_ops.topk_indices(scores, k, groups)
    if build.find_compiler() is not None:
        with pytest.raises(ValueError, match="cannot choose"):
            native.topk_channels(torch.ones(2, 6, 3), 1, 4, 2)


def test_no_more_threads_than_there_is_memory_for(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2**31 - 1)
    assert tensors.threads_for(torch.empty(2**15)) == 1024
    assert tensors.threads_for(torch.empty(2**15 - 1)) == 1


# --- memory -----------------------------------------------------------------------------------

FAR = 10**6


@pytest.mark.parametrize(
    "dims, kernel, p",
    [
        (2, 3, params(2, stride=1000, padding=1)),
        (3, 3, params(3, stride=100, padding=1)),
        (1, 3, params(1, stride=FAR, padding=1)),
        (2, 3, params(2, dilation=10**4, padding=10**4)._replace(stride=(10**4, 10**4))),
        (1, 3, params(1, dilation=FAR, padding=FAR)._replace(stride=(FAR,))),
        (2, 1, params(2, stride=2**40, dilation=2**61)),
        (2, 3, params(2, stride=1000, padding=1, groups=4)),
    ],
)
def test_memory_does_not_grow_with_stride_and_dilation(dims, kernel, p):
    x, w = normal(2, 4, *[5] * dims), normal(8, 4 // p.groups, *[kernel] * dims)
    assert not conv.is_small(x.shape, w.shape, p)
    y = torch.nn.functional
    forward = {1: y.conv1d, 2: y.conv2d, 3: y.conv3d}[dims]
    dy = torch.randn_like(forward(x, w, None, *p[:4]))
    assert "direct" not in algorithms.candidates(x, w, p)[0]
    compare(dy, x, w, p, 1)
    for name in ("direct", "rows"):  # loaded from a file
        kept = KeptChannels(dy, x, w, p, 1, l1_scores)
        grads = algorithms.Algorithms(name, name).run(kept, ALL)
        expected = sparse_backward(dy, x, w, p, 1, BackwardRule(l1_scores), ALL)
        for grad, same in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, same)


@pytest.mark.parametrize(
    "size, kernel, p",
    [
        ((224, 224), 7, params(2, stride=2, padding=3)),
        ((7, 7), 3, params(2, padding=1)),
        ((14, 14), 31, params(2, padding=15)),  # RepLKNet
        ((16, 16), 3, params(2, padding=18, dilation=18)),  # DeepLab
        ((224, 224), 16, params(2, stride=16)),
        ((1, 1), 1, params(2)),
        ((1, 1), 3, params(2, padding=1)),
        ((8, 28, 28), 3, params(3, padding=1)),
        ((16000,), 400, params(1, stride=160)),
        ((4, 4, 4), 7, params(3, padding=3)),
    ],
)
def test_usual_layers_are_small(size, kernel, p):
    dims = len(size)
    assert conv.is_small((2, 8, *size), (8, 8, *[kernel] * dims), p)


def test_a_sparse_gradient_is_an_error():
    layer = ssp.convert(nn.Conv2d(3, 6, 3), 0.5)
    y = layer(torch.randn(2, 3, 5, 5))
    with pytest.raises(RuntimeError, match=r"ordinary tensors, got torch\.sparse_coo"):
        y.backward(torch.ones_like(y).to_sparse())


# --- derivatives, numbers that are not finite, processes ----------------------------------------


@pytest.mark.parametrize("selection", ["l1", magnitudes], ids=["l1", "function"])
def test_a_second_derivative_where_only_the_bias_learns(selection):
    layer = nn.Conv2d(2, 6, 3).requires_grad_(False)
    layer.bias.requires_grad_()
    ssp.convert(layer, 0.5, selection=selection)
    y = layer(torch.randn(2, 2, 5, 5))
    (db,) = torch.autograd.grad(y.square().sum(), layer.bias, create_graph=True)
    assert db.requires_grad and (db != 0).sum() == 3
    (second,) = torch.autograd.grad(db.sum(), layer.bias)
    assert torch.equal(second, torch.where(db != 0, 2.0 * 2 * 9, 0.0))


@needs_compiler
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("groups, stride", [(1, 1), (1, 2), (2, 1), (6, 1), (6, 2)])
def test_what_is_not_finite_at_a_border_goes_where_it_does_in_torch(value, last, groups, stride):
    memory_format = torch.channels_last if last else torch.contiguous_format
    p = params(2, stride, 1, 1, groups)
    for at in ((0, 0), (0, 4), (4, 2), (4, 4)):
        x, w = normal(2, 6, 5, 5), normal(6, 6 // groups, 3, 3)
        dy = torch.randn_like(torch.nn.functional.conv2d(x, w, None, stride, 1, 1, groups))
        x[1, :, at[0], at[1]] = value
        x = x.contiguous(memory_format=memory_format)
        for changed in (False, True):
            if changed:
                w[:, :, 0, 2] = value
            kept = KeptChannels(dy, x, w, p, 1, l1_scores)
            expected = algorithms.gather(kept, ALL)
            assert not expected[1].isfinite().all() and expected[1][kept.index].isfinite().any()
            for grads in (
                algorithms.direct(KeptChannels(dy, x, w, p, 1, l1_scores), ALL),
                (
                    algorithms.direct_dx(kept),
                    algorithms.direct_dw(kept),
                    algorithms.direct(kept, ALL)[2],
                ),
            ):
                for grad, reference in zip(grads, expected, strict=True):
                    torch.testing.assert_close(grad, reference, equal_nan=True)


@needs_compiler
def test_a_process_that_forked_after_threads_ran():
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system has no fork")
    t = torch.randn(4, 64, 32, 32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = native.topk_channels(t, 1, 8, 1).tolist()
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        process = context.Process(target=_in_a_fork, args=(t, queue))
        process.start()
        process.join(60)
        if process.is_alive():
            process.kill()
            pytest.fail("the forked process hangs")
        assert queue.get() == expected
    finally:
        torch.set_num_threads(before)


def _in_a_fork(t, queue):
    torch.set_num_threads(1)  # as in a DataLoader's workers
    queue.put(native.topk_channels(t, 1, 8, 1).tolist())


@pytest.mark.parametrize("groups", [1, 5])
def test_a_single_channel_goes_to_torch_in_one_format(groups, monkeypatch):
    # With strides (14, 1, 2, 1) torch 2.14 corrupts the heap.
    seen = []
    monkeypatch.setattr(
        algorithms, "dense_backward", lambda *a: seen.append(a) or dense_backward(*a)
    )
    x = torch.randn(7, 7, 2, 5).movedim(-1, 1)
    dy, w = torch.randn(7, 7, 1, 5).movedim(-1, 1), torch.randn(5, 5 // groups, 1, 1)
    p = ConvParams((1, 2), (0, 0), (1, 1), groups)
    kept = KeptChannels(dy, x, w, p, 1, l1_scores)
    grads = algorithms.gather(kept, ALL)
    if groups == 1:
        assert not seen  # not even in one format: it is a matrix product
    else:
        assert seen[0][0].stride() == (7, 7, 1, 1) and seen[0][1].stride() == (14, 14, 2, 1)
    masked = torch.zeros_like(dy).index_copy_(1, kept.index, dy[:, kept.index])
    expected = dense_backward(masked.contiguous(), x.contiguous(), w, p, ALL)
    for grad, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, reference)


def test_a_linear_layer_whose_weight_was_changed_is_an_error():
    dy, x = torch.randn(3, 8), torch.randn(3, 4)
    for shape in ((4, 4), (16, 4), (8, 5), (8, 3)):
        with pytest.raises(RuntimeError):
            linear_backward(dy, x, torch.randn(shape), 2, BackwardRule(l1_scores), ALL)
