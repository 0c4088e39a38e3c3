"""nan and inf in the gradient: kept where they are, never leaked where they are dropped."""

import math

import pytest
import torch

from ssprop_patch import functional
from ssprop_patch.core.geometry import ConvParams
from ssprop_patch.core.rule import BackwardRule
from ssprop_patch.core.selection import l1_scores, random_scores
from ssprop_patch.ops.backward import sparse_backward

from .convolutions import LAYERS, _layer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # by torch.func itself
]


@pytest.mark.parametrize("scores", [l1_scores, random_scores])
@pytest.mark.parametrize("groups, layout", LAYERS)
def test_a_gradient_of_another_dtype_is_torchs_error(groups, layout, scores):
    # C functions would read it as what it is not.
    x, w, _, dy = (t.detach() for t in _layer(groups, layout))
    params = ConvParams((1, 1), (0, 0), (1, 1), groups)
    with pytest.raises(RuntimeError, match=r"float|Double"):
        sparse_backward(dy.double(), x, w, params, 2, BackwardRule(scores), (True, True, False))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("selection", ["l1", "l2"])
@pytest.mark.parametrize("groups, layout", LAYERS)
def test_a_channel_with_nan_or_inf_is_kept_so_that_a_grad_scaler_sees_it(
    groups, layout, selection, bad
):
    x, w, b, dy = _layer(groups, layout)
    dy = dy * 0.1
    dy[1, 6, 1, 1] = bad
    y = functional.conv2d(x, w, b, groups=groups, drop_rate=0.75, selection=selection)
    y.backward(dy)
    for t in (w, b, x):
        assert not t.grad.isfinite().all()
    others = [c for c in range(8) if c != 6]
    assert w.grad[others].isfinite().all() and b.grad[others].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("groups, layout", LAYERS)
def test_what_a_dropped_channel_holds_never_leaks(groups, layout, bad):
    # Only a selection of one's own can drop such a channel; then 0 * inf must not appear.
    x, w, b, dy = _layer(groups, layout)
    scores = torch.tensor([0.0, 9, 8, 1, 7, 0, 9, 0])  # two of each four
    dy[:, 3] = bad
    y = functional.conv2d(x, w, b, groups=groups, drop_rate=0.5, selection=lambda dy: scores)
    y.backward(dy)
    for t in (x, w, b):
        assert t.grad.isfinite().all()
    assert not w.grad[3].any() and b.grad[3] == 0


def test_overflow_in_half_precision_does_not_hide_in_the_score():
    # The sum of |dy| passes the largest float16, 65504, for both channels: still in order.
    dy = torch.full((1, 2, 10_000), 10.0, dtype=torch.float16)
    dy[:, 1] = 20
    w = torch.ones(2, 1, 1, dtype=torch.float16, requires_grad=True)
    x = torch.full((1, 1, 10_000), 1e-3, dtype=torch.float16)
    functional.conv1d(x, w, drop_rate=0.5).backward(dy)
    assert w.grad[0] == 0 and w.grad[1].isfinite().all() and w.grad[1] > 0
