"""Single layers: both sides compute what they should, and the kernel shown is the one used."""

from __future__ import annotations

import copy

import oracle
import pytest
import timm
import torch
from torch import nn

from ssprop_patch import kernels, timing
from ssprop_patch.ops import autograd
from ssprop_patch.timing import interleaved, layers

from .networks import X, net


def once(monkeypatch):
    """Let each side run once only; return, for each layer, what ``alternate`` was given."""
    given = []

    def alternate(sides, iterations, warmup=0):
        given.append(sides)
        return {side: [interleaved.Quantiles(1.0, 2.0, 3.0)] for side in sides}

    monkeypatch.setattr(layers, "alternate", alternate)
    monkeypatch.setattr(layers, "_BURST_SECONDS", 0.0)
    return given


def test_the_sparse_side_keeps_the_channels_of_the_rate_and_the_dense_side_is_torchs(monkeypatch):
    given, kept = once(monkeypatch), []
    real = autograd.sparse_backward

    def spy(dy, x, w, p, k, *args):
        kept.append((tuple(dy.shape), dy.is_contiguous(), k, args[1]))
        return real(dy, x, w, p, k, *args)

    monkeypatch.setattr(autograd, "sparse_backward", spy)
    rows = timing.time_layers(net(), X, drop_rate=0.6)
    assert [row.name for row in rows] == ["stem", "twice", "alike", "wide"]
    assert len(given) == 3  # twice and alike are alike
    kept.clear()
    for sides in given:
        sides["dense"]()
    assert not kept
    for sides in given:
        sides["sparse"]()
    k, k_group = oracle.number_kept(8, 0.6), oracle.number_kept(10, 0.6)
    assert kept == [
        ((2, 8, 6, 6), True, k, (False, True, True)),  # the network's input needs no gradient
        ((2, 8, 6, 6), True, k, (True, True, True)),
        ((2, 20, 3, 6), False, k_group, (True, True, True)),
    ]


def kept_by(given, monkeypatch):
    """Return the k of each sparse backward when all sides run again."""
    kept, real = [], autograd.sparse_backward

    def spy(dy, x, w, p, k, *args):
        kept.append(k)
        return real(dy, x, w, p, k, *args)

    monkeypatch.setattr(autograd, "sparse_backward", spy)
    for sides in given:
        sides["sparse"]()
    return kept


def test_each_layer_is_timed_at_its_own_rate(monkeypatch):
    given = once(monkeypatch)
    rows = timing.time_layers(net(), X, 0.6, overrides={"alike": 0.25, "stem": 0.0})
    assert [row.kernel == "dense" for row in rows] == [True, False, False, False]
    assert len(given) == 4  # twice and alike differ by their rates
    k, own, k_group = (oracle.number_kept(c, rate) for c, rate in ((8, 0.6), (8, 0.25), (10, 0.6)))
    assert kept_by(given, monkeypatch) == [k, own, k_group]


def test_a_rate_of_its_own_waits_for_the_rate_of_all(monkeypatch):
    given = once(monkeypatch)
    rows = timing.time_layers(net(), X, 0.0, overrides={"alike": 0.25})
    assert {row.kernel for row in rows} == {"dense"} and not kept_by(given, monkeypatch)


def test_the_selection_is_timed(monkeypatch):
    given, scored = once(monkeypatch), []

    def scores(dy):
        scored.append(tuple(dy.shape))
        return dy.square().mean((0, 2, 3))

    timing.time_layers(nn.Conv2d(3, 8, 3), X.float(), selection=scores)
    scored.clear()
    given[0]["sparse"]()
    assert scored == [(2, 8, 4, 4)]
    with pytest.raises(ValueError, match="selection must be one of"):
        timing.time_layers(net(), X, selection="l3")


@pytest.mark.parametrize(("selection", "with_norm"), [("l2", True), ("random", False)])
def test_a_norm_is_timed_where_the_selection_lets_it_defer(monkeypatch, selection, with_norm):
    once(monkeypatch)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32))
    [row] = timing.time_layers(model, torch.randn(1, 3, 64, 64), selection=selection)
    assert row.with_norm is with_norm


