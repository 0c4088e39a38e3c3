"""Directions and the coarse remainder as they are computed, against the reference."""

import functools
import itertools
import random

import oracle
import pytest
import torch
from core.twins import convolve, layers
from torch import nn

import ssprop_patch as ssp
from ssprop_patch import Coarse, Principal, Subspace, functional
from ssprop_patch.core import reference
from ssprop_patch.core.geometry import ConvParams
from ssprop_patch.core.rule import BackwardKind, BackwardRule
from ssprop_patch.core.selection import kept_channels, l1_scores, selectable_channels, topk_indices
from ssprop_patch.ops.whole_gradient import whole_backward, whole_linear_backward

ALL = (True, True, True)
MASKS = [ALL, ALL, (False, True, True), (True, False, False)]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Watching:
    """Takes note of what ran."""

    def backward(self, x, w, dy, k, output_mask, kind):
        self.k, self.kind = k, kind

    def selected(self, index):
        self.index = index

    def computed(self, algorithms):
        pass


def wanted(dy, x, w, p, k, rule, mask, kind):
    """What the reference computes along the directions that there are now."""
    refreshed_input = kind.selected == "input" and kind.refreshed
    if kind.selected == "all" or refreshed_input:
        return reference.dense_backward(dy, x, w, p, mask)
    if kind == BackwardKind("channels"):  # the paper's choice
        return reference.sparse_backward(dy, x, w, p, k, output_mask=mask)
    how = {"block": kind.block}
    if kind.selected == "channels":
        choices = 1 if p.groups == dy.shape[1] > 1 else p.groups
        how["kept"] = topk_indices(l1_scores(dy), k, choices)
    elif kind.selected == "output":
        how["u"] = rule.subspace.bases["dy"].vectors.to(dy.dtype)
    else:
        for name, basis, needed in zip("vt", ("dx", "dw"), mask, strict=False):
            how[name] = rule.subspace.bases[basis].vectors.to(dy.dtype) if needed else None
    return reference.whole_backward(dy, x, w, p, mask, **how)


def check(found, expected, mask, what="", rtol=1e-9):
    for f, e, needed in zip(found, expected, mask, strict=True):
        assert (f is not None) == needed, what
        if needed:
            assert f.shape == e.shape and f.dtype == e.dtype, what
            close = rtol * (e.abs().max().item() + 1e-9)
            torch.testing.assert_close(f, e, rtol=0, atol=close, msg=f"{what}: {{}}".format)


@functools.cache
def tried(seed, number=60):
    """Run generated layers for some passes, the last of which is compared; return what ran."""
    pick, kinds = random.Random(seed), set()
    for layer in layers(number, seed, channels=((1, 2, 6), (1, 3, 5, 20)), blocks=(0, 2, 4)):
        dy, x, w, p = layer.dy, layer.x, layer.w, layer.params
        if pick.random() < 0.4 and x.dim() in LAST:
            x, dy = (t.contiguous(memory_format=LAST[x.dim()]) for t in (x, dy))
        settings = Principal(energy=pick.choice([None, None, 0.7]))
        subspace = Subspace(settings) if not layer.block or pick.random() < 0.7 else None
        rule = BackwardRule(block=layer.block, subspace=subspace)
        each = selectable_channels(dy.shape[1], p.groups)
        k = kept_channels(each, pick.choice([0.2, 0.5, 0.8]))
        mask = pick.choice(MASKS)
        if k < each:
            watching = Watching()
            with torch.no_grad():
                for _ in range(pick.choice([1, 4])):  # of which the fourth refreshes nothing
                    found = whole_backward(dy, x, w, p, k, rule, mask, watching)
            kind = watching.kind
            check(found, wanted(dy, x, w, p, k, rule, mask, kind), mask, f"{kind} of {layer}")
            kinds.add(kind)
    return kinds


@pytest.mark.parametrize("seed", range(6))
def test_any_layer(seed):
    assert len(tried(seed)) > 3


def test_the_layers_tried_need_every_kind():
    kinds = {kind for seed in range(6) for kind in tried(seed)}
    for selected, block, refreshed in itertools.product(("output", "input"), (0, 4), (False, True)):
        assert BackwardKind(selected, block, refreshed) in kinds
    assert {BackwardKind("channels"), BackwardKind("channels", 2), BackwardKind("all")} <= kinds


# --- one layer of each side -------------------------------------------------------------------

