"""Which of a layer's gradient goes back, by its sizes and by what ``convert`` was told."""

import pytest
import torch

import ssprop_patch as ssp
from ssprop_patch.core.rule import BackwardKind, BackwardRule, Extent, kind_of, ranks, resolve_rule
from ssprop_patch.core.selection import l1_scores, l2_scores


def extent(c_in, c_out, kernel=3, size=16, groups=1, block=0, transposed=False, stride=1):
    w = (c_in, c_out // groups) if transposed else (c_out, c_in // groups)
    out = size * stride if transposed else size // stride
    shapes = (8, c_in, size, size), (*w, kernel, kernel), (8, c_out, out, out)
    return Extent.of(*shapes, groups, transposed, block)


def kind(c_in, c_out, kept, rule=None, **more):
    rule = rule or resolve_rule("principal")
    e = extent(c_in, c_out, block=rule.block, **more)
    return kind_of(rule, e, round(kept * c_out / e.choices))


WHOLE = resolve_rule("principal", "coarse")


def test_a_wide_kernel_is_projected_on_the_output():
    assert kind(64, 64, 0.2) == BackwardKind("output")
    assert kind(64, 64, 0.2, WHOLE) == BackwardKind("output", 4)
    assert kind(64, 128, 0.2, groups=4) == BackwardKind("output")


def test_an_expanding_1x1_is_projected_on_the_input():
    assert kind(16, 96, 0.2, kernel=1) == BackwardKind("input")
    assert kind(16, 96, 0.2, WHOLE, kernel=1) == BackwardKind("input", 4)
    assert kind(96, 16, 0.2, kernel=1) == BackwardKind("output")
    # The rows of a transposed one's weight belong to inputs.
    assert kind(16, 96, 0.05, kernel=1, transposed=True) == BackwardKind("output")


def test_where_a_projection_costs_more_than_it_saves_channels_are_kept():
    # U'dy alone would be half as much as the products.
    assert kind(64, 64, 0.6, kernel=1) == BackwardKind("output")
    assert kind(64, 64, 0.64, kernel=1) == BackwardKind("channels")
    assert kind(16, 96, 0.05, kernel=1, transposed=True, groups=2) == BackwardKind("output")
    assert kind(3, 96, 0.5, kernel=1, transposed=True) == BackwardKind("channels")


def test_a_depthwise_layer_keeps_channels():
    assert kind(64, 64, 0.2, groups=64) == BackwardKind("channels")
    assert kind(64, 64, 0.2, WHOLE, groups=64) == BackwardKind("channels", 4)


def test_a_remainder_that_would_not_pay_makes_the_gradient_exact():
    coarse = resolve_rule("l1", "coarse")
    # On a map of one position the twin is the layer.
    assert kind(64, 64, 0.2, coarse, kernel=1, size=1) == BackwardKind("all")
    assert kind(64, 64, 0.2, WHOLE, kernel=1, size=1) == BackwardKind("all")
    assert kind(64, 64, 0.9375, coarse, kernel=1, size=4) == BackwardKind("channels", 4)
    assert kind(64, 64, 0.96, coarse, kernel=1, size=4) == BackwardKind("all")
    # Without a remainder the paper's rule always runs.
    assert kind(64, 64, 0.98, BackwardRule(), kernel=1, size=1) == BackwardKind("channels")


def test_where_there_is_nothing_to_compute():
    """An empty batch, and a layer without inputs: no share of it can be told."""
    for shapes in [((0, 4, 5, 5), (8, 4, 3, 3), (0, 8, 3, 3)), ((7, 0), (8, 0), (7, 8))]:
        for transposed in (False, True):
            e = Extent.of(*shapes, 1, transposed, 4)
            assert kind_of(WHOLE, e, 2) == BackwardKind("all")
            assert kind_of(resolve_rule("principal"), e, 2) == BackwardKind("all")


def test_extents():
    e = extent(8, 12, kernel=3, size=10, groups=2, block=4)
    assert (e.channels, e.inputs, e.taps, e.groups) == (12, 4, 9, 2)
    assert (e.x_positions, e.y_positions, e.blocks) == (800, 800, 8 * 4)
    assert e.macs == 800 * 12 * 4 * 9 and e.reads == 36
    assert e.coarse_share == pytest.approx(4 / (100 * 9))
    t = extent(8, 12, kernel=3, size=10, stride=2, transposed=True, block=4)
    assert (t.channels, t.inputs, t.y_positions) == (12, 8, 8 * 400)
    assert t.macs == 800 * 8 * 12 * 9 and t.reads == 18 and t.blocks == 8 * 4
    # A linear layer, with rows of any shape; and a call without a batch.
    assert Extent.of((5, 7, 6), (4, 6), (5, 7, 4), 1).y_positions == 35
    assert Extent.of((6,), (4, 6), (4,), 1).macs == 24
    unbatched = Extent.of((3, 9, 9), (5, 3, 3, 3), (5, 7, 7), 1, False, 4)
    assert (unbatched.channels, unbatched.inputs, unbatched.blocks) == (5, 3, 4)


def test_ranks_are_as_large_a_share_of_other_spaces():
    assert ranks(20, 100, 10, 90, 2, 1) == (2, 18, 1, 1)
    assert ranks(1, 3, 8) == (3,)
    assert ranks(1, 100, 4) == (1,)


def test_what_the_arguments_mean():
    assert resolve_rule() == BackwardRule(l1_scores) and resolve_rule().is_top_k
    assert resolve_rule("l2", "coarse") == BackwardRule(l2_scores, 4)
    assert resolve_rule("l1", ssp.Coarse(2)).block == 2
    assert not resolve_rule("l1", "coarse").is_top_k
    subspace = ssp.Subspace()
    assert resolve_rule(subspace).subspace is subspace
    settings = ssp.Principal(refresh_interval=3)
    assert resolve_rule(settings).subspace.settings is settings
    assert resolve_rule("principal").subspace.settings == ssp.Principal()
    other = resolve_rule(subspace, "coarse").for_another_layer()
    assert other.subspace is not subspace and other.block == 4


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (("l1", "fine"), ValueError, "'coarse'.*got 'fine'"),
        (("l1", 4), TypeError, "remainder.*int"),
        (("l1", True), TypeError, "remainder.*bool"),
        (("l1", ssp.Coarse), TypeError, "remainder.*type"),
        (("pca", None), ValueError, "'principal'.*'pca'"),
        ((7, None), TypeError, "Principal"),
    ],
    ids=str,
)
def test_arguments_that_mean_nothing(arguments, error, words):
    with pytest.raises(error, match=words):
        resolve_rule(*arguments)


def test_scores_belong_to_layers_that_keep_channels():
    assert resolve_rule("principal").score_fn is l1_scores
    assert resolve_rule(lambda dy: dy.sum((0, 2, 3))).score_fn(torch.ones(1, 2, 1, 1)).tolist()
