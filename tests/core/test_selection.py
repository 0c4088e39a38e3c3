"""The choice of channels: scores by name, one's own, and their order."""

import math

import oracle
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import ssprop_patch as ssp
from ssprop_patch import functional
from ssprop_patch.core.selection import l1_scores, l2_scores, random_scores, resolve_selection
from ssprop_patch.ops.channel_scores import select_channels

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@st.composite
def gradients(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = [draw(st.integers(1, 3)), draw(st.integers(1, 12))]
    shape += [draw(st.integers(1, 5)) for _ in range(draw(st.integers(1, 3)))]
    dy = torch.randn(shape, generator=generator, dtype=torch.float64) ** 3
    return dy.transpose(0, -1) if draw(st.booleans()) and shape[0] == shape[-1] else dy


# --- scores -----------------------------------------------------------------------------------


@pytest.fixture(params=["whole", "parts", "norm"])
def way(request, monkeypatch):
    """Each way of computing the scores: on the CPU at once or in parts, and as elsewhere."""
    if request.param == "parts":
        monkeypatch.setattr("ssprop_patch.ops.channel_ops._CHUNK", 25)
    if request.param == "norm":
        monkeypatch.setattr("ssprop_patch.ops.channel_ops._sum_in_parts", lambda dy: False)
    return request.param


any_way = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@any_way
@given(gradients())
@pytest.mark.usefixtures("way")
def test_l1_is_proportional_to_the_mean_magnitude(dy):
    mean = dy.abs().transpose(0, 1).flatten(1).mean(1)
    scores = l1_scores(dy)
    assert scores.shape == (dy.shape[1],)
    torch.testing.assert_close(scores / scores.sum(), mean / mean.sum(), rtol=1e-12, atol=0)


@any_way
@given(gradients())
@pytest.mark.usefixtures("way")
def test_l2_is_proportional_to_the_root_of_the_mean_square(dy):
    square = dy.square().transpose(0, 1).flatten(1).mean(1)
    scores = l2_scores(dy).square()
    assert scores.shape == (dy.shape[1],)
    torch.testing.assert_close(scores / scores.sum(), square / square.sum(), rtol=1e-12, atol=0)


def test_l1_and_l2_differ_where_they_should():
    dy = torch.tensor([[[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 10.0, 0.0]]])
    assert l1_scores(dy).argmax() == 0
    assert l2_scores(dy).argmax() == 1
    w = torch.ones(2, 1, 1, requires_grad=True)
    for selection, kept in (("l1", 0), ("l2", 1)):
        w.grad = None
        y = functional.conv1d(torch.ones(1, 1, 4), w, drop_rate=0.5, selection=selection)
        y.backward(dy)
        assert w.grad[kept] != 0 and w.grad[1 - kept] == 0


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("score", [l1_scores, l2_scores])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_half_precision_are_float32(score, dtype):
    scores = score(torch.randn(2, 3, 4, dtype=dtype))
    assert scores.dtype == (torch.float32 if dtype.itemsize == 2 else dtype)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("score", [l1_scores, l2_scores])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_accumulation_in_half_precision_would_choose_wrongly(score, dtype):
    # Channel 1 is larger by one part in ten thousand; rounded to the dtype the two scores tie.
    dy = torch.ones(1, 2, 30_001, dtype=dtype)
    dy[0, 1, :3] = 2
    scores = score(dy)
    assert scores.to(dtype)[0] == scores.to(dtype)[1]  # that is what would be compared
    assert scores[1] > scores[0]
    assert select_channels(dy, 1, 1, score).tolist() == [1]
    assert select_channels(dy.flip(1), 1, 1, score).tolist() == [0]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("score", [l1_scores, l2_scores])
def test_scores_beyond_the_range_of_float16_stay_in_order(score):
    dy = torch.full((4, 3, 4096), 300.0, dtype=torch.float16)
    dy[:, 1] = 400
    dy[:, 2] = 500
    assert score(dy).isfinite().all()
    assert select_channels(dy, 2, 1, score).tolist() == [1, 2]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "score, scale", [(l1_scores, 1e-6), (l1_scores, 1e-37), (l2_scores, 1e-6), (l2_scores, 1e-18)]
)  # by l2 the squares have to stay representable
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_gradients_are_still_told_apart(score, scale, dtype):
    dy = torch.tensor([1.0, 3.0, 2.0, 4.0]).view(1, 4, 1).expand(2, 4, 5) * scale
    assert select_channels(dy.to(dtype), 2, 1, score).tolist() == [1, 3]


# --- order and groups -------------------------------------------------------------------------


@given(gradients(), st.integers(1, 12))
def test_the_largest_channels_ascending(dy, k):
    assume(k <= dy.shape[1])
    scores = dy.abs().transpose(0, 1).flatten(1).mean(1).tolist()
    index = select_channels(dy, k, 1, l1_scores)
    assert index.dtype == torch.int64
    assert index.tolist() == sorted(sorted(range(len(scores)), key=scores.__getitem__)[-k:])