P = ConvParams((1, 1), (1, 1), (1, 1), 1)
POINT = ConvParams((1, 1), (0, 0), (1, 1), 1)
STRIDED = ConvParams((2, 2), (1, 1), (1, 1), 2)
UP = ConvParams((2, 2), (1, 1), (1, 1), 1, True, (1, 1))
LAYERS = {  # kind that runs: weight, geometry
    "output": ((24, 16, 3, 3), P),
    "input": ((64, 16, 1, 1), POINT),
    "groups": ((24, 8, 3, 3), STRIDED),
    "transposed": ((16, 20, 4, 4), UP),
    "depthwise": ((16, 1, 3, 3), P._replace(groups=16)),
}


def layer_of(name, dtype=torch.float64, samples=3):
    shape, p = LAYERS[name]
    x, w = torch.randn(samples, 16, 9, 10).to(dtype), torch.randn(shape).to(dtype)
    dy = torch.randn_like(convolve(x, w, p))
    return dy, x, w, p


def passes(dy, x, w, p, rule, number=4, rate=0.75, mask=ALL, watching=None):
    k = kept_channels(selectable_channels(dy.shape[1], p.groups), rate)
    with torch.no_grad():
        for _ in range(number):
            found = whole_backward(dy, x, w, p, k, rule, mask, watching)
    return found, k


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision(dtype, name):
    dy, x, w, p = layer_of(name, dtype)
    rule, watching = BackwardRule(block=4, subspace=Subspace()), Watching()
    found, k = passes(dy, x, w, p, rule, watching=watching)
    assert watching.kind.selected == {"depthwise": "channels", "input": "input"}.get(name, "output")
    for basis in rule.subspace.bases.values():
        assert basis.covariance.dtype == basis.vectors.dtype == torch.float32
    wide = (t.double() for t in (dy, x, w))
    expected = wanted(*wide, p, k, rule, ALL, watching.kind)
    rtol = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    check(found, [e.to(dtype) for e in expected], ALL, name, rtol)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dy_last", [False, True])
def test_memory_formats(name, dy_last):
    dy, x, w, p = layer_of(name)
    rule, watching = BackwardRule(block=4, subspace=Subspace()), Watching()
    _, k = passes(dy, x, w, p, rule, watching=watching)
    last = torch.channels_last
    x, w = x.contiguous(memory_format=last), w.contiguous(memory_format=last)
    dy = dy.contiguous(memory_format=last) if dy_last else dy
    with torch.no_grad():
        found = whole_backward(dy, x, w, p, k, rule, ALL, watching)
    check(found, wanted(dy, x, w, p, k, rule, ALL, watching.kind), ALL, name)


@pytest.mark.parametrize("mask", [ALL, (True, False, False), (False, True, False)])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("block", [0, 4])
def test_an_empty_batch(block, name, mask):
    dy, x, w, p = layer_of(name, samples=0)
    rule = BackwardRule(block=block, subspace=Subspace())
    (dx, dw, db), _ = passes(dy, x, w, p, rule, number=1, mask=mask)
    assert (dx is None or dx.shape == x.shape) and (dx is not None) == mask[0]
    assert dw is None or (dw.shape == w.shape and not dw.any())
    assert db is None or (db.shape == (dy.shape[1],) and not db.any())
    assert rule.subspace.passes == 0


@pytest.mark.parametrize("name", ["output", "input"])
def test_a_layer_that_needs_no_dx_keeps_no_directions_of_it(name):
    dy, x, w, p = layer_of(name)
    rule = BackwardRule(subspace=Subspace())
    passes(dy, x, w, p, rule, mask=(False, True, False))
    assert set(rule.subspace.bases) == {"output": {"dy"}, "input": {"dw"}}[name]
    # And when it does they are made.
    passes(dy, x, w, p, rule, number=1)
    assert set(rule.subspace.bases) == {"output": {"dy"}, "input": {"dw", "dx"}}[name]


def test_a_gradient_that_is_not_finite_goes_back_as_it_is_and_refreshes_nothing():
    for name in ("output", "input"):
        dy, x, w, p = layer_of(name)
        rule = BackwardRule(subspace=Subspace())
        passes(dy, x, w, p, rule, number=2)
        before = {key: b.covariance.clone() for key, b in rule.subspace.bases.items()}
        spoilt = dy.clone()
        spoilt[0, 3, 2, 2] = torch.inf
        (_, dw, _), _ = passes(spoilt, x, w, p, rule, number=1)  # the third refreshes
        assert not dw.isfinite().all()  # which a GradScaler has to see
        for key, b in rule.subspace.bases.items():
            assert torch.equal(b.covariance, before[key]) and b.vectors.isfinite().all()