def test_layers_are_timed_under_autocast(monkeypatch):
    given, dtypes = once(monkeypatch), []
    real = autograd.sparse_backward
    monkeypatch.setattr(
        autograd, "sparse_backward", lambda dy, *a: dtypes.append(dy.dtype) or real(dy, *a)
    )
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3))
    timing.time_layers(model, torch.randn(2, 3, 8, 8), autocast=torch.bfloat16)
    dtypes.clear()
    for sides in given:
        sides["sparse"]()
    assert dtypes == [torch.bfloat16] * 2


def conv2d_same():
    return timm.layers.Conv2dSame(8, 16, 3, stride=2)


KERNELS = {
    "gather": (nn.Conv2d(8, 16, 3), None),
    "long matrix product": (nn.Conv2d(8, 16, 1), None),
    "short matrix product": (nn.Conv2d(8, 16, 1, stride=4), None),
    "short convolution": (nn.Conv2d(8, 16, 1), (2, 8, 3, 3)),
    "unbatched": (nn.Conv2d(8, 16, 1), (8, 12, 12)),
    "padded 1x1": (nn.Conv2d(8, 16, 1, padding=1), None),
    "same": (nn.Conv2d(8, 16, 1, padding="same"), None),
    "circular": (nn.Conv2d(8, 16, 1, padding=1, padding_mode="circular"), None),
    "grouped": (nn.Conv2d(8, 16, 3, groups=2), None),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), None),
    "transposed": (nn.ConvTranspose2d(8, 16, 1), None),
    "transposed depthwise": (nn.ConvTranspose2d(8, 8, 3, groups=8), None),
    "own forward": (conv2d_same(), None),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_shown_is_the_one_that_runs(name, autocast, channels_last, monkeypatch):
    layer, shape = KERNELS[name]
    x = torch.randn(shape or (2, 8, 12, 12))
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    used, choose = [], kernels.choose
    given = once(monkeypatch)
    monkeypatch.setattr(kernels, "choose", lambda *args: used.append(choose(*args)) or used[-1])
    types = (nn.Conv2d, nn.ConvTranspose2d)
    [row] = timing.time_layers(copy.deepcopy(layer), x, 0.5, types=types, autocast=autocast)
    used.clear()
    given[0]["sparse"]()
    assert [str(ways) for ways in used] == [row.kernel]


def test_linear_layers_and_layers_that_keep_all_channels_say_so(monkeypatch):
    once(monkeypatch)
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(8, 10))
    types = (nn.Conv2d, nn.Linear)
    rows = timing.time_layers(model, torch.randn(2, 3, 2, 2), 0.1, types=types)
    assert [row.kernel for row in rows] == ["dense", "matmul"]


def test_a_row_says_which_side_is_faster():
    def row(dense, sparse):
        q = [interleaved.Quantiles(0.0, ms, 9.0) for ms in (dense, sparse)]
        return timing.LayerTime("a", "Conv2d", 1, (1,), (1,), (1,), *q, "gather")

    assert row(4.0, 1.0).pays and row(4.0, 1.0).share == 0.25
    assert not row(1.0, 1.0).pays and not row(1.0, 2.0).pays
    assert row(4.0, 1.0).to_dict()["sparse_ms"] == {"p20": 0.0, "p50": 1.0, "p80": 9.0}


def test_inputs_that_do_not_fit_are_the_models_error():
    with pytest.raises(ValueError, match=r"shapes \[\(2, 4, 6, 6\)\].*3 channels"):
        timing.time_layers(net(), torch.randn(2, 4, 6, 6, dtype=torch.float64))
    with pytest.raises(TypeError, match="a tuple of positional"):
        timing.time_layers(net(), [X])


def test_a_processors_name_says_which_instructions_torch_uses():
    name = timing.device_name(torch.device("cpu"))
    assert name.endswith(f" ({torch.backends.cpu.get_cpu_capability()})")
    assert not name.startswith(" ")
