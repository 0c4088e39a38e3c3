"""The opaque operators return what they promise the compiler."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from ssprop_patch.core.rule import BackwardRule
from ssprop_patch.core.selection import resolve_selection
from ssprop_patch.ops import custom_ops
from ssprop_patch.schedule import settings

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def half():
    """What tells the operator to keep every other channel: rate and token."""
    layer = settings.LayerSettings(BackwardRule(resolve_selection("l1")))
    return settings.rate_tensor(0.5), settings.token_of(layer)


@pytest.mark.parametrize("needed", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("layouts", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize(
    "groups, kernel_size, stride", [(1, 3, 1), (1, 1, 1), (1, 1, 2), (2, 3, 1), (8, 3, 1)]
)
def test_the_operator_returns_what_it_promises_the_compiler(
    groups, kernel_size, stride, layouts, needed
):
    # Shapes, strides and dtypes of the fake kernel against the real one's, and the schema.
    x = torch.randn(2, 8, 6, 6)
    w = torch.randn(8, 8 // groups, kernel_size, kernel_size)
    dy = torch.randn(F.conv2d(x, w, stride=stride, groups=groups).shape)
    dy, x, w = (
        t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        for t, last in zip((dy, x, w), layouts, strict=True)
    )
    geometry = ([stride] * 2, [0, 0], [1, 1], groups, False, [0, 0])
    arguments = (dy, x, w, *geometry, *half(), [bool(n) for n in needed])
    torch.library.opcheck(
        custom_ops.conv_backward, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("needed", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_operator_keeps_its_promise_for_transposed_convolutions(groups, needed):
    x, w = torch.randn(2, 8, 5, 5), torch.randn(8, 8 // groups, 3, 3)
    dy = torch.randn(F.conv_transpose2d(x, w, None, 2, 1, 1, groups).shape)
    geometry = ([2, 2], [1, 1], [1, 1], groups, True, [1, 1])
    arguments = (dy, x, w, *geometry, *half(), [bool(n) for n in needed])
    torch.library.opcheck(
        custom_ops.conv_backward, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("needed", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("leading", [(), (6,), (2, 3, 4)])
def test_the_linear_operator_returns_what_it_promises(leading, permuted, needed):
    x, w, dy = torch.randn(*leading, 4), torch.randn(8, 4), torch.randn(*leading, 8)
    if permuted and len(leading) > 1:
        x, dy = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, dy))
    arguments = (dy, x, w, *half(), [bool(n) for n in needed])
    torch.library.opcheck(
        custom_ops.linear_backward, arguments, test_utils=("test_schema", "test_faketensor")
    )
