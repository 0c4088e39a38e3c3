"""Calls that spare too few multiply-adds are dense: in what they compute, and in every count."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ssprop_patch as ssp
from ssprop_patch.core import rule
from ssprop_patch.core.rule import FEWEST_SPARED, BackwardRule, Extent, kind_of, spares_little
from ssprop_patch.patching.sync_selection import SynchronizedScores

LAYERS = {
    "ordinary": lambda: nn.Conv2d(8, 12, 3),
    "pointwise": lambda: nn.Conv2d(8, 12, 1),
    "grouped": lambda: nn.Conv2d(8, 12, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, groups=8),
    "transposed": lambda: nn.ConvTranspose2d(8, 12, 3),
    "linear": lambda: nn.Linear(8, 12),
}
FAMILIES = {"transposed": "ordinary", "linear": "pointwise"}
TYPES = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
RULES = [{}, {"remainder": "coarse"}, {"selection": "principal"}]


def make(kind, batch=2):
    torch.manual_seed(0)
    x = torch.randn(batch, 8, 6, 6)
    x = x.movedim(1, -1) if kind == "linear" else x
    return nn.Sequential(LAYERS[kind]()), x.requires_grad_()


def spared(kind, x, layer, k):
    y = layer(x)
    extent = Extent.of(
        x.shape,
        layer[0].weight.shape,
        y.shape,
        getattr(layer[0], "groups", 1),
        kind == "transposed",
    )
    return extent.macs * (1 - k * extent.choices / extent.channels)


def gradients(layer, x):
    layer.zero_grad()
    x.grad = None
    layer(x).square().sum().backward()
    return [x.grad, *(p.grad for p in layer.parameters())]


def test_nothing_is_dense_for_that_before_times_say_so():
    assert set(FEWEST_SPARED.values()) == {0}


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("given", RULES, ids=["l1", "coarse", "principal"])
def test_what_spares_too_little_is_dense(kind, given, monkeypatch):
    layer, x = make(kind)
    expected = gradients(layer, x)

    def is_dense():
        for _ in range(4):  # the first ones of directions are refreshes, and may be dense
            found = gradients(layer, x)
        if kind == "linear" and given:  # as a convolution, which rounds differently
            return all(
                torch.allclose(*pair, atol=1e-4) for pair in zip(found, expected, strict=True)
            )
        return all(map(torch.equal, found, expected))

    kept = 2 if kind in ("grouped", "depthwise") else 3
    limit = spared(kind, x, layer, kept)
    ssp.convert(layer, 0.75, types=TYPES, **given)
    family = FAMILIES.get(kind, kind)
    for fewest, dense in ((limit + 1, True), (limit, False)):
        monkeypatch.setitem(FEWEST_SPARED, family, fewest)
        assert is_dense() == dense
    others = [name for name in FEWEST_SPARED if name != family]
    for name in others:  # whose limit says nothing of this layer
        monkeypatch.setitem(FEWEST_SPARED, name, 1e12)
    assert not is_dense()


@pytest.mark.parametrize("kind", list(LAYERS))
def test_it_is_counted_as_dense(kind, monkeypatch):
    layer, x = make(kind)
    plain, shape = make(kind)[0], tuple(x.shape)
    with FlopCounterMode(display=False) as counter:
        gradients(plain, x)
    ssp.convert(layer, 0.75, types=TYPES)
    assert ssp.summary(layer, input_size=shape).backward_saved > 0
    monkeypatch.setitem(FEWEST_SPARED, FAMILIES.get(kind, kind), 1e12)
    assert ssp.summary(layer, input_size=shape).backward_saved == 0
    meter = ssp.Meter(layer)
    gradients(layer, x)
    assert meter.report().backward_saved == 0
    meter.close()

    with FlopCounterMode(display=False) as compiled_counter:
        gradients(torch.compile(layer, backend="aot_eager"), x)
    assert compiled_counter.get_total_flops() == counter.get_total_flops()


def test_a_larger_batch_is_sparse(monkeypatch):
    layer, few = make("ordinary", 1)
    many = make("ordinary", 8)[1]
    ssp.convert(layer, 0.75)
    monkeypatch.setitem(FEWEST_SPARED, "ordinary", 4 * spared("ordinary", few, layer, 3))
    for x, rows in ((few, 12), (many, 3)):
        grads = gradients(layer, x)
        assert int(grads[1].flatten(1).any(1).sum()) == rows


def test_processes_that_select_together_do_not_go_by_their_batch(monkeypatch):
    extent = Extent(12, 8, 9, 1, 36, 16)
    monkeypatch.setitem(FEWEST_SPARED, "ordinary", 1e12)
    shared = BackwardRule(SynchronizedScores(rule.l1_scores))
    assert spares_little(BackwardRule(), extent, 3)
    assert kind_of(BackwardRule(), extent, 3).selected == "all"
    assert not spares_little(shared, extent, 3)
    assert kind_of(shared, extent, 3).selected == "channels"