@given(st.integers(2, 5), st.integers(2, 6), st.integers(1, 6), st.integers(0, 2**32))
def test_the_largest_of_each_group_ascending(groups, per_group, k, seed):
    assume(k <= per_group)
    scores = torch.randn(groups * per_group, generator=torch.Generator().manual_seed(seed))
    index = select_channels(torch.empty(1, groups * per_group, 1), k, groups, lambda dy: scores)
    expected = []
    for g in range(groups):
        members = range(g * per_group, (g + 1) * per_group)
        expected += sorted(sorted(members, key=lambda c: scores[c].item())[-k:])
    assert index.tolist() == expected


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32))
def test_depthwise_chooses_over_all_groups(channels, k, seed):
    assume(k <= channels)
    scores = torch.randn(channels, generator=torch.Generator().manual_seed(seed))
    index = select_channels(torch.empty(1, channels, 1), k, channels, lambda dy: scores)
    assert index.tolist() == sorted(scores.argsort(descending=True)[:k].tolist())


@pytest.mark.parametrize("groups, kept", [(1, 3), (2, 2), (6, 3)])
def test_ties_still_keep_exactly_k_different_channels(groups, kept):
    index = select_channels(torch.ones(2, 6, 3), kept, groups, l1_scores).tolist()
    assert len(set(index)) == len(index) == kept * (groups if groups == 2 else 1)
    assert index == sorted(index)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_nan_and_inf_rank_first(groups, bad):
    dy = torch.full((1, 6, 2), 1e30)
    dy[0, 4, 1] = bad
    assert 4 in select_channels(dy, 1, groups, l1_scores).tolist()


def test_scores_are_computed_without_a_graph():
    seen = []

    def scores(dy):
        seen.append((dy.requires_grad, torch.is_grad_enabled()))
        return dy.sum((0, 2))

    select_channels(torch.randn(2, 4, 3, requires_grad=True), 2, 1, scores)
    assert seen == [(False, False)]


# --- a callable -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 7, 7), (3, 7, 7)], ids=["batched", "unbatched"])
def test_a_callable_gets_the_batched_gradient_and_decides(shape):
    seen = []

    def last_two(dy):
        seen.append(dy.clone())
        return torch.arange(dy.shape[1])  # integers rank as well

    w = torch.randn(6, 3, 3, 3, requires_grad=True)
    y = functional.conv2d(torch.randn(shape), w, drop_rate=0.65, selection=last_two)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.equal(seen[0], dy.view(-1, 6, 5, 5))
    assert [c for c in range(6) if w.grad[c].any()] == [4, 5]


def test_a_callable_in_a_converted_model():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3))

    def first(dy):
        return -torch.arange(dy.shape[1])

    ssp.convert(model, 0.5, selection=first)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    for layer in model:
        kept = (layer.weight.grad.flatten(1) != 0).any(1).tolist()
        assert kept == [c < len(kept) // 2 for c in range(len(kept))]


@pytest.mark.parametrize(
    "scores",
    [lambda dy: dy.sum(), lambda dy: dy, lambda dy: torch.ones(3), lambda dy: [1, 2, 3, 4]],
)
def test_scores_of_another_shape_are_refused_with_both_shapes(scores):
    with pytest.raises(ValueError, match=r"one score per output channel.*\(4,\).*\(2, 4, 3\)"):
        select_channels(torch.randn(2, 4, 3), 2, 1, scores)


def test_names():
    assert resolve_selection("l1") is l1_scores
    assert resolve_selection("l2") is l2_scores
    assert resolve_selection("random") is random_scores
    assert resolve_selection(len) is len


@pytest.mark.parametrize(
    "name, error",
    [("l0", ValueError), ("", ValueError), (None, TypeError), (1, TypeError), (["l1"], TypeError)],
)
def test_what_is_no_selection(name, error):
    with pytest.raises(error, match=r"selection must be .*l1.*l2.*random"):
        resolve_selection(name)
    model = nn.Conv2d(3, 6, 3)
    with pytest.raises(error, match="selection must be"):
        ssp.convert(model, 0.5, selection=name)
    assert type(model) is nn.Conv2d


# --- random -----------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["l1", "l2"])
def test_a_layer_of_a_model_chooses_as_its_selection_says(selection):
    model = ssp.convert(nn.Conv1d(2, 8, 3).double(), 0.7, selection=selection)
    x, dy = torch.randn(3, 2, 9).double(), torch.randn(3, 8, 7).double() ** 3
    model(x).backward(dy)
    power = 1 if selection == "l1" else 2
    scores = dy.abs().pow(power).sum((0, 2))
    kept = (model.weight.grad.flatten(1) != 0).any(1)
    assert kept.sum() == oracle.number_kept(8, 0.7) == 2
    assert scores[kept].min() > scores[~kept].max()
