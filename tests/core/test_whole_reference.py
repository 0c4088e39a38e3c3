"""The reference of directions and the remainder, said on its own from dense kernels (float64)."""

import pytest
import torch

from core.twins import layers, twin_gradients
from ssprop_patch.core import reference

close = dict(rtol=1e-10, atol=1e-10)
MASKS = [(True, True, True), (True, False, True), (False, True, False)]


def some(seed, transposed=None, number=12):
    """Layers with enough channels for directions."""
    found = layers(3 * number, seed, channels=((1, 3), (2, 5)))
    kept = [layer for layer in found if transposed in (None, layer.transposed)]
    return kept[:number]


def dense(dy, layer):
    p = layer.params
    return torch.ops.aten.convolution_backward(
        dy,
        layer.x,
        layer.w,
        None,
        p.stride,
        p.padding,
        p.dilation,
        p.transposed,
        p.output_padding,
        p.groups,
        (True, True, False),
    )[:2]


def directions(groups, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    k = max(1, size // 2)
    return torch.linalg.qr(torch.randn(groups, size, k, generator=g, dtype=torch.float64)).Q


def along(t, basis):
    """The projection of (N, C, ...) on each group's directions, one group at a time."""
    parts = [
        torch.einsum("cd,nd...->nc...", u @ u.T, part)
        for u, part in zip(basis, t.chunk(len(basis), 1), strict=True)
    ]
    return torch.cat(parts, 1)


def along_rows(dw, basis):
    """The projection of each row of a weight's gradient, one group at a time."""
    parts = [
        (part.flatten(1) @ (t @ t.T)).view(part.shape)
        for t, part in zip(basis, dw.chunk(len(basis)), strict=True)
    ]
    return torch.cat(parts)


def check(layer, expected, mask, **how):
    found = reference.whole_backward(layer.dy, layer.x, layer.w, layer.params, mask, **how)
    db = layer.dy.transpose(0, 1).flatten(1).sum(1)
    for needed, f, e in zip(mask, found, (*expected, db), strict=True):
        assert (f is not None) == needed
        if needed:
            torch.testing.assert_close(f, e, **close)


def rest_of(e, layer, block):
    if not block:
        return torch.zeros_like(layer.x), torch.zeros_like(layer.w)
    return twin_gradients(e, layer.x, layer.w, layer.params, block)


def added(*pairs):
    return tuple(map(sum, zip(*pairs, strict=True)))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("block", [0, 3])
def test_kept_channels(block, mask):
    for layer in some(1):
        kept = torch.randperm(layer.dy.shape[1])[: max(1, layer.dy.shape[1] // 3)]
        selected = torch.zeros_like(layer.dy)
        selected[:, kept] = layer.dy[:, kept]
        expected = added(dense(selected, layer), rest_of(layer.dy - selected, layer, block))
        check(layer, expected, mask, kept=kept, block=block)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("block", [0, 3])
def test_directions_of_the_output(block, mask):
    for layer in some(2):
        groups = layer.params.groups
        u = directions(groups, layer.dy.shape[1] // groups)
        selected = along(layer.dy, u)
        expected = added(dense(selected, layer), rest_of(layer.dy - selected, layer, block))
        check(layer, expected, mask, u=u, block=block)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("block", [0, 3])
def test_directions_of_the_input(block, mask):
    for layer in some(3, transposed=False):
        groups = layer.params.groups
        v = directions(groups, layer.x.shape[1] // groups)
        t = directions(groups, layer.w[0].numel(), seed=1)
        dx, dw = dense(layer.dy, layer)
        rest_x, rest_w = rest_of(layer.dy, layer, block)
        expected = (
            along(dx, v) + rest_x - along(rest_x, v),
            along_rows(dw, t) + rest_w - along_rows(rest_w, t),
        )
        sides = {"v": v if mask[0] else None, "t": t if mask[1] else None}
        check(layer, expected, mask, **sides, block=block)


def test_all_directions_or_channels_are_the_dense_gradient():
    for layer in some(4, transposed=False, number=4):
        groups, channels = layer.params.groups, layer.dy.shape[1]
        full = {
            "kept": torch.arange(channels),
            "u": torch.eye(channels // groups).double().expand(groups, -1, -1),
            "v": torch.eye(layer.x.shape[1] // groups).double().expand(groups, -1, -1),
        }
        for name, basis in full.items():
            more = {}
            if name == "v":
                more["t"] = torch.eye(layer.w[0].numel()).double().expand(groups, -1, -1)
            check(layer, dense(layer.dy, layer), (True,) * 3, **{name: basis}, **more, block=3)