# --- linear layers ----------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 4])
@pytest.mark.parametrize("features", [(24, 16), (12, 40)])  # output side, input side
@pytest.mark.parametrize("shape", [(30,), (5, 7), (2, 5, 7), (2, 4, 5, 3)])
@pytest.mark.parametrize("principal", [False, True])
def test_linear_layers(principal, shape, features, block):
    if not (principal or block):
        return
    n, c = features
    x, w = torch.randn(*shape, n).double(), torch.randn(c, n).double()
    dy = torch.randn(*shape, c).double()
    rule = BackwardRule(block=block, subspace=Subspace() if principal else None)
    watching = Watching()
    with torch.no_grad():
        for _ in range(4):
            found = whole_linear_backward(dy, x, w, 3, rule, ALL, watching)
    # A convolution that has the positions in a row, and rows of one position as many samples.
    as_map = [t.movedim(-1, 1) if t.dim() > 2 else t[:, :, None] for t in (x, dy)]
    dims = as_map[0].dim() - 2
    p = ConvParams((1,) * dims, (0,) * dims, (1,) * dims, 1)
    wide = w.view(*w.shape, *(1,) * dims)
    dx, dw, db = wanted(as_map[1], as_map[0], wide, p, 3, rule, ALL, watching.kind)
    expected = dx.movedim(1, -1).reshape(x.shape), dw.view(w.shape), db
    check(found, expected, ALL, f"{watching.kind}")
    if dims == 1 and len(shape) == 1 and block:
        assert watching.kind.selected == "all"  # the twin of one position is the layer


def test_a_vector_through_a_linear_layer():
    x, w, dy = torch.randn(6).double(), torch.randn(10, 6).double(), torch.randn(10).double()
    rule = BackwardRule(subspace=Subspace())
    with torch.no_grad():
        dx, dw, db = whole_linear_backward(dy, x, w, 2, rule, ALL)
    # Of one position directions do not pay: the paper's choice.
    kept = dy.abs().topk(2).indices
    assert torch.equal(db.nonzero().flatten(), kept.sort().values)
    torch.testing.assert_close(dx, dy[kept] @ w[kept])
    torch.testing.assert_close(dw, torch.outer(db, x))


# --- as functions -----------------------------------------------------------------------------


def test_functional_remainder():
    x, w = torch.randn(2, 3, 9, 9).double(), torch.randn(10, 3, 3, 3).double()
    for remainder, block in (("coarse", 4), (Coarse(2), 2)):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        y = functional.conv2d(*leaves, drop_rate=0.7, remainder=remainder)
        assert torch.equal(y, oracle.CONV[2](x, w))
        dy = torch.randn_like(y)
        kept = oracle.choose(dy, 1, 0.7).keep.nonzero().flatten()
        p = ConvParams((1, 1), (0, 0), (1, 1), 1)
        expected = reference.whole_backward(dy, x, w, p, kept=kept, block=block)
        check(torch.autograd.grad(y, leaves, dy), expected[:2], (True, True))


def test_functional_subspace():
    w, subspace = torch.randn(10, 3, 3, 3).double(), Subspace()
    p = ConvParams((1, 1), (0, 0), (1, 1), 1)
    for _ in range(5):
        x = torch.randn(2, 3, 9, 9).double()
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        y = functional.conv2d(*leaves, drop_rate=0.7, selection=subspace, remainder="coarse")
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, leaves, dy)
        u = subspace.bases["dy"].vectors
        assert u.shape == (1, 10, 3)
        check(found, reference.whole_backward(dy, x, w, p, u=u, block=4)[:2], (True, True))
    assert subspace.passes == 5


@pytest.mark.parametrize("selection", ["principal", Principal(momentum=0.1)], ids=str)
def test_functional_has_nowhere_to_keep_directions(selection):
    x, w = torch.randn(2, 3, 9, 9), torch.randn(10, 3, 3, 3)
    with pytest.raises(ValueError, match=r"ssprop_patch\.Subspace\(\), and pass that"):
        functional.conv2d(x, w, drop_rate=0.7, selection=selection)


@pytest.mark.parametrize("which", ["input", "weight"])
@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d, nn.Linear])
@pytest.mark.parametrize(
    "rule", [{"selection": "principal"}, {"remainder": "coarse"}], ids=lambda rule: next(iter(rule))
)
def test_memory_that_is_gone_is_an_error(rule, layer, which):
    net = layer(8, 16, *(() if layer is nn.Linear else (1,)))
    shape = (2, 5, 5, 8) if layer is nn.Linear else (2, 8, 5, 5)
    ssp.convert(net, 0.7, types=(layer,), **rule)
    for _ in range(4):  # the last of them refreshes no directions
        net(torch.randn(shape)).sum().backward()
    x = torch.randn(shape, requires_grad=True)
    y = net(x)
    taken = x if which == "input" else net.weight
    size = taken.untyped_storage().nbytes()
    taken.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"storage|data is not allocated"):
        y.backward(torch.ones_like(y))
    taken.untyped_storage().resize_(size)
