"""Who else reads the gradient that a batch norm defers."""

import copy
import io

import pytest
import torch
from torch import nn

import ssprop_patch as ssp

from .norms import (
    RATE,
    assert_same,
    compare_with_oracle,
    inputs,
    net,
    spread_out,
    step,
)

pytestmark = pytest.mark.usefixtures("however_small")


class Branching(nn.Module):
    """Uses what the convolution returns twice: in the norm and beside it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.double()

    def forward(self, x):
        y = self.conv(x)
        return self.last(self.norm(y) + y.square())


def test_is_whole_where_another_use_adds_its_own(way, formed):
    compare_with_oracle(way, Branching(), inputs())
    assert formed["whole"] == 1 and formed["part"] == 0


@pytest.mark.parametrize("which", [0, 1])
def test_with_full_backward_hooks(way, which, formed):
    model, seen = net(), []
    model[2] = nn.ReLU()  # the hook's view of the norm's output refuses to be changed in place
    model[which].register_full_backward_hook(lambda m, gi, go: seen.append(gi))
    compare_with_oracle(way, model, inputs())
    assert seen and formed["part"] == 1 and formed["whole"] == 0  # the other pair


def test_a_hook_of_the_tensor_sees_and_changes_the_gradient(way):
    model = spread_out(net())
    other = copy.deepcopy(model)
    x, seen = inputs(), {}
    for side, m in (("deferred", model), ("ordinary", other)):

        def hook(grad, side=side):
            seen[side] = grad.clone()
            return grad * 2

        m[0].register_forward_hook(lambda _, args, y, hook=hook: y.register_hook(hook) and None)
    ssp.convert(model, RATE, selection=way.selection)
    ssp.convert(other, RATE, selection=way.unfused)
    got, expected = step(model, x)[0], step(other, x)[0]
    assert_same(got, expected)
    torch.testing.assert_close(seen["deferred"], seen["ordinary"], rtol=1e-10, atol=1e-12)


def test_asked_for_it_is_a_tensor_like_any_other(way):
    model = ssp.convert(net(), RATE, selection=way.selection)
    seen = []
    model[0].register_forward_hook(lambda _, args, y: seen.append(y))
    out = model(inputs())
    (grad,) = torch.autograd.grad(out.square().sum(), seen, retain_graph=True)
    ssp.convert(model, RATE, selection=way.unfused)
    reference = torch.autograd.functional.vjp(lambda y: model[1:](y), seen[0], 2 * out)[1]
    torch.testing.assert_close(torch.from_numpy(grad.numpy()), reference, rtol=1e-9, atol=1e-12)
    assert repr(grad) == repr(grad + 0)
    saved = io.BytesIO()
    torch.save(grad, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=True), grad + 0)


def test_retained_on_the_output(way):
    model = ssp.convert(net(), RATE, selection=way.selection)
    kept = []

    def keep(module, args, y):
        y.retain_grad()
        kept.append(y)

    model[0].register_forward_hook(keep)
    model(inputs()).sum().backward()
    assert type(kept[0].grad) is torch.Tensor and kept[0].grad.shape == kept[0].shape
